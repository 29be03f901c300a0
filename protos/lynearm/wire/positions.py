"""The distributions of a block: one row for each position, and the bits in which they travel.

A row is the kept entries, the mass outside them, and the token that was sampled. Rows go through three
steps: logprobs become levels (`lynearm.wire.grids`), tokens become token codes and entries symbols
(`lynearm.wire.alphabet`), symbols become bits (`lynearm.wire.prefix_codes`). docs/format.md specifies what
comes out.

Shape legend: N = positions of a block, K = entries of the widest row, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import (
    BUCKET_OF_RANK,
    GROWN_PLACES,
    LIST_PLACES,
    LONG_STEP_CONTEXTS,
    number_symbols,
)
from lynearm.wire.code_tables import (
    PLAIN_STEP_ENTRIES,
    CodeTables,
    LevelRule,
    NumberContext,
    SymbolCounts,
    build_tables,
)
from lynearm.wire.dictionaries import Dictionary, TokenOrder
from lynearm.wire.errors import CodecError, CorruptBlockError, UnsupportedFormatError
from lynearm.wire.fields import ByteReader, varint
from lynearm.wire.grids import (
    GRID_LAWS,
    MAX_BITS_LEVEL,
    MAX_GRID_LEVEL,
    Bits,
    Counts,
    Grid,
    LogitGrid,
    Scale,
    choose_grid,
)
from lynearm.wire.list_kernels import MAX_GROWN_LISTS
from lynearm.wire.logit_grids import PLAIN, LogitRows, find_logit_grid, logprobs_of
from lynearm.wire.number_kernels import LOOKAHEAD_BYTES, read_fixed, read_numbers, read_numbers_by_level
from lynearm.wire.row_kernels import RECENT_RING, read_rows
from lynearm.wire.specs import MAX_VOCAB_SIZE, CodecMode
from lynearm.wire.token_kernels import AS_SAMPLED, assign_token_codes
from lynearm.wire.traces import Float32Array, Int32Array
from lynearm.wire.value_kernels import foresee_tails, look_up, pick_sampled, predict_tails, read_grid_values
from lynearm.wire.write_kernels import MAX_ENTRY_BITS, name_entries, write_fixed, write_numbers, write_rows

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]
Uint16Array = npt.NDArray[np.uint16]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]

_SCALE_GRID, _SCALE_BITS, _SCALE_BF16, _SCALE_FP16, _SCALE_COUNTS = range(5)

_OWN_TABLES = 1
_KEPT_VARIES = 2
_SAMPLED_APART = 4
_FOUR_LANES = 8
_ORDER_OF_DICTIONARY = 16
_SCALE_OF_DICTIONARY = 32
_SHORT_TABLES = 64
_KNOWN_FLAGS = 127
_OF_DICTIONARY = _ORDER_OF_DICTIONARY | _SCALE_OF_DICTIONARY

_LANES: Final = 4
_MIN_LANE_ROWS = 64
"""Below it, one lane: the sizes of the others would cost more than they save in time."""

_MOST_SHORT_ROWS = 512
"""Blocks of more rows do not use the codes for short ones, which are the best ones for longer blocks now and
then, but take four times the memory, and so the time, to read."""

_FIRST_SHIFT = 23
"""Logprobs of first entries: sign and exponent as a number, the mantissa as it is."""

_USUAL_FIRST = 383
"""Sign and exponent of −1 to −2, from which the number counts."""

_BINARY_DIGITS: Uint8Array = np.array([level.bit_length() for level in range(65)], np.uint8)
"""Of the levels up to 64, which has as many as any context tells apart."""

_NO_MASSES: Int64Array = np.empty(0, np.int64)
_NO_MASSES.setflags(write=False)

_NEGATIVE_ZERO = np.uint32(1 << 31)

_TOP_OFFSET = 1 << 20
ROUNDING = 1e-2
"""How far a float32 log-softmax may put a logprob above 0, or a mass outside [0, 1]; measured: 2e-4."""

_BLOCK_KL_SLACK = 2.0
"""A block may exceed its mode's bound this much on its dictionary's grid: the bound is for the stream."""


@dataclass(frozen=True, slots=True)
class Positions:
    """The rows of a block, one after the other."""

    kept: Uint32Array
    """How many entries of each row are entries and not padding, shape [N]."""
    token_ids: Int32Array
    """Shape [N, K]; 0 where padded."""
    logprobs: Float32Array
    """Shape [N, K]; −inf where padded."""
    tail_mass: Float32Array
    """Shape [N]."""
    sampled_ids: Int32Array
    """Shape [N]."""
    sampled_logprobs: Float32Array
    """Shape [N]."""

    def select(self, rows: slice) -> Positions:
        """Some of the rows, in the memory of these."""
        parts = {field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)}
        return Positions(**parts)


@dataclass(frozen=True, slots=True)
class _Column:
    """Numbers of one kind, one after the other."""

    contexts: Uint8Array
    numbers: Uint32Array


@dataclass(frozen=True, slots=True)
class NamedRows:
    """Rows whose entries have symbols: all that is left is to choose codes."""

    scale: Scale
    kept: Uint32Array
    levels: Uint32Array
    symbols: Uint16Array
    open_bits: Uint32Array
    columns: tuple[_Column, ...]
    """In the order of the stream; the tail masses are the last."""
    fixed: tuple[tuple[Uint32Array, int], ...]
    """Numbers that are written as they are, and their widths in bits."""
    flags: int
    counts: SymbolCounts
    level_rule: LevelRule

    @property
    def fixed_width(self) -> bool:
        """Whether every row keeps as many entries as its trace allows."""
        return not self.flags & _KEPT_VARIES


def name_rows(
    positions: Positions,
    widths: Sequence[int],
    lengths: Sequence[int],
    first_previous: Int32Array,
    *,
    mode: CodecMode,
    draws: int,
    order: TokenOrder,
    dictionary: Dictionary | None,
    grid: Grid | None = None,
) -> NamedRows:
    """Levels, token codes and symbols of some rows.

    Args:
        positions: Rows sorted descending; ids below V.
        widths: Largest number of entries of each trace.
        lengths: Rows of each trace.
        first_previous: From `first_previous_tokens`.
        mode: How logprobs become levels.
        draws: Draws a row in "sampled" mode.
        order: The vocabulary's order.
        dictionary: Whose grid and tail rule to prefer.
        grid: To be used whatever it adds; None chooses one.

    Raises:
        CodecError: if a row names one token twice; the message gives its number.
    """
    if mode == "exact":
        positions = _order_zeros(positions)
    kept = positions.kept
    scale, levels, logit_rows = _to_levels(positions, mode, draws, dictionary, grid)
    token_ids = positions.token_ids.copy()
    codes = np.empty(levels.shape, np.uint32)
    sampled_index = np.empty(kept.size, np.uint32)
    varies = bool((kept != np.repeat(np.asarray(widths, np.uint32), lengths)).any())
    double = assign_token_codes(
        levels,
        token_ids,
        kept,
        order.rank_of_token,
        order.list_rows.copy(),
        order.lists,
        order.list_sizes,
        *_grown_lists(kept.size if varies else 0),
        np.where(first_previous == AS_SAMPLED, np.roll(positions.sampled_ids, 1), first_previous),
        positions.sampled_ids,
        np.empty((order.rank_of_token.size, 2), np.uint32),
        codes,
        sampled_index,
    )
    if double >= 0:
        raise CodecError(f"position {double} of the block names one token twice")
    counts = SymbolCounts.zeros()
    symbols = np.empty(levels.shape, np.uint16)
    open_bits = np.empty(levels.shape, np.uint32)
    last_levels = _last_levels(levels, kept)
    tail_levels = _tail_levels(positions, scale)
    rule = LevelRule.fit(last_levels, tail_levels) if dictionary is None else dictionary.tables.level_rule
    long_steps = counts.numbers[:LONG_STEP_CONTEXTS]
    name_entries(
        levels, codes, kept, BUCKET_OF_RANK, rule.step_shift, symbols, open_bits, counts.steps, long_steps
    )

    apart = isinstance(scale, Counts)
    inside = sampled_index > 0
    if not apart:
        inside &= _sampled_agree(positions, scale, levels, sampled_index)
        sampled_index = np.where(inside, sampled_index, 0).astype(np.uint32)
    first_levels = _first_levels(levels, kept)
    level_contexts = _level_contexts(first_levels)
    columns = [
        _column(NumberContext.LEVEL, first_levels),
        _Column(
            NumberContext.KEPT + level_contexts if varies else level_contexts[:0],
            kept if varies else kept[:0],
        ),
        _Column(NumberContext.SAMPLED + level_contexts, sampled_index),
        _column(NumberContext.OUTSIDE, order.rank_of_token[positions.sampled_ids[sampled_index == 0]]),
    ]
    loose = positions.sampled_logprobs if apart else positions.sampled_logprobs[~inside]
    fixed = [(loose.view(np.uint32), 32)]
    if logit_rows is not None:
        first_bits = logit_rows.first_N.view(np.uint32)
        columns += [
            _column(
                NumberContext.FIRST, _zigzag(_USUAL_FIRST - (first_bits >> _FIRST_SHIFT).astype(np.int64))
            ),
            _column(NumberContext.LOGIT, _pack_tops(logit_rows)),
        ]
        fixed.append((first_bits & np.uint32((1 << _FIRST_SHIFT) - 1), _FIRST_SHIFT))
    tail_contexts, expected = _foresee_tails(rule, scale, levels, kept, last_levels)
    columns.append(_Column(tail_contexts, _tail_numbers(positions, scale, tail_levels, expected)))
    for column in columns:
        np.add.at(counts.numbers, (column.contexts, number_symbols(column.numbers)), 1)
    return NamedRows(
        scale=scale,
        kept=kept,
        levels=levels,
        symbols=symbols,
        open_bits=open_bits,
        columns=tuple(columns),
        fixed=tuple(fixed),
        flags=(_KEPT_VARIES if varies else 0) | (_SAMPLED_APART if apart else 0),
        counts=counts,
        level_rule=rule,
    )


def first_previous_tokens(lengths: Sequence[int], before: Sequence[int]) -> Int32Array:
    """What stands before each row: a token for the first of a trace, and the sampled one before otherwise.

    Args:
        lengths: Rows of each trace.
        before: Last token before the rows of each trace; −1 for none.

    Returns:
        Shape [N]: a token, −1, or `AS_SAMPLED`.
    """
    previous_N = np.full(sum(lengths), AS_SAMPLED, np.int32)
    start = 0
    for length, token in zip(lengths, before, strict=True):
        if length:
            previous_N[start] = token
        start += length
    return previous_N


def write_positions(rows: NamedRows, *, vocab_size: int, dictionary: Dictionary | None) -> bytes:
    """The rows' part of a payload.

    Args:
        rows: From `name_rows`, with this dictionary.
        vocab_size: V.
        dictionary: Whose codes are used where own ones would cost more.
    """
    tables, encoded_tables = _choose_tables(rows, dictionary)
    four_lanes = rows.kept.size >= _MIN_LANE_ROWS
    flags = rows.flags | (_OWN_TABLES if encoded_tables else 0) | (_FOUR_LANES if four_lanes else 0)
    flags |= _SHORT_TABLES if dictionary is not None and tables is dictionary.short_tables else 0
    known_scale = dictionary is not None and rows.scale == dictionary.grid
    flags |= _ORDER_OF_DICTIONARY if dictionary is not None else 0
    flags |= _SCALE_OF_DICTIONARY if known_scale else 0
    entry_bits = int(rows.kept.sum(dtype=np.int64)) * MAX_ENTRY_BITS
    number_bits = sum(column.numbers.size for column in rows.columns) * 43
    fixed_bits = sum(numbers.size * width for numbers, width in rows.fixed)
    out = np.empty((entry_bits + number_bits + fixed_bits) // 8 + 64, np.uint8)
    bit = _write_columns(out, rows, tables)
    if four_lanes:
        ends = [_bytes_of(_write_tails(out, bit, rows, tables))]
        for lane in range(_LANES):
            ends.append(_bytes_of(_write_lane(out, 8 * ends[-1], rows, tables, lane, _LANES)))
    else:
        ends = [_bytes_of(_write_tails(out, _write_lane(out, bit, rows, tables, 0, 1), rows, tables))]
    sizes = np.diff(ends, prepend=0).tolist()
    head = [
        bytes((flags,)),
        b"" if known_scale else varint(vocab_size) + _write_scale(rows.scale),
        varint(len(encoded_tables)) + encoded_tables if encoded_tables else b"",
        *(varint(size) for size in sizes[:-1]),
    ]
    return b"".join(head) + out[: ends[-1]].tobytes()


def _write_columns(out: Uint8Array, rows: NamedRows, tables: CodeTables) -> int:
    """Begin with all columns but the tails; the bit behind them."""
    bit = 0
    for column in rows.columns[:-1]:
        bit = write_numbers(out, bit, column.numbers, column.contexts, tables.number_codes)
    for numbers, width in rows.fixed:
        bit = write_fixed(out, bit, numbers, width)
    return bit


def _write_tails(out: Uint8Array, bit: int, rows: NamedRows, tables: CodeTables) -> int:
    tails = rows.columns[-1]
    return write_numbers(out, bit, tails.numbers, tails.contexts, tables.number_codes)


def _write_lane(out: Uint8Array, bit: int, rows: NamedRows, tables: CodeTables, lane: int, lanes: int) -> int:
    return write_rows(
        out,
        bit,
        lane,
        lanes,
        rows.levels,
        rows.symbols,
        rows.open_bits,
        rows.kept,
        tables.level_rule.step_shift,
        tables.step_codes,
        tables.number_codes[:LONG_STEP_CONTEXTS],
    )


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
    head = ByteReader(data)
    flags = head.byte()
    if flags & ~_KNOWN_FLAGS:
        raise UnsupportedFormatError(f"flags {flags:#x} are not known to this reader", "upgrade lynearm")
    if dictionary is None and (flags & _OF_DICTIONARY or not flags & _OWN_TABLES):
        raise CorruptBlockError("the payload needs a dictionary, and the header names none")
    vocab_size, scale = _read_scale(head, flags, mode, dictionary)
    tables, order = _read_tables(head, flags, vocab_size, dictionary)
    four_lanes = bool(flags & _FOUR_LANES)
    sizes = [head.varint() for _ in range(_LANES)] if four_lanes else []
    body = head.rest()
    sizes.append(len(body) - sum(sizes))
    count = sum(lengths)
    # Every row costs a bit at least: it proves that there are so many before anything grows with them.
    if sizes[-1] < 0 or count > sizes[0] * 8:
        raise CorruptBlockError(f"{count} positions in {len(body)} bytes")
    width = max(widths, default=0)
    padding = LOOKAHEAD_BYTES + width * MAX_ENTRY_BITS // 8
    stream = np.zeros(len(body) + padding, np.uint8)
    stream[: len(body)] = np.frombuffer(body, np.uint8)
    ends = np.array([8 * end for end in accumulate(sizes)], np.uint64)
    numbers = _NumberStream(stream, int(ends[0]), tables)

    first_levels = numbers.read(NumberContext.LEVEL, count)
    kept = np.repeat(np.asarray(widths, np.uint32), lengths)
    if flags & _KEPT_VARIES:
        limits, kept = kept, numbers.read_by_level(NumberContext.KEPT, first_levels)
        if (kept > limits).any():
            raise CorruptBlockError("a position keeps more entries than its trace has room for")
    entries, entry_bytes = int(kept.sum(dtype=np.int64)), sum(sizes[1:]) if four_lanes else len(body)
    if entries > entry_bytes * 8:
        raise CorruptBlockError(f"{entries} entries in {entry_bytes} bytes")
    sampled_index = numbers.read_by_level(NumberContext.SAMPLED, first_levels)
    if (sampled_index > kept).any():
        raise CorruptBlockError("a sampled token points at an entry that is not there")
    outside = numbers.read(NumberContext.OUTSIDE, int((sampled_index == 0).sum()))
    if outside.size and int(outside.max()) >= vocab_size:
        raise CorruptBlockError(f"token rank {outside.max()} in a vocabulary of {vocab_size}")
    first_high = tops = None
    if isinstance(scale, LogitGrid):
        first_high = _USUAL_FIRST - _unzigzag(numbers.read(NumberContext.FIRST, count))
        tops = _unpack_tops(numbers.read(NumberContext.LOGIT, count), scale.mantissa_bits)
    apart = bool(flags & _SAMPLED_APART)
    loose = numbers.read_fixed(count if apart else outside.size, 32).view(np.float32)
    first_N: Float32Array | None = None
    if first_high is not None:
        low = numbers.read_fixed(count, _FIRST_SHIFT)
        first_N = ((first_high.astype(np.uint32) << _FIRST_SHIFT) | low).view(np.float32)

    # An earlier row may be looked into as a list, which is longer than a narrow row.
    token_ids = np.empty(count * width + LIST_PLACES + 1, np.int32)[: count * width].reshape(count, width)
    levels = np.empty((count, width), np.uint32)
    last_levels = np.empty(count, np.uint32)
    sampled_ids = np.empty(count, np.int32)
    # One lane lies in the number stream, before the tails.
    lane_bits = ends[:-1].copy() if four_lanes else np.array([numbers.bit], np.uint64)
    lane_ends = ends[1:].copy() if four_lanes else ends
    whole = read_rows(
        stream,
        lane_bits,
        lane_ends,
        kept,
        first_levels,
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
        *_grown_lists(count if flags & _KEPT_VARIES else 0),
        np.full(vocab_size if flags & _KEPT_VARIES else 0, -1, np.int32),
        first_previous_tokens(lengths, before),
        sampled_index,
        order.token_of_rank[outside],
        _max_level(scale),
        np.empty(4 * width, np.uint32),
        np.empty(width, np.uint64),
        np.zeros(RECENT_RING, np.int32),
        token_ids,
        levels,
        last_levels,
        sampled_ids,
    )
    if not whole or (four_lanes and ((lane_ends - lane_bits) >= 8).any()):
        raise CorruptBlockError("the entries of the block's rows do not decode")
    if not four_lanes:
        numbers.move_to(int(lane_bits[0]))
    if isinstance(scale, Grid):
        logprobs, tail_mass = numbers.read_grid_values(scale, tables.level_rule, levels, kept, last_levels)
    else:
        tail_contexts, _ = _foresee_tails(tables.level_rule, scale, levels, kept, last_levels)
        tail_numbers = numbers.read_contexts(tail_contexts)
        logprobs = _from_levels(scale, levels, kept, last_levels, first_N, tops)
        tail_mass = _tails(scale, tail_numbers, logprobs, kept)
    numbers.expect_end()
    sampled_logprobs = loose if apart else _sampled_logprobs(sampled_index, loose, logprobs)
    positions = Positions(kept, token_ids, logprobs, tail_mass, sampled_ids, sampled_logprobs)
    # What grids and counts say is in bounds; a stranger's exact numbers may be anything.
    exact = (loose, logprobs) if isinstance(scale, Bits | LogitGrid) else (loose,)
    if not all(_within(values, -np.inf, ROUNDING) for values in exact):
        raise CorruptBlockError(f"the block holds logprobs that are NaN or above {ROUNDING}")
    if not isinstance(scale, Grid) and not _within(tail_mass, -ROUNDING, 1 + ROUNDING):
        raise CorruptBlockError("the block holds tail masses that are NaN or outside 0..1")
    return positions, vocab_size


def _grown_lists(rows: int) -> tuple[Int32Array, Int32Array]:
    """Room for the lists that some rows grow, as `assign_token_codes` wants it."""
    count = min(2 * rows, MAX_GROWN_LISTS)
    return np.empty((count + 1, GROWN_PLACES), np.int32), np.empty(count, np.int32)


class _NumberStream:
    """The numbers of a block, read one column after the other."""

    def __init__(self, stream: Uint8Array, end_bit: int, tables: CodeTables) -> None:
        self._stream = stream
        self._end_bit = end_bit
        self._table = tables.number_table
        self._bit = 0

    @property
    def bit(self) -> int:
        """Where the next column begins."""
        return self._bit

    def move_to(self, bit: int) -> None:
        """Go on behind what others have read of the stream."""
        self._bit = bit

    def read(self, context: NumberContext, count: int) -> Uint32Array:
        return self.read_contexts(np.full(count, context, np.uint8))

    def read_contexts(self, contexts: Uint8Array) -> Uint32Array:
        numbers = np.empty(contexts.size, np.uint32)
        self._move(read_numbers(self._stream, self._bit, self._end_bit, contexts, self._table, numbers))
        return numbers

    def read_by_level(self, context: NumberContext, levels: Uint32Array) -> Uint32Array:
        """Numbers whose contexts begin at one, by the binary digits of a level each."""
        numbers = np.empty(levels.size, np.uint32)
        end = self._end_bit
        self._move(
            read_numbers_by_level(self._stream, self._bit, end, int(context), levels, self._table, numbers)
        )
        return numbers

    def read_grid_values(
        self, grid: Grid, rule: LevelRule, levels: Uint32Array, kept: Uint32Array, last_levels: Uint32Array
    ) -> tuple[Float32Array, Float32Array]:
        """Logprobs of the levels, in their memory, and the tail masses."""
        # Levels do not fall along a row, so that its last one is its highest.
        count = int(last_levels.max(initial=0)) + 1
        logprobs = levels.view(np.float32)
        tail_levels = np.empty(kept.size, np.int64)
        bit, lowest, highest = read_grid_values(
            self._stream,
            self._bit,
            self._end_bit,
            self._table,
            int(NumberContext.TAIL),
            levels,
            kept,
            last_levels,
            rule.numbers,
            grid.masses(count),
            grid.table(count),
            grid.scale,
            logprobs,
            tail_levels,
        )
        self._move(bit)
        if lowest < 0 or highest > MAX_GRID_LEVEL:
            raise CorruptBlockError("a tail mass is outside its grid")
        # No tail's level, −1, finds the last one's mass.
        masses = np.append(np.exp(grid.table(highest + 1)), np.float32(0))
        return logprobs, masses[tail_levels]

    def read_fixed(self, count: int, width: int) -> Uint32Array:
        if self._bit + count * width > self._end_bit:
            raise CorruptBlockError("the numbers of the block end too early")
        numbers = np.empty(count, np.uint32)
        self._move(read_fixed(self._stream, self._bit, self._end_bit, width, numbers))
        return numbers

    def expect_end(self) -> None:
        if (self._bit + 7) // 8 * 8 != self._end_bit:
            raise CorruptBlockError("bytes follow the numbers of the block")

    def _move(self, bit: int) -> None:
        if bit < 0:
            raise CorruptBlockError("the numbers of the block do not decode")
        self._bit = bit


def _within(values: Float32Array, low: float, high: float) -> bool:
    """Whether all values are between two bounds; NaN is not."""
    with np.errstate(invalid="ignore"):
        return values.size == 0 or bool(values.min() >= low and values.max() <= high)


def _bytes_of(bits: int) -> int:
    return (bits + 7) // 8


def _column(context: NumberContext, numbers: npt.NDArray[np.integer]) -> _Column:
    return _Column(np.full(numbers.size, context, np.uint8), numbers.astype(np.uint32))


def _to_levels(
    positions: Positions, mode: CodecMode, draws: int, dictionary: Dictionary | None, grid: Grid | None
) -> tuple[Scale, Uint32Array, LogitRows | None]:
    logprobs = positions.logprobs
    if mode == "exact":
        found = find_logit_grid(logprobs, positions.kept)
        if found is not None:
            return found.grid, found.levels_NK, found
        return Bits(), Bits().to_levels(logprobs), None
    if mode == "sampled":
        counts = Counts(draws)
        return counts, counts.to_levels(logprobs), None
    if grid is None and dictionary is not None and dictionary.grid is not None:
        grid = dictionary.grid
        bound = GRID_LAWS[mode].added_kl * len(logprobs) * _BLOCK_KL_SLACK
        if grid.added_kl(logprobs, positions.tail_mass) > bound:
            grid = None
    if grid is None:
        grid = choose_grid(mode, logprobs, positions.tail_mass)
    return grid, grid.to_levels(logprobs), None


def _order_zeros(positions: Positions) -> Positions:
    """Rows in which 0 stands before −0, as their levels do; they are equal, so that any order is sorted."""
    if not (positions.logprobs[:, :-1].view(np.uint32) == _NEGATIVE_ZERO).any():
        return positions
    order = np.argsort(Bits().to_levels(positions.logprobs), axis=1, kind="stable")
    return dataclasses.replace(
        positions,
        token_ids=np.take_along_axis(positions.token_ids, order, 1),
        logprobs=np.take_along_axis(positions.logprobs, order, 1),
    )


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


def _last_levels(levels: Uint32Array, kept: Uint32Array) -> Uint32Array:
    """Level of each row's last entry; 0 for a row without entries."""
    if levels.shape[1] == 0:
        return np.zeros(kept.size, np.uint32)
    last = levels[np.arange(kept.size), np.maximum(kept.astype(np.int64) - 1, 0)]
    return np.where(kept > 0, last, 0).astype(np.uint32)


