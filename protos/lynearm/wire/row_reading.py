"""The rows' part of a payload, read; nothing in it is trusted.

Shape legend: N = positions of a block, K = entries of the widest row, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import BUCKET_OF_RANK, LIST_PLACES
from lynearm.wire.blocks import MAX_BLOCK_ENTRIES
from lynearm.wire.code_tables import PLAIN_STEP_ENTRIES, CodeTables, NumberContext
from lynearm.wire.dictionaries import Dictionary, TokenOrder
from lynearm.wire.errors import CorruptBlockError, UnsupportedFormatError
from lynearm.wire.fields import ByteReader
from lynearm.wire.grids import MAX_BITS_LEVEL, MAX_GRID_LEVEL, Bits, Counts, Grid, LogitGrid, Scale
from lynearm.wire.logit_grids import PLAIN, logprobs_of
from lynearm.wire.number_kernels import LOOKAHEAD_BYTES
from lynearm.wire.number_stream import NumberStream
from lynearm.wire.positions import ROUNDING, Positions, first_previous_tokens
from lynearm.wire.row_kernels import RECENT_RING, read_rows
from lynearm.wire.row_layout import (
    FIRST_SHIFT,
    FOUR_LANES,
    KEPT_VARIES,
    LANES,
    ORDER_OF_DICTIONARY,
    OWN_TABLES,
    SAMPLED_APART,
    SCALE_OF_DICTIONARY,
    SHORT_TABLES,
    TAIL_DRAWS,
    TOP_OFFSET,
    USUAL_FIRST,
    expect_tails,
    predicted_tails,
    room_for_lists,
    unzigzag,
)
from lynearm.wire.row_scales import read_scale
from lynearm.wire.specs import MAX_TAIL_DRAWS, CodecMode
from lynearm.wire.tail_draws import find_kept_draw, read_draws
from lynearm.wire.traces import Float32Array, Int32Array
from lynearm.wire.value_kernels import look_up, pick_sampled
from lynearm.wire.write_kernels import MAX_ENTRY_BITS

BoolArray = npt.NDArray[np.bool_]
Uint8Array = npt.NDArray[np.uint8]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]

_OF_DICTIONARY = ORDER_OF_DICTIONARY | SCALE_OF_DICTIONARY


def read_positions(
    data: memoryview,
    lengths: Sequence[int],
    widths: Sequence[int],
    before: Sequence[int],
    *,
    mode: CodecMode,
    dictionary: Dictionary | None,
) -> tuple[Positions, int]:
    """The rows that `write_positions` wrote, and V.

    Args:
        data: Exactly the bytes of one call; nothing in them is trusted.
        lengths: Rows of each trace; N in all, and N · K is bounded by the caller.
        widths: Entries of each trace's rows at most; K is the largest.
        before: Last token before the rows of each trace, at most `MAX_VOCAB_SIZE`; −1 for none.
        mode: The block's mode, which the scale must suit.
        dictionary: The one that the block names.

    Raises:
        CorruptBlockError: if the bytes contradict each other, or end too early.
        UnsupportedFormatError: if they use what this reader does not know.
    """
    head = _read_head(ByteReader(data), mode, dictionary)
    numbers = NumberStream(head.padded_stream(max(widths, default=0)), int(head.ends[0]), head.tables)
    columns = _read_columns(numbers, head, lengths, widths)
    entries = _read_entries(numbers, head, columns, first_previous_tokens(lengths, before))
    positions = _read_values(numbers, head, columns, entries)
    if head.draws:
        positions = replace(positions, tail_draws=_read_tail_draws(numbers, head, positions))
    numbers.expect_end()
    return positions, head.vocab_size


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands before the streams, and where these are."""

    flags: int
    vocab_size: int
    scale: Scale
    tables: CodeTables
    order: TokenOrder
    body: memoryview
    """The streams."""
    ends: Uint64Array
    """Bit behind each stream's last byte: that of the numbers, and with four lanes those of the lanes."""
    draws: int
    """Tokens drawn from each row's tail."""

    @property
    def has_lanes(self) -> bool:
        """Whether lanes are streams; a single one lies in the numbers, before the tails."""
        return bool(self.flags & FOUR_LANES)

    @property
    def apart(self) -> bool:
        """Whether every sampled logprob is loose."""
        return bool(self.flags & SAMPLED_APART)

    def padded_stream(self, width: int) -> Uint8Array:
        """The streams, with room behind them for what a reader of such rows may look at too."""
        stream = np.zeros(len(self.body) + LOOKAHEAD_BYTES + width * MAX_ENTRY_BITS // 8, np.uint8)
        stream[: len(self.body)] = np.frombuffer(self.body, np.uint8)
        return stream


@dataclass(frozen=True, slots=True)
class _Columns:
    """The numbers before the tails; N rows of at most `width` entries."""

    width: int
    first_levels: Uint32Array
    kept: Uint32Array
    sampled_index: Uint32Array
    outside: Uint32Array
    """Ranks of the sampled tokens that are no entries."""
    loose: Float32Array
    """Sampled logprobs that no entry says."""
    first_logprobs: Float32Array | None
    """Of each row's first entry, where levels count from logits."""
    tops: Int32Array | None
    """The logits that they count from."""


@dataclass(frozen=True, slots=True)
class _Entries:
    token_ids: Int32Array
    levels: Uint32Array
    last_levels: Uint32Array
    sampled_ids: Int32Array


def _read_head(head: ByteReader, mode: CodecMode, dictionary: Dictionary | None) -> _Head:
    flags = head.byte()
    draws = _read_draw_count(head, mode) if flags & TAIL_DRAWS else 0
    if dictionary is None and (flags & _OF_DICTIONARY or not flags & OWN_TABLES):
        raise CorruptBlockError("the payload needs a dictionary, and the header names none")
    vocab_size, scale = read_scale(head, flags, mode, dictionary)
    tables, order = _read_tables(head, flags, vocab_size, dictionary)
    sizes = [head.varint() for _ in range(LANES)] if flags & FOUR_LANES else []
    body = head.rest()
    sizes.append(len(body) - sum(sizes))
    if sizes[-1] < 0:
        raise CorruptBlockError(f"streams of {sum(sizes[:-1])} bytes in {len(body)}")
    ends = np.array([8 * end for end in accumulate(sizes)], np.uint64)
    return _Head(flags, vocab_size, scale, tables, order, body, ends, draws)


def _read_draw_count(head: ByteReader, mode: CodecMode) -> int:
    draws = head.byte()
    if draws > MAX_TAIL_DRAWS:
        raise UnsupportedFormatError(
            f"{draws} draws from each tail are more than this reader knows: {MAX_TAIL_DRAWS}",
            "upgrade lynearm",
        )
    if draws == 0 or mode == "sampled":
        raise CorruptBlockError(f"a block in mode {mode!r} with {draws} draws from each tail")
    return draws


def _read_columns(
    numbers: NumberStream, head: _Head, lengths: Sequence[int], widths: Sequence[int]
) -> _Columns:
    count, number_bits, all_bits = sum(lengths), int(head.ends[0]), int(head.ends[-1])
    # Every row costs a bit at least: it proves that there are so many before anything grows with them.
    if count > number_bits:
        raise CorruptBlockError(f"{count} positions in {number_bits // 8} bytes")
    first_levels = numbers.read(NumberContext.LEVEL, count)
    kept = np.repeat(np.asarray(widths, np.uint32), lengths)
    if head.flags & KEPT_VARIES:
        limits, kept = kept, numbers.read_by_level(NumberContext.KEPT, first_levels)
        if (kept > limits).any():
            raise CorruptBlockError("a position keeps more entries than its trace has room for")
    entries, entry_bits = int(kept.sum(dtype=np.int64)), all_bits - (number_bits if head.has_lanes else 0)
    if entries > entry_bits:
        raise CorruptBlockError(f"{entries} entries in {entry_bits // 8} bytes")
    sampled_index = numbers.read_by_level(NumberContext.SAMPLED, first_levels)
    if (sampled_index > kept).any():
        raise CorruptBlockError("a sampled token points at an entry that is not there")
    outside = numbers.read(NumberContext.OUTSIDE, int((sampled_index == 0).sum()))
    if outside.size and int(outside.max()) >= head.vocab_size:
        raise CorruptBlockError(f"token rank {outside.max()} in a vocabulary of {head.vocab_size}")
    first_high = tops = first_logprobs = None
    if isinstance(head.scale, LogitGrid):
        first_high = USUAL_FIRST - unzigzag(numbers.read(NumberContext.FIRST, count))
        tops = _unpack_tops(numbers.read(NumberContext.LOGIT, count), head.scale.mantissa_bits)
    loose = numbers.read_fixed(count if head.apart else outside.size, 32).view(np.float32)
    if first_high is not None:
        low = numbers.read_fixed(count, FIRST_SHIFT)
        first_logprobs = ((first_high.astype(np.uint32) << FIRST_SHIFT) | low).view(np.float32)
    width = max(widths, default=0)
    return _Columns(width, first_levels, kept, sampled_index, outside, loose, first_logprobs, tops)


def _read_entries(
    numbers: NumberStream, head: _Head, columns: _Columns, first_previous: Int32Array
) -> _Entries:
    count, width = columns.kept.size, columns.width
    # An earlier row may be looked into as a list, which is longer than a narrow row.
    token_ids = np.empty(count * width + LIST_PLACES + 1, np.int32)[: count * width].reshape(count, width)
    entries = _Entries(
        token_ids, np.empty((count, width), np.uint32), np.empty(count, np.uint32), np.empty(count, np.int32)
    )
    tables, order, grows = head.tables, head.order, bool(head.flags & KEPT_VARIES)
    lane_bits = head.ends[:-1].copy() if head.has_lanes else np.array([numbers.bit], np.uint64)
    lane_ends = head.ends[1:] if head.has_lanes else head.ends
    whole = read_rows(
        numbers.stream,
        lane_bits,
        lane_ends.copy(),
        columns.kept,
        columns.first_levels,
        tables.step_table,
        *tables.step_states,
        PLAIN_STEP_ENTRIES,
        tables.number_table,
        tables.level_rule.step_shift,
        BUCKET_OF_RANK,
        order.token_of_rank,
        order.list_rows.copy(),
        order.lists,
        order.list_sizes,
        *room_for_lists(count if grows else 0),
        np.full(head.vocab_size if grows else 0, -1, np.int32),
        first_previous,
        columns.sampled_index,
        order.token_of_rank[columns.outside],
        _max_level(head.scale),
        np.empty(4 * width, np.uint32),
        np.empty(width, np.uint64),
        np.zeros(RECENT_RING, np.int32),
        entries.token_ids,
        entries.levels,
        entries.last_levels,
        entries.sampled_ids,
    )
    if not whole or (head.has_lanes and (lane_ends - lane_bits >= 8).any()):
        raise CorruptBlockError("the entries of the block's rows do not decode")
    if not head.has_lanes:
        numbers.move_to(int(lane_bits[0]))
    return entries


def _read_values(numbers: NumberStream, head: _Head, columns: _Columns, entries: _Entries) -> Positions:
    """Logprobs and tail masses, checked where nothing bounds them; overwrites the levels."""
    scale, rule, kept = head.scale, head.tables.level_rule, columns.kept
    levels, last_levels = entries.levels, entries.last_levels
    if isinstance(scale, Grid):
        logprobs, tail_mass = numbers.read_grid_values(scale, rule, levels, kept, last_levels)
    else:
        tail_contexts, _ = expect_tails(rule, scale, levels, kept, last_levels)
        tail_numbers = numbers.read_contexts(tail_contexts)
        logprobs = _from_levels(scale, levels, kept, last_levels, columns.first_logprobs, columns.tops)
        tail_mass = _tails(scale, tail_numbers, logprobs, kept)
    loose = columns.loose
    sampled_logprobs = loose if head.apart else _sampled_logprobs(columns.sampled_index, loose, logprobs)
    # What grids and counts say is in bounds; a stranger's exact numbers may be anything.
    exact = (loose, logprobs) if isinstance(scale, Bits | LogitGrid) else (loose,)
    if not all(_within(values, -np.inf, ROUNDING) for values in exact):
        raise CorruptBlockError(f"the block holds logprobs that are NaN or above {ROUNDING}")
    if not isinstance(scale, Grid) and not _within(tail_mass, -ROUNDING, 1 + ROUNDING):
        raise CorruptBlockError("the block holds tail masses that are NaN or outside 0..1")
    return Positions(kept, entries.token_ids, logprobs, tail_mass, entries.sampled_ids, sampled_logprobs)


def _read_tail_draws(numbers: NumberStream, head: _Head, rows: Positions) -> Int32Array:
    count = rows.kept.size
    if count * head.draws > MAX_BLOCK_ENTRIES:
        raise CorruptBlockError(f"{count} positions of {head.draws} draws are beyond any block")
    draws_ND = read_draws(numbers, count, head.draws, head.order.token_of_rank)
    row = find_kept_draw(draws_ND, rows.token_ids, rows.kept)
    if row >= 0:
        raise CorruptBlockError(f"a token drawn from the tail of position {row} is one that it keeps")
    return draws_ND


def _within(values: Float32Array, low: float, high: float) -> bool:
    """Whether all values are between two bounds; NaN is not."""
    with np.errstate(invalid="ignore"):
        return values.size == 0 or bool(values.min() >= low and values.max() <= high)


def _from_levels(
    scale: Bits | LogitGrid | Counts,
    levels: Uint32Array,
    kept: Uint32Array,
    last_levels: Uint32Array,
    first_N: Float32Array | None,
    tops: Int32Array | None,
) -> Float32Array:
    """Logprobs of levels, in the memory of the levels."""
    logprobs = levels.view(np.float32)
    if isinstance(scale, Bits):
        ranks_K: Uint32Array = np.arange(levels.shape[1], dtype=np.uint32)
        padding: BoolArray = np.greater_equal.outer(ranks_K, kept).T
        logprobs = scale.from_levels(np.where(padding, np.uint32(0xFF800000), levels))
    elif isinstance(scale, LogitGrid):
        assert first_N is not None
        assert tops is not None
        logprobs_of(scale.mantissa_bits, levels, first_N, tops, kept, logprobs)
    else:
        # Levels do not fall along a row, so that its last one is its highest.
        look_up(levels, kept, scale.table(int(last_levels.max(initial=0)) + 1), logprobs)
    return logprobs


def _max_level(scale: Scale) -> int:
    if isinstance(scale, Grid):
        return MAX_GRID_LEVEL
    return scale.draws - 1 if isinstance(scale, Counts) else MAX_BITS_LEVEL


def _tails(
    scale: Bits | LogitGrid | Counts, numbers: Uint32Array, logprobs: Float32Array, kept: Uint32Array
) -> Float32Array:
    predicted = predicted_tails(logprobs, kept, scale)
    away = unzigzag(numbers).astype(np.int32).view(np.uint32)
    return (predicted.view(np.uint32) + away).view(np.float32)


def _sampled_logprobs(
    sampled_index: Uint32Array, loose_logprobs: Float32Array, logprobs: Float32Array
) -> Float32Array:
    logprobs_N = np.empty(sampled_index.size, np.float32)
    pick_sampled(sampled_index, loose_logprobs, logprobs, logprobs_N)
    return logprobs_N


def _unpack_tops(numbers: Uint32Array, mantissa_bits: int) -> Int32Array:
    halves = (numbers.astype(np.float32) * np.float32(0.5)).view(np.uint32) >> (23 - mantissa_bits)
    places = numbers.astype(np.int64) - 4096 - TOP_OFFSET
    tops = np.where(numbers < 4096, halves.astype(np.int64), places)
    tops[numbers == 0] = 0
    if tops.size and np.abs(tops).max() >= 1 << (8 + mantissa_bits):
        raise CorruptBlockError("a top logit is no number")
    tops[numbers == 0] = PLAIN
    return tops.astype(np.int32)


def _read_tables(
    head: ByteReader, flags: int, vocab_size: int, dictionary: Dictionary | None
) -> tuple[CodeTables, TokenOrder]:
    order = TokenOrder.by_id(vocab_size)
    if flags & ORDER_OF_DICTIONARY and dictionary is not None:
        order = dictionary.order
    if flags & OWN_TABLES and flags & SHORT_TABLES:
        raise CorruptBlockError("the payload has tables of its own, and wants those for short blocks")
    if flags & OWN_TABLES:
        return CodeTables.from_bytes(head.take(head.varint())), order
    assert dictionary is not None
    if not flags & SHORT_TABLES:
        return dictionary.tables, order
    if dictionary.short_tables is None:
        raise CorruptBlockError("the payload needs tables for short blocks, and its dictionary has none")
    return dictionary.short_tables, order
