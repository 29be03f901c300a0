from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from wire.building import VOCAB_SIZE, build_rows, build_sampled_trace, build_trace
from wire.comparing import (
    assert_same_bits,
    in_order,
    parts,
)
from wire.mutation import take_apart
from wire.round_trip import DRAWS, MODES, ROW_MODES, assert_round_trip, codec_of

from lynearm.wire.codec import decode_block, decode_rows, encode_block
from lynearm.wire.dictionaries import DictionaryReader
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.metadata import write_metadata
from lynearm.wire.row_layout import FOUR_LANES
from lynearm.wire.specs import CodecMode, CodecSpec
from lynearm.wire.traces import FinishReason, SamplingParams, TokenSpan, TopK, Trace


@MODES
def test_everything_a_trace_says_comes_back(mode: CodecMode) -> None:
    reasons: tuple[FinishReason, ...] = ("length", "abort", "stop")
    build = functools.partial(build_sampled_trace, draws=DRAWS) if mode == "sampled" else build_trace
    traces = [
        build(
            index,
            positions=5 + index,
            prompt_id=f"frage-{index}-ä😀",
            finish_reason=reason,
            sample_index=index,
            spans=(TokenSpan("reasoning", 0, 3), TokenSpan("answer", 3 + index, 5 + index)),
            sampling=SamplingParams(0.1 + index, 0.95, 40, 0.05, 512, (None, -(2**63), 2**63 - 1)[index]),
            tags={"source": "тест", "": "empty key", "z": ""} if index else {},
            completion_text="日本語 \x00 \r\n" * index,
        )
        for index, reason in enumerate(reasons)
    ]
    assert_round_trip(traces, mode)


@ROW_MODES
@pytest.mark.parametrize("positions", [9, 70])
@pytest.mark.parametrize("k", [0, 1, 2, 24, 25, 64, 512, 1024])
def test_rows_of_every_width_come_back(mode: CodecMode, k: int, positions: int) -> None:
    assert_round_trip([build_trace(seed, k=k, positions=positions) for seed in range(2)], mode)


@MODES
@pytest.mark.parametrize("rows", [1, 62, 63, 64, 65, 66, 67, 131])
def test_few_rows_and_many_come_back(mode: CodecMode, rows: int) -> None:
    if mode == "sampled":
        traces = [build_sampled_trace(positions=rows, draws=DRAWS)]
    else:
        traces = [build_trace(positions=rows, k=5)]
    block = assert_round_trip(traces, mode)
    assert bool(take_apart(block).flags & FOUR_LANES) == (rows >= 64)


@ROW_MODES
def test_rows_of_uneven_width_come_back_from_four_lanes(mode: CodecMode) -> None:
    rng = np.random.default_rng(1)
    trace = build_trace(positions=90, k=12)
    drop = np.arange(12) >= rng.integers(0, 13, 90)[:, None]
    top_k = TopK(
        np.where(drop, 0, trace.top_k.token_ids).astype(np.int32),
        np.where(drop, np.float32(-np.inf), trace.top_k.logprobs),
        trace.top_k.tail_mass,
    )
    assert_round_trip([build_trace(positions=90, k=12, top_k=top_k)], mode)


@MODES
def test_empty_completions_and_prompts_come_back_between_full_ones(mode: CodecMode) -> None:
    def build(seed: int, positions: int, prompt: int = 7) -> Trace:
        if mode == "sampled":
            return build_sampled_trace(seed, positions=positions, draws=DRAWS)
        return build_trace(seed, positions=positions, prompt=prompt)

    empty = build(1, 0)
    assert_round_trip([empty], mode)
    assert_round_trip([empty, build(2, 24, 0), empty, build(3, 1), empty], mode)


@ROW_MODES
def test_traces_of_different_widths_share_a_block(mode: CodecMode) -> None:
    assert_round_trip([build_trace(seed, k=k) for seed, k in enumerate((16, 0, 3, 16))], mode)


@ROW_MODES
def test_distributions_of_prompts_come_back(mode: CodecMode) -> None:
    scored = build_trace(1, prompt=9, prompt_rows=True)
    only_prompt = build_trace(2, prompt=70, positions=0, k=4, prompt_rows=True)
    assert_round_trip([build_trace(0), scored, only_prompt, build_trace(3)], mode)