def _first_levels(levels: Uint32Array, kept: Uint32Array) -> Uint32Array:
    """Level of each row's first entry; 0 for a row without entries."""
    if levels.shape[1] == 0:
        return np.zeros(kept.size, np.uint32)
    return np.where(kept > 0, levels[:, 0], 0).astype(np.uint32)


def _level_contexts(levels_N: Uint32Array) -> Uint8Array:
    """Binary digits of each level, at most 7."""
    contexts: Uint8Array = _BINARY_DIGITS[np.minimum(levels_N, len(_BINARY_DIGITS) - 1)]
    return contexts


def _foresee_tails(
    rule: LevelRule, scale: Scale, levels: Uint32Array, kept: Uint32Array, last_levels: Uint32Array
) -> tuple[Uint8Array, Int64Array]:
    """Number context of each row's tail mass, and the level that it is expected at."""
    contexts, expected = np.empty(kept.size, np.uint8), np.empty(kept.size, np.int64)
    masses, unit = _NO_MASSES, 1.0
    if isinstance(scale, Grid):
        masses, unit = scale.masses(int(last_levels.max(initial=0)) + 1), scale.scale
    foresee_tails(levels, kept, last_levels, rule.numbers, masses, unit, contexts, expected)
    contexts += np.uint8(NumberContext.TAIL)
    return contexts, expected


