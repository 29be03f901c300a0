"""What must come back of a trace: everything bit for bit, or within a grid's step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from wire.mutation import take_apart

from lynearm.wire.dictionaries import Dictionary
from lynearm.wire.fields import ByteReader
from lynearm.wire.grids import Grid
from lynearm.wire.row_layout import SCALE_OF_DICTIONARY
from lynearm.wire.traces import Float32Array, TopK, Trace


def assert_same_bits(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def assert_same_metadata(actual: Trace, expected: Trace) -> None:
    names = (
        "prompt_id",
        "finish_reason",
        "sample_index",
        "spans",
        "sampling",
        "completion_text",
        "stop_string",
    )
    for name in names:
        assert getattr(actual, name) == getattr(expected, name), name
    assert list(actual.tags.items()) == list(expected.tags.items())
    assert_same_bits(actual.prompt_token_ids, expected.prompt_token_ids)
    assert_same_bits(actual.completion_token_ids, expected.completion_token_ids)
    assert (actual.prompt_top_k is None) == (expected.prompt_top_k is None)


def parts(trace: Trace) -> list[tuple[TopK, Float32Array]]:
    """The rows of the completion, and of the prompt where it has some, with the sampled logprobs."""
    found = [(trace.top_k, trace.sampled_logprobs)]
    if trace.prompt_top_k is not None and trace.prompt_logprobs is not None:
        found.append((trace.prompt_top_k, trace.prompt_logprobs))
    return found


def assert_equal_exactly(actual: Trace, expected: Trace) -> None:
    """Bit for bit; entries of equal logprob may have changed places."""
    assert_same_metadata(actual, expected)
    for (top_k, sampled), (top_k_before, sampled_before) in zip(parts(actual), parts(expected), strict=True):
        assert_same_bits(sampled, sampled_before)
        assert_same_bits(top_k.tail_mass, top_k_before.tail_mass)
        for after, before in zip(in_order(top_k), in_order(top_k_before), strict=True):
            assert_same_bits(after, before)
        assert_same_draws(top_k, top_k_before)
        assert_sorted(top_k)


def in_order(top_k: TopK) -> tuple[npt.NDArray[np.int32], Float32Array]:
    """Ids and logprobs by (logprob's bits, id); ids under padding are 0."""
    ids = np.where(top_k.logprobs > -np.inf, top_k.token_ids, 0).astype(np.int32)
    order = np.lexsort((ids, top_k.logprobs.view(np.uint32)))
    return np.take_along_axis(ids, order, 1), np.take_along_axis(top_k.logprobs, order, 1)


def by_id(top_k: TopK) -> tuple[npt.NDArray[np.int32], Float32Array]:
    """Ids and logprobs, padding first and then by id."""
    padding = top_k.logprobs == -np.inf
    ids = np.where(padding, -1, top_k.token_ids).astype(np.int32)
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(top_k.logprobs, order, 1)


def assert_same_draws(actual: TopK, expected: TopK) -> None:
    """The same tokens were drawn from each tail, in whatever order."""
    assert (actual.tail_draws is None) == (expected.tail_draws is None)
    if actual.tail_draws is not None and expected.tail_draws is not None:
        assert_same_bits(np.sort(actual.tail_draws, axis=1), np.sort(expected.tail_draws, axis=1))


def assert_sorted(top_k: TopK) -> None:
    # Compared, not subtracted: −inf − −inf is NaN.
    assert (top_k.logprobs[:, 1:] <= top_k.logprobs[:, :-1]).all()
    assert not top_k.token_ids[top_k.logprobs == -np.inf].any()


def grid_of(block: bytes, dictionary: Dictionary | None = None) -> Grid:
    """The grid that a block says it is on."""
    pieces = take_apart(block)
    if pieces.flags & SCALE_OF_DICTIONARY:
        assert dictionary is not None
        assert dictionary.grid is not None
        return dictionary.grid
    reader = ByteReader(memoryview(pieces.scale))
    assert reader.byte() == 0
    return Grid(reader.varint(), reader.varint())


def largest_errors(grid: Grid, logprobs: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Half a step of the grid around each logprob, nats, and 2 % since float32 has its own steps."""
    table = grid.table().astype(np.float64)
    levels = grid.to_levels(logprobs).astype(np.int64)
    below = np.minimum(levels + 1, table.size - 1)
    widest: npt.NDArray[np.float64] = np.maximum(
        table[levels] - table[below], table[np.maximum(levels - 1, 0)] - table[levels]
    )
    return 0.51 * widest + 1e-6 * np.abs(logprobs) + 1e-6


def assert_close(actual: Trace, expected: Trace, grid: Grid) -> None:
    """Within half a step, entry by entry, matched by token id."""
    assert_same_metadata(actual, expected)
    # The codec goes no lower, whatever the grid: e^−30000 is 0 for any purpose.
    lowest = max(float(grid.table()[-1]), -3e4)
    for (top_k, sampled), (top_k_before, sampled_before) in zip(parts(actual), parts(expected), strict=True):
        assert_sorted(top_k)
        assert_same_draws(top_k, top_k_before)
        (ids, after), (ids_before, before) = by_id(top_k), by_id(top_k_before)
        np.testing.assert_array_equal(ids, ids_before)
        np.testing.assert_array_equal(np.isinf(after), np.isinf(before))
        kept = ~np.isinf(before)
        assert_near(after[kept], np.clip(before[kept], lowest, 0), grid)
        same = sampled.view(np.uint32) == sampled_before.view(np.uint32)
        assert_near(sampled[~same], np.clip(sampled_before[~same], lowest, 0), grid)
        tail, tail_before = top_k.tail_mass, top_k_before.tail_mass
        assert not tail[tail_before == 0].any()
        # Masses below every normal float may become 0.
        some = tail_before > 1e-37
        assert (tail[~some] <= 1e-36).all()
        assert_near(np.log(tail[some]), np.clip(np.log(tail_before[some]), lowest, 0), grid)


def assert_near(after: Float32Array, before: npt.NDArray[np.floating], grid: Grid) -> None:
    assert (np.abs(after.astype(np.float64) - before) <= largest_errors(grid, before)).all()


def added_kl(before: Trace, after: Trace) -> npt.NDArray[np.float64]:
    """KL over kept entries and tail of each completion row, nats; rows without mass add none."""
    p, q = (bucketed(trace.top_k) for trace in (before, after))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / q), 0.0)
    result: npt.NDArray[np.float64] = np.nan_to_num(terms).sum(axis=1)
    return result


def bucketed(top_k: TopK) -> npt.NDArray[np.float64]:
    """Probabilities of entries by id, and of the tail, normalised."""
    _, logprobs = by_id(top_k)
    kept = np.exp(logprobs.astype(np.float64))
    joined = np.concatenate([kept, top_k.tail_mass.astype(np.float64)[:, None]], axis=1)
    total: npt.NDArray[np.float64] = joined.sum(axis=1, keepdims=True)
    return joined / np.where(total > 0, total, 1)