@ROW_MODES
def test_padding_and_rows_without_entries_come_back(mode: CodecMode) -> None:
    inf = -np.inf
    trace = build_rows(
        [[-0.1, -3.0, inf, inf], [0.0, inf, inf, inf], [-1.0, -1.1, -2.0, -3.0], [inf] * 4],
        [[5, 7, 0, 0], [9, 0, 0, 0], [4, 3, 2, 1], [0, 0, 0, 0]],
    )
    assert_round_trip([trace], mode)


@ROW_MODES
def test_ids_under_padding_are_cleared(mode: CodecMode) -> None:
    trace = build_rows([[-0.1, -np.inf]], [[5, VOCAB_SIZE + 7]])
    (decoded,) = decode_block(encode_block([trace], codec=mode, vocab_size=VOCAB_SIZE))
    assert decoded.top_k.token_ids.tolist() == [[5, 0]]


@ROW_MODES
@pytest.mark.parametrize("width", [8, 32, 1024])
def test_ties_keep_their_ids(mode: CodecMode, width: int) -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(VOCAB_SIZE)[:width] for _ in range(3)])
    assert_round_trip([build_rows(np.full((3, width), np.log(1 / width)), ids)], mode)


@MODES
@pytest.mark.parametrize("vocab_size", [1, 2, 1 << 16, (1 << 16) + 1, 1 << 20])
def test_ids_reach_the_end_of_the_vocabulary(mode: CodecMode, vocab_size: int) -> None:
    last = vocab_size - 1
    prompt = np.array([0, last], np.int32)
    inside = build_rows([[0.0]], [[last]], prompt_token_ids=prompt)
    outside = build_rows(
        [[np.log(0.5)]],
        [[0]],
        completion_token_ids=np.array([last], np.int32),
        sampled_logprobs=np.array([-9.5], np.float32),
    )
    assert_round_trip([inside, outside], mode, vocab_size)


@ROW_MODES
def test_sampled_tokens_outside_the_rows_come_back_exactly(mode: CodecMode) -> None:
    trace = build_trace(
        completion_token_ids=np.full(24, VOCAB_SIZE - 1, np.int32),
        sampled_logprobs=np.linspace(-40, -9, 24, dtype=np.float32),
    )
    (decoded,) = decode_block(encode_block([trace], codec=mode, vocab_size=VOCAB_SIZE))
    outside = ~(trace.top_k.token_ids == VOCAB_SIZE - 1).any(axis=1)
    assert outside.sum() > 20
    np.testing.assert_array_equal(decoded.completion_token_ids, trace.completion_token_ids)
    np.testing.assert_array_equal(decoded.sampled_logprobs[outside], trace.sampled_logprobs[outside])