def _sampled_agree(
    positions: Positions, scale: Scale, levels: Uint32Array, sampled_index: Uint32Array
) -> BoolArray:
    """Whether the entry of the sampled token says the sampled logprob."""
    if levels.shape[1] == 0:
        return np.zeros(len(levels), np.bool_)
    rows = np.arange(len(levels))
    entries = np.maximum(sampled_index.astype(np.int64) - 1, 0)
    if isinstance(scale, Grid):
        agree: BoolArray = scale.to_levels(positions.sampled_logprobs) == levels[rows, entries]
        return agree
    # Entries change places only among equals, so that the sorted row still says the entry's logprob.
    entry_bits = positions.logprobs[rows, entries].view(np.uint32)
    same: BoolArray = entry_bits == positions.sampled_logprobs.view(np.uint32)
    return same


def _tail_levels(positions: Positions, scale: Scale) -> Uint32Array:
    """Level of each row's tail mass on a grid; 0 where there is no tail, or no grid."""
    tails = positions.tail_mass
    if not isinstance(scale, Grid):
        return np.zeros(tails.size, np.uint32)
    return scale.to_levels(np.log(np.where(tails > 0, tails, 1)))


def _tail_numbers(
    positions: Positions, scale: Scale, tail_levels: Uint32Array, expected: Int64Array
) -> Uint32Array:
    tails = positions.tail_mass
    if isinstance(scale, Grid):
        away = _zigzag(tail_levels.astype(np.int64) - expected).astype(np.int64)
        return np.where(tails > 0, away + 1, 0).astype(np.uint32)
    predicted = _predicted_tails(positions.logprobs, positions.kept, scale)
    return _zigzag((tails.view(np.uint32) - predicted.view(np.uint32)).view(np.int32).astype(np.int64))


