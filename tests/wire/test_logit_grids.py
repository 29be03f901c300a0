from __future__ import annotations

import numpy as np
import pytest
from wire.building import VOCAB_SIZE, build_rows, build_trace, log_softmax, round_logits
from wire.comparing import assert_equal_exactly
from wire.mutation import take_apart

from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.logit_grids import logprobs_of
from lynearm.wire.traces import Float32Array

KINDS = {"bfloat16": 2, "float16": 3}
DTYPES = pytest.mark.parametrize("dtype", KINDS)


def encode_exactly(rows: Float32Array) -> int:
    """The scale that the rows got; every bit must come back."""
    ids = np.stack(
        [np.random.default_rng(t).permutation(VOCAB_SIZE)[: rows.shape[1]] for t in range(len(rows))]
    )
    trace = build_rows(rows, ids)
    block = encode_block([trace], codec="exact", vocab_size=VOCAB_SIZE)
    (decoded,) = decode_block(block)
    assert_equal_exactly(decoded, trace)
    return take_apart(block).scale[0]


def rounded_rows(dtype: str, *, centre: float, spread: float, k: int = 32, seed: int = 0) -> Float32Array:
    """Logprobs of logits that were rounded to a type, sorted."""
    logits = np.random.default_rng(seed).normal(centre, spread, (40, 400))
    logprobs = log_softmax(round_logits(logits, dtype))
    return np.ascontiguousarray(np.sort(logprobs, axis=1)[:, ::-1][:, :k])


@DTYPES
@pytest.mark.parametrize("centre", [-60.0, -3.0, 0.0, 2.5, 20.0, 200.0])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_logprobs_of_rounded_logits_come_back_and_are_recognised(
    dtype: str, centre: float, spread: float
) -> None:
    kind = encode_exactly(rounded_rows(dtype, centre=centre, spread=spread))
    # What was rounded to bf16 is on a grid of its type; fp16 can be too fine for any, and stays exact.
    assert kind in ((2,) if dtype == "bfloat16" else (1, 2, 3))


def test_rows_of_fp16_logits_are_recognised() -> None:
    # Under a small top, whose neighbours are close, bf16 numbers may have the same differences.
    assert encode_exactly(rounded_rows("float16", centre=12.0, spread=3.0)) in (2, 3)
    assert encode_exactly(rounded_rows("float16", centre=12.0, spread=3.0, k=200, seed=4)) == 3


def test_float32_logits_are_not_mistaken_for_rounded_ones() -> None:
    assert encode_exactly(rounded_rows("float32", centre=10.0, spread=3.0)) == 1


@DTYPES
def test_a_row_that_is_off_by_a_bit_comes_back_too(dtype: str) -> None:
    rows = rounded_rows(dtype, centre=12.0, spread=3.0)
    for entry in (0, 3, 31):
        rows[7, entry] = np.nextafter(rows[7, entry], np.float32(0 if entry == 0 else -100))
        encode_exactly(rows)


@DTYPES
def test_ties_equal_rows_and_single_entries_come_back(dtype: str) -> None:
    encode_exactly(np.full((3, 7), np.float32(np.log(1 / 7))))
    encode_exactly(np.array([[-1e-7], [0.0], [-80.0]], np.float32))
    encode_exactly(rounded_rows(dtype, centre=12.0, spread=0.0, k=5))
    encode_exactly(np.array([[0.0, -1e-3, -9999.0], [0.0, -20.0, -1e6]], np.float32))


@DTYPES
@pytest.mark.parametrize("k", [1, 64, 1024])
def test_grids_of_logits_save_what_exactness_costs(dtype: str, k: int) -> None:
    rounded, full = (build_trace(3, positions=70, k=k, dtype=one) for one in (dtype, "float32"))
    sizes = [len(encode_block([trace], codec="exact", vocab_size=VOCAB_SIZE)) for trace in (rounded, full)]
    assert sizes[0] < (1.01 if k == 1 else 0.75) * sizes[1]


@pytest.mark.parametrize("mantissa_bits", [7, 10])
def test_places_beyond_every_float_are_some_number(mantissa_bits: int) -> None:
    edge = 1 << (8 + mantissa_bits)
    tops = np.array([edge - 1, 1 - edge, 0, edge - 1], np.int32)
    levels = np.array([[0, 2**32 - 1], [5, 2**31], [1, 2 * edge], [2 * edge - 2, 2 * edge]], np.uint32)
    first = np.array([np.inf, -np.inf, 0.0, np.nan], np.float32)
    out = np.zeros((4, 3), np.float32)
    logprobs_of(mantissa_bits, levels, first, tops, np.full(4, 2, np.uint32), out)
    assert (out[:, 2] == -np.inf).all()


@DTYPES
def test_a_few_rows_of_another_kind_stay_plain_on_the_others_grid(dtype: str) -> None:
    rows = rounded_rows(dtype, centre=12.0, spread=3.0, k=100, seed=4)
    rows[[5, 20]] = rounded_rows("float32", centre=12.0, spread=3.0, k=100, seed=4)[[5, 20]]
    rows[30, :2] = [0.0, -0.0]
    assert encode_exactly(rows) == KINDS[dtype]
    rows[::3] = rounded_rows("float32", centre=12.0, spread=3.0, k=100, seed=4)[::3]
    assert encode_exactly(rows) == 1