@ROW_MODES
def test_a_sampled_logprob_that_contradicts_its_entry_comes_back_exactly(mode: CodecMode) -> None:
    trace = build_rows([[-0.1, -3.0]], [[5, 7]], sampled_logprobs=np.array([-0.7], np.float32))
    (decoded,) = decode_block(encode_block([trace], codec=mode, vocab_size=VOCAB_SIZE))
    assert_same_bits(decoded.sampled_logprobs, trace.sampled_logprobs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exact_mode_keeps_every_bit_of_a_teachers_rows(dtype: str) -> None:
    traces = [build_trace(seed, positions=70, k=64, dtype=dtype) for seed in range(3)]
    assert_round_trip(traces, "exact")


def test_exact_mode_keeps_every_bit_of_odd_floats() -> None:
    rows = np.array([[1.2e-4, 0.0, -0.0, -1e-45, -103.0, -9999.0, -3.4e38, -np.inf]], np.float32)
    top_k = TopK(np.arange(8, dtype=np.int32)[None] * (rows > -np.inf), rows, np.array([1e-45], np.float32))
    assert_round_trip([build_rows(rows, top_k.token_ids, top_k=top_k)], "exact")


@pytest.mark.parametrize("row", [[-0.0], [-0.0, 0.0], [0.0, -0.0, 0.0, -0.0, -1.0], [-0.0, -np.inf]])
def test_exact_mode_keeps_zeros_apart_from_negative_ones(row: list[float]) -> None:
    assert_round_trip([build_rows([row], [np.arange(len(row))])], "exact")


@pytest.mark.parametrize("draws", [1, 2, 50, 1 << 16])
def test_counts_of_draws_come_back(draws: int) -> None:
    traces = [build_sampled_trace(seed, draws=draws, positions=6) for seed in range(2)]
    if draws == 1 << 16:
        # All counts at once.
        counts = np.arange(1, 362)[::-1]
        traces = [
            build_rows([np.log(counts / draws)], [np.arange(361)], sampled_logprobs=np.zeros(1, np.float32))
        ]
    spec = CodecSpec("sampled", draws=draws)
    decoded = decode_block(encode_block(traces, codec=spec, vocab_size=VOCAB_SIZE))
    for actual, expected in zip(decoded, traces, strict=True):
        np.testing.assert_array_equal(actual.completion_token_ids, expected.completion_token_ids)
        assert_same_bits(actual.sampled_logprobs, expected.sampled_logprobs)
        (ids, logprobs), (ids_before, before) = in_order(actual.top_k), in_order(expected.top_k)
        np.testing.assert_array_equal(ids, ids_before)
        counts = np.exp(logprobs.astype(np.float64)) * draws
        np.testing.assert_allclose(counts, np.exp(before.astype(np.float64)) * draws, atol=0.01)
        np.testing.assert_allclose(counts, np.rint(counts), atol=0.01)


@MODES
def test_encoding_is_deterministic(mode: CodecMode) -> None:
    build = functools.partial(build_sampled_trace, draws=DRAWS) if mode == "sampled" else build_trace
    first, second = (
        encode_block([build(1), build(2)], codec=codec_of(mode), vocab_size=VOCAB_SIZE) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("mode", ["fine", "standard", "compact"])
def test_rows_on_a_grid_stay_where_they_are(mode: CodecMode) -> None:
    traces = [build_trace()]
    dictionary = train_dictionary([traces], codec=mode, vocab_size=VOCAB_SIZE)
    reader = DictionaryReader(lambda _: dictionary.encoded)

    def again(before: tuple[Trace, ...] | list[Trace]) -> tuple[Trace, ...]:
        block = encode_block(before, codec=mode, vocab_size=VOCAB_SIZE, dictionary=dictionary)
        return decode_block(block, dictionaries=reader)

    once = again(traces)
    (twice,) = again(once)
    np.testing.assert_array_equal(twice.top_k.logprobs, once[0].top_k.logprobs)
    np.testing.assert_array_equal(twice.sampled_logprobs, once[0].sampled_logprobs)


@ROW_MODES
def test_rare_entries_go_to_the_tail(mode: CodecMode) -> None:
    spec = CodecSpec(mode, min_probability=0.01)
    trace = build_trace(1, prompt_rows=True)
    (decoded,) = decode_block(encode_block([trace], codec=spec, vocab_size=VOCAB_SIZE))
    for (after, _), (before, _) in zip(parts(decoded), parts(trace), strict=True):
        likely = before.logprobs >= np.float32(np.log(0.01))
        likely[:, 0] = True
        assert 0 < likely.sum() < likely.size
        np.testing.assert_array_equal(np.isfinite(after.logprobs).sum(axis=1), likely.sum(axis=1))
        dropped = np.where(likely, 0, np.exp(before.logprobs.astype(np.float64))).sum(axis=1)
        np.testing.assert_allclose(after.tail_mass, before.tail_mass + dropped, rtol=0.3, atol=1e-3)


def test_metadata_comes_back_where_compression_gains_nothing() -> None:
    """Its size says whether it is compressed, so that a frame of the metadata's own size must not be."""
    rng = np.random.default_rng(3)
    same = 0
    for size in range(60, 320):
        text = "".join(map(chr, rng.integers(33, 126, size))) + "a" * int(rng.integers(20, 30))
        trace = build_rows([[-0.5]], [[3]], completion_text=text)
        metadata = write_metadata([trace])
        same += len(zstandard.ZstdCompressor(level=3, write_checksum=False).compress(metadata)) == len(
            metadata
        )
        assert_round_trip([trace], "exact")
    assert same


def test_threads_decode_side_by_side() -> None:
    """Compiled code runs without the interpreter's lock: what one thread works with, no other may touch."""
    blocks = [
        encode_block([build_trace(seed, positions=70, k=k)], codec="exact", vocab_size=VOCAB_SIZE)
        for seed, k in enumerate((1, 16, 512, 1))
    ]
    expected = [decode_rows(block).positions for block in blocks]

    def decode(index: int) -> bool:
        rows = decode_rows(blocks[index % 4]).positions
        right = expected[index % 4]
        return bool((rows.token_ids == right.token_ids).all() and (rows.logprobs == right.logprobs).all())

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(decode, range(200)))