def _tails(
    scale: Bits | LogitGrid | Counts, numbers: Uint32Array, logprobs: Float32Array, kept: Uint32Array
) -> Float32Array:
    predicted = _predicted_tails(logprobs, kept, scale)
    away = _unzigzag(numbers).astype(np.int32).view(np.uint32)
    return (predicted.view(np.uint32) + away).view(np.float32)


def _predicted_tails(logprobs: Float32Array, kept: Uint32Array, scale: Scale) -> Float32Array:
    predicted = np.zeros(kept.size, np.float32)
    if not isinstance(scale, Counts):
        predict_tails(logprobs, kept, predicted)
    return predicted


def _sampled_logprobs(
    sampled_index: Uint32Array, loose_logprobs: Float32Array, logprobs: Float32Array
) -> Float32Array:
    logprobs_N = np.empty(sampled_index.size, np.float32)
    pick_sampled(sampled_index, loose_logprobs, logprobs, logprobs_N)
    return logprobs_N


def _zigzag(values: Int64Array) -> Uint32Array:
    return np.where(values < 0, -2 * values - 1, 2 * values).astype(np.uint32)


def _unzigzag(numbers: npt.NDArray[np.integer]) -> Int64Array:
    values = numbers.astype(np.int64)
    return np.where(values & 1, -(values >> 1) - 1, values >> 1)


