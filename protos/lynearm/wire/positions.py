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

from lynearm.wire.columns import Column, ColumnReader, ColumnWriter, token_encoding
from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.integers import Int64Array
from lynearm.wire.quantise import MAX_LEVEL, from_levels, to_levels
from lynearm.wire.specs import CodecMode
from lynearm.wire.traces import Float32Array, Int32Array

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


def write_positions(writer: ColumnWriter, positions: Positions, *, mode: CodecMode, vocab_size: int) -> None:
    """Add the columns of the positions.

    Args:
        writer: Takes the columns.
        positions: Sorted rows; ids of entries below `vocab_size`.
        mode: How logprobs and tail mass are written.
        vocab_size: V.
    """
    kept_KN = _kept_mask(positions.kept, positions.token_ids.shape[1])
    dictionary_D = _write_dictionary(writer, positions.token_ids.T[kept_KN], vocab_size)
    rank_of_V = np.full(vocab_size, -1, np.int64)
    rank_of_V[dictionary_D] = np.arange(dictionary_D.size)
    ranks_NK = rank_of_V[positions.token_ids]
    write = _write_exact if mode == "exact" else _write_standard
    values_NK, sampled_values_N, ranks_NK = write(writer, positions, ranks_NK, kept_KN)
    writer.numbers(Column.KEPT, positions.kept)
    matches_NK = ranks_NK == rank_of_V[positions.sampled_ids][:, None]
    matches_NK &= (values_NK == sampled_values_N[:, None]) & kept_KN.T
    _write_sampled(writer, positions, matches_NK, vocab_size)


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


def _write_exact(
    writer: ColumnWriter, positions: Positions, ranks_NK: Int64Array, kept_KN: BoolArray
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Write rows as they are; return bits of entries and of sampled logprobs, and ranks."""
    writer.floats(Column.TAIL_MASS, positions.tail_mass)
    writer.floats(Column.ENTRY_LOGPROBS, positions.logprobs.T[kept_KN])
    writer.numbers(Column.ENTRY_TOKENS, ranks_NK.T[kept_KN])
    bits_NK = positions.logprobs.view(np.int32).astype(np.int64)
    return bits_NK, positions.sampled_logprobs.view(np.int32).astype(np.int64), ranks_NK


def _write_standard(
    writer: ColumnWriter, positions: Positions, ranks_NK: Int64Array, kept_KN: BoolArray
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Write rows by level; return levels of entries and of sampled logprobs, and ranks, as sorted."""
    levels_NK, ranks_NK = _sort_by_level(to_levels(positions.logprobs), ranks_NK, kept_KN.T)
    steps_KN = np.diff(levels_NK.T, axis=0, prepend=0)
    gaps_KN = np.where(_starts_level(steps_KN), ranks_NK.T, np.diff(ranks_NK.T, axis=0, prepend=0))
    writer.numbers(Column.TAIL_MASS, _tail_to_levels(positions.tail_mass))
    writer.numbers(Column.ENTRY_LOGPROBS, steps_KN[kept_KN])
    writer.numbers(Column.ENTRY_TOKENS, gaps_KN[kept_KN])
    return levels_NK, to_levels(positions.sampled_logprobs), ranks_NK


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


def _write_dictionary(writer: ColumnWriter, token_ids_E: Int32Array, vocab_size: int) -> Int64Array:
    """Write the block's distinct ids, by floor(log2(frequency)) descending, then by id; return them."""
    counts_V = np.bincount(token_ids_E, minlength=vocab_size)
    ids_D = np.flatnonzero(counts_V)
    octaves_D = np.frexp(counts_V[ids_D].astype(np.float64))[1]
    order = np.argsort(-octaves_D, kind="stable")
    ids_D, octaves_D = ids_D[order], octaves_D[order]
    starts_D = np.diff(octaves_D, prepend=-1) != 0
    sizes = np.diff(np.flatnonzero(starts_D), append=ids_D.size)
    writer.numbers(Column.DICTIONARY_SIZES, sizes)
    writer.numbers(Column.DICTIONARY_TOKENS, np.where(starts_D, ids_D, np.diff(ids_D, prepend=0)))
    return ids_D


def _read_dictionary(reader: ColumnReader, vocab_size: int) -> Int64Array:
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


def _sort_by_level(
    levels_NK: Int64Array, ranks_NK: Int64Array, kept_NK: BoolArray
) -> tuple[Int64Array, Int64Array]:
    keys_NK = np.where(kept_NK, levels_NK, _NO_ENTRY) << _RANK_BITS | np.maximum(ranks_NK, 0)
    keys_NK.sort(axis=1)
    return keys_NK >> _RANK_BITS, keys_NK & ((1 << _RANK_BITS) - 1)


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


def _tail_to_levels(tail_mass_N: Float32Array) -> Int64Array:
    """0 for no tail at all, else one more than the level of its logarithm."""
    positive_N = tail_mass_N > 0
    logs_N = np.log(np.where(positive_N, tail_mass_N, 1).astype(np.float64))
    return np.where(positive_N, to_levels(logs_N) + 1, 0)


def _tail_from_levels(codes_N: Int64Array) -> Float32Array:
    levels_N = _check_levels(np.maximum(codes_N - 1, 0))
    return np.where(codes_N > 0, np.exp(from_levels(levels_N)), np.float32(0))


def _write_sampled(
    writer: ColumnWriter, positions: Positions, matches_NK: BoolArray, vocab_size: int
) -> None:
    """Name each sampled token by the entry that equals it; those without one are written out."""
    inside_N = matches_NK.any(axis=1)
    if matches_NK.shape[1]:
        ranks_N = np.where(inside_N, matches_NK.argmax(axis=1) + 1, 0)
    else:
        ranks_N = np.zeros(inside_N.size, np.int64)
    writer.numbers(Column.SAMPLED_RANKS, ranks_N)
    encoding = token_encoding(vocab_size)
    writer.words(Column.OUTSIDE_TOKENS, encoding, positions.sampled_ids[~inside_N])
    writer.floats(Column.OUTSIDE_LOGPROBS, positions.sampled_logprobs[~inside_N])


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
