"""Columns with one element per completion position or per kept entry: the bulk of every block.

Token ids are written as ranks in a dictionary of the block's own, frequent ids first; entries lie
rank-major, that is, the most likely entry of every position, then the second of every position, and so
on, since entries of one rank resemble each other. In the standard mode the entries of one position are
sorted by (level, dictionary rank), both are sent as differences, and so the order inside a level
is not paid for.

Shape legend: N = positions of all traces, K = entries kept at most, E = entries kept in all,
V = vocabulary, D = ids in the dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.specs import CodecMode
from lynearm.wire.traces import Float32Array, Int32Array
from lynearm.wire.version1.columns import Column, ColumnReader
from lynearm.wire.version1.integers import Int64Array
from lynearm.wire.version1.quantise import MAX_LEVEL, from_levels

BoolArray = npt.NDArray[np.bool_]

_RANK_BITS = 20
"""Dictionary ranks are below 2^20, as token ids are."""

_NO_ENTRY = np.int64(MAX_LEVEL + 1)
"""Sorts behind every level."""


@dataclass(frozen=True, slots=True)
class Positions:
    """The completion positions of all traces of a block, one after the other."""

    kept: Int64Array
    """How many entries of each row are entries and not padding, shape [N]."""
    token_ids: Int32Array
    """Shape [N, K]."""
    logprobs: Float32Array
    """Shape [N, K]."""
    tail_mass: Float32Array
    sampled_ids: Int32Array
    sampled_logprobs: Float32Array


def read_positions(
    reader: ColumnReader,
    lengths: Sequence[int],
    widths: Sequence[int],
    *,
    mode: CodecMode,
    vocab_size: int,
) -> Positions:
    """The positions that `write_positions` wrote.

    Args:
        reader: Has the columns.
        lengths: Positions of each trace; N in all.
        widths: Entries per row of each trace; K is the largest.
        mode: As written.
        vocab_size: V.

    Raises:
        CorruptBlockError: if the columns contradict each other.
        UnsupportedFormatError: if an encoding is unknown.
    """
    # Read first: it proves that there are bytes for so many positions before anything grows with them.
    kept_N = reader.numbers(Column.KEPT, sum(lengths))
    if (kept_N > np.repeat(np.asarray(widths), lengths)).any():
        raise CorruptBlockError("a position keeps more entries than its trace has room for")
    kept_KN = _kept_mask(kept_N, max(widths))
    dictionary_D = _read_dictionary(reader, vocab_size)
    read = _read_exact if mode == "exact" else _read_standard
    ranks_KN, logprobs_KN, tail_mass_N = read(reader, kept_KN)
    ranks_E = ranks_KN[kept_KN]
    if ranks_E.size and int(ranks_E.max()) >= dictionary_D.size:
        raise CorruptBlockError(f"an entry points behind the {dictionary_D.size} ids of the dictionary")
    token_ids_KN = np.zeros(kept_KN.shape, np.int32)
    token_ids_KN[kept_KN] = dictionary_D[ranks_E]
    token_ids_NK = np.ascontiguousarray(token_ids_KN.T)
    logprobs_NK = np.ascontiguousarray(logprobs_KN.T)
    sampled_ids_N, sampled_logprobs_N = _read_sampled(reader, kept_N, token_ids_NK, logprobs_NK, vocab_size)
    return Positions(kept_N, token_ids_NK, logprobs_NK, tail_mass_N, sampled_ids_N, sampled_logprobs_N)


def _kept_mask(kept_N: Int64Array, width: int) -> BoolArray:
    return np.arange(width)[:, None] < kept_N[None, :]


def _spread(values_E: Int64Array, kept_KN: BoolArray) -> Int64Array:
    spread_KN = np.zeros(kept_KN.shape, np.int64)
    spread_KN[kept_KN] = values_E
    return spread_KN


def _read_exact(reader: ColumnReader, kept_KN: BoolArray) -> tuple[Int64Array, Float32Array, Float32Array]:
    """Ranks, logprobs and tail mass."""
    entry_count = int(kept_KN.sum())
    logprobs_KN = np.full(kept_KN.shape, -np.inf, np.float32)
    logprobs_KN[kept_KN] = reader.floats(Column.ENTRY_LOGPROBS, entry_count)
    ranks_KN = _spread(reader.numbers(Column.ENTRY_TOKENS, entry_count), kept_KN)
    return ranks_KN, logprobs_KN, reader.floats(Column.TAIL_MASS, kept_KN.shape[1])


def _read_standard(reader: ColumnReader, kept_KN: BoolArray) -> tuple[Int64Array, Float32Array, Float32Array]:
    """Ranks, logprobs and tail mass."""
    entry_count = int(kept_KN.sum())
    steps_KN = _spread(reader.numbers(Column.ENTRY_LOGPROBS, entry_count), kept_KN)
    levels_KN = _check_levels(steps_KN.cumsum(axis=0))
    logprobs_KN = np.where(kept_KN, from_levels(levels_KN), np.float32(-np.inf))
    gaps_KN = _spread(reader.numbers(Column.ENTRY_TOKENS, entry_count), kept_KN)
    ranks_KN = _sum_inside_levels(gaps_KN, _starts_level(steps_KN))
    return ranks_KN, logprobs_KN, _tail_from_levels(reader.numbers(Column.TAIL_MASS, kept_KN.shape[1]))


def _read_dictionary(reader: ColumnReader, vocab_size: int) -> Int64Array:
    for column in (Column.DICTIONARY_SIZES, Column.DICTIONARY_TOKENS):
        if reader.count(column) > vocab_size:
            raise CorruptBlockError(f"a dictionary of {reader.count(column)} for {vocab_size} tokens")
    sizes = reader.numbers(Column.DICTIONARY_SIZES, reader.count(Column.DICTIONARY_SIZES))
    gaps_D = reader.numbers(Column.DICTIONARY_TOKENS, reader.count(Column.DICTIONARY_TOKENS))
    if int(sizes.sum()) != gaps_D.size or (sizes == 0).any():
        raise CorruptBlockError(f"dictionary groups of {sizes.sum()} ids in all, expected {gaps_D.size}")
    starts_D = np.zeros(gaps_D.size, np.bool_)
    starts_D[sizes.cumsum() - sizes] = True
    ids_D = _sum_inside_levels(gaps_D[:, None], starts_D[:, None])[:, 0]
    if ids_D.size and int(ids_D.max()) >= vocab_size:
        raise CorruptBlockError(f"token id {ids_D.max()} in a vocabulary of {vocab_size}")
    return ids_D


def _starts_level(steps_KN: Int64Array) -> BoolArray:
    """Where an entry opens a level of its row: the first one, and whenever the level changes."""
    starts_KN: BoolArray = steps_KN != 0
    starts_KN[:1] = True
    return starts_KN


def _sum_inside_levels(gaps: Int64Array, starts: BoolArray) -> Int64Array:
    """Running sums down axis 0 that begin anew at every start."""
    sums: Int64Array = gaps.cumsum(axis=0)
    # The sum before each start; gaps are not negative, so the latest start's is also the largest.
    before = np.where(starts, sums - gaps, 0)
    latest: Int64Array = np.maximum.accumulate(before, axis=0)
    return sums - latest


def _check_levels(levels: Int64Array) -> Int64Array:
    if levels.size and int(levels.max()) > MAX_LEVEL:
        raise CorruptBlockError(f"level {levels.max()} is above {MAX_LEVEL}")
    return levels


def _tail_from_levels(codes_N: Int64Array) -> Float32Array:
    levels_N = _check_levels(np.maximum(codes_N - 1, 0))
    return np.where(codes_N > 0, np.exp(from_levels(levels_N)), np.float32(0))


def _read_sampled(
    reader: ColumnReader,
    kept_N: Int64Array,
    token_ids_NK: Int32Array,
    logprobs_NK: Float32Array,
    vocab_size: int,
) -> tuple[Int32Array, Float32Array]:
    ranks_N = reader.numbers(Column.SAMPLED_RANKS, kept_N.size)
    if (ranks_N > kept_N).any():
        raise CorruptBlockError("a sampled token points at an entry that is not there")
    inside_N = ranks_N > 0
    outside_count = int(kept_N.size - inside_N.sum())
    ids_N = np.empty(kept_N.size, np.int32)
    logprobs_N = np.empty(kept_N.size, np.float32)
    rows, entries = np.flatnonzero(inside_N), ranks_N[inside_N] - 1
    ids_N[rows] = token_ids_NK[rows, entries]
    logprobs_N[rows] = logprobs_NK[rows, entries]
    ids_N[~inside_N] = reader.tokens(Column.OUTSIDE_TOKENS, outside_count, vocab_size)
    logprobs_N[~inside_N] = reader.floats(Column.OUTSIDE_LOGPROBS, outside_count)
    return ids_N, logprobs_N