def _pack_tops(rows: LogitRows) -> Uint32Array:
    """Top logits in halves where they are such, which most are, else as places of the grid; 0: plain."""
    tops = rows.tops_N.astype(np.int64)
    shift = 23 - rows.grid.mantissa_bits
    values = (tops << shift).astype(np.uint32).view(np.float32)
    halves = np.where(tops > 0, values * 2, 0.0)
    is_half = (halves > 0) & (halves < 4096) & (halves == np.rint(halves))
    numbers = np.where(is_half, halves, 4096 + _TOP_OFFSET + tops)
    return np.where(tops == PLAIN, 0, numbers).astype(np.uint32)


def _unpack_tops(numbers: Uint32Array, mantissa_bits: int) -> Int32Array:
    halves = (numbers.astype(np.float32) * np.float32(0.5)).view(np.uint32) >> (23 - mantissa_bits)
    places = numbers.astype(np.int64) - 4096 - _TOP_OFFSET
    tops = np.where(numbers < 4096, halves.astype(np.int64), places)
    tops[numbers == 0] = 0
    if tops.size and np.abs(tops).max() >= 1 << (8 + mantissa_bits):
        raise CorruptBlockError("a top logit is no number")
    tops[numbers == 0] = PLAIN
    return tops.astype(np.int32)


def _choose_tables(rows: NamedRows, dictionary: Dictionary | None) -> tuple[CodeTables, bytes]:
    """The codes that make the block smallest, and their bytes; none for the dictionary's."""
    entries = int(rows.kept.sum(dtype=np.int64))
    best: tuple[CodeTables, bytes] | None = None
    best_bits = 0
    if dictionary is not None:
        best, best_bits = (dictionary.tables, b""), dictionary.tables.cost_bits(rows.counts)
        short = dictionary.short_tables
        # Rows were named by the level rule of the others.
        if short is not None and short.level_rule == rows.level_rule and rows.kept.size <= _MOST_SHORT_ROWS:
            bits = short.cost_bits(rows.counts)
            if bits < best_bits:
                best, best_bits = (short, b""), bits
    # More codes fit the rows better, and cost about 400 bits each to send.
    merges = (0, 1) if entries < 4096 else (1, 2)
    for merge in merges if best is None or entries >= 2048 else ():
        tables = build_tables(rows.counts, merge=merge, level_rule=rows.level_rule, with_escapes=False)
        encoded = tables.to_bytes()
        bits = tables.cost_bits(rows.counts) + 8 * len(encoded)
        if best is None or bits < best_bits:
            best, best_bits = (tables, encoded), bits
    assert best is not None
    return best


def _read_tables(
    head: ByteReader, flags: int, vocab_size: int, dictionary: Dictionary | None
) -> tuple[CodeTables, TokenOrder]:
    order = TokenOrder.by_id(vocab_size)
    if flags & _ORDER_OF_DICTIONARY and dictionary is not None:
        order = dictionary.order
    if flags & _OWN_TABLES and flags & _SHORT_TABLES:
        raise CorruptBlockError("the payload has tables of its own, and wants those for short blocks")
    if flags & _OWN_TABLES:
        return CodeTables.from_bytes(head.take(head.varint())), order
    assert dictionary is not None
    if not flags & _SHORT_TABLES:
        return dictionary.tables, order
    if dictionary.short_tables is None:
        raise CorruptBlockError("the payload needs tables for short blocks, and its dictionary has none")
    return dictionary.short_tables, order


def _write_scale(scale: Scale) -> bytes:
    if isinstance(scale, Grid):
        head = bytes((_SCALE_GRID,))
        return head + varint(scale.scale_millionths) + varint(scale.cap_hundred_thousandths)
    if isinstance(scale, Bits):
        return bytes((_SCALE_BITS,))
    if isinstance(scale, Counts):
        return bytes((_SCALE_COUNTS,)) + varint(scale.draws)
    return bytes((_SCALE_BF16 if scale.mantissa_bits == 7 else _SCALE_FP16,))


def _read_scale(
    head: ByteReader, flags: int, mode: CodecMode, dictionary: Dictionary | None
) -> tuple[int, Scale]:
    """V and the scale."""
    if flags & _SCALE_OF_DICTIONARY and dictionary is not None:
        if dictionary.grid is None or mode not in GRID_LAWS:
            raise CorruptBlockError(f"a block in mode {mode!r} has the scale of a dictionary without one")
        return dictionary.vocab_size, dictionary.grid
    vocab_size = head.varint()
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise CorruptBlockError(f"a vocabulary of {vocab_size}, expected 1 to {MAX_VOCAB_SIZE}")
    uses_dictionary = flags & _ORDER_OF_DICTIONARY or not flags & _OWN_TABLES
    if dictionary is not None and uses_dictionary and dictionary.vocab_size != vocab_size:
        raise CorruptBlockError(
            f"a payload over {vocab_size} tokens, a dictionary over {dictionary.vocab_size}"
        )
    kind = head.byte()
    scale: Scale
    if kind == _SCALE_GRID:
        scale = Grid(head.varint(), head.varint())
    elif kind == _SCALE_BITS:
        scale = Bits()
    elif kind in (_SCALE_BF16, _SCALE_FP16):
        scale = LogitGrid(7 if kind == _SCALE_BF16 else 10)
    elif kind == _SCALE_COUNTS:
        scale = Counts(head.varint())
    else:
        raise UnsupportedFormatError(f"scale {kind} is not known to this reader", "upgrade lynearm")
    suiting: dict[CodecMode, tuple[int, ...]] = {
        "exact": (_SCALE_BITS, _SCALE_BF16, _SCALE_FP16),
        "sampled": (_SCALE_COUNTS,),
    }
    if kind not in suiting.get(mode, (_SCALE_GRID,)):
        raise CorruptBlockError(f"a block in mode {mode!r} has scale {kind}")
    return vocab_size, scale
