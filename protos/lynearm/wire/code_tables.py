"""The prefix codes of a block or a dictionary: one for each context, as lengths, and ready to use."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import (
    ENTRY_STATES,
    GAP_CLASSES,
    LISTS_USED,
    LONG_STEP,
    LONG_STEP_CONTEXTS,
    NUMBER_BASES,
    NUMBER_ESCAPE,
    NUMBER_SYMBOLS,
    NUMBER_WIDTHS,
    RANK_BUCKETS,
    STATES_BEHIND,
    STEP_BASES,
    STEP_ESCAPE,
    STEP_SYMBOLS,
    STEP_WIDTHS,
    SYMBOL_BITS,
    TOKEN_OCTAVES,
    step_of_symbol,
)
from lynearm.wire.entry_kernels import STEP_ESCAPE_TOTAL
from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.jit import compiled
from lynearm.wire.prefix_codes import (
    MAX_CODE_LENGTH,
    canonical_codes,
    check_lengths,
    code_lengths,
    fill_tables,
)
from lynearm.wire.value_kernels import REST_OCTAVES, TAIL_STEPS

Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]

STEP_CONTEXTS: Final = RANK_BUCKETS * ENTRY_STATES
LAST_LEVEL_CONTEXTS: Final = TAIL_STEPS
REST_CONTEXTS: Final = REST_OCTAVES


class NumberContext(IntEnum):
    """What a number is; each has a code of its own."""

    LONG_STEPS = 0
    """And the following seven: by level of the entry before."""
    KEPT = 8
    """And the following seven: by level of the row's first entry, binary digits of it, at most 7."""
    SAMPLED = 16
    """And the following seven: likewise."""
    OUTSIDE = 24
    LEVEL = 25
    FIRST = 26
    LOGIT = 27
    TAIL = 28
    """And the following seven: by level of the row's last entry."""
    REST = 36
    """And the following seven: tails by what the row's entries leave over."""


NUMBER_CONTEXTS: Final = NumberContext.REST + REST_CONTEXTS


class DrawContext(IntEnum):
    """What the number of a draw from a tail is. Only tables for rows with such draws have these codes."""

    FIRST = 0
    """One more than the lowest rank of a row; 0 where nothing was drawn."""
    GAP = 1
    """A further one's distance from the one before."""


DRAW_CONTEXTS: Final = len(DrawContext)

GROUPS_OF_MERGE: Final[tuple[Uint8Array, ...]] = (
    np.zeros(STEP_CONTEXTS, np.uint8),
    np.repeat(np.arange(RANK_BUCKETS, dtype=np.uint8), ENTRY_STATES),
    (
        TOKEN_OCTAVES * np.arange(RANK_BUCKETS, dtype=np.uint8)[:, None]
        + np.arange(ENTRY_STATES, dtype=np.uint8) % TOKEN_OCTAVES
    ).ravel(),
    np.arange(STEP_CONTEXTS, dtype=np.uint8),
)
"""Which code each context of entries uses: one for all, one for each rank bucket, one for each bucket and
octave, or one for each context."""

FEW_CODES, MANY_CODES = 2, 3
"""Merge kinds of dictionaries. The second saves 1 per cent for four times the tables: where rows vary."""

_HEAD = struct.Struct("<BBIBhh")
"""Merge kind; level rule: step shift, origin, shift, base, slope."""

_REST_IS_ZERO = 12
_NUMBER_ESCAPE_BITS = 32


@dataclass(frozen=True)
class SymbolCounts:
    """How often each symbol occurs in each context."""

    steps: Int64Array
    """Shape [STEP_CONTEXTS, STEP_SYMBOLS + 1]."""
    numbers: Int64Array
    """Shape [NUMBER_CONTEXTS, NUMBER_SYMBOLS + 1]."""
    draws: Int64Array
    """Shape [DRAW_CONTEXTS, NUMBER_SYMBOLS + 1]."""

    @staticmethod
    def zeros() -> SymbolCounts:
        """Nothing counted yet."""
        return SymbolCounts(
            np.zeros((STEP_CONTEXTS, STEP_SYMBOLS + 1), np.int64),
            np.zeros((NUMBER_CONTEXTS, NUMBER_SYMBOLS + 1), np.int64),
            np.zeros((DRAW_CONTEXTS, NUMBER_SYMBOLS + 1), np.int64),
        )

    def add(self, other: SymbolCounts) -> None:
        """Count another's symbols too."""
        np.add(self.steps, other.steps, out=self.steps)
        np.add(self.numbers, other.numbers, out=self.numbers)
        np.add(self.draws, other.draws, out=self.draws)


@dataclass(frozen=True, slots=True)
class LevelRule:
    """How levels of a row's entries choose contexts, and foretell the level of its tail mass."""

    step_shift: int
    """2^step_shift levels share a context of long steps."""
    origin: int
    """Last levels up to this have tail step 0."""
    shift: int
    """2^shift last levels are one tail step; there are 8."""
    base: int
    """Tail level expected at tail step 0."""
    slope: int
    """How much that rises with every tail step."""

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """What foretells tail masses, as compiled code takes it."""
        return self.origin, self.shift, self.base, self.slope

    def steps(self, last_levels_N: Uint32Array) -> Int64Array:
        """Tail step of each row: clamp((last level − origin) >> shift, 0, 7)."""
        away = np.maximum(last_levels_N.astype(np.int64) - self.origin, 0) >> self.shift
        steps: Int64Array = np.minimum(away, LAST_LEVEL_CONTEXTS - 1)
        return steps

    @staticmethod
    def none() -> LevelRule:
        """The rule that tells nothing apart."""
        return LevelRule(0, 0, 0, 0, 0)

    @staticmethod
    def fit(last_levels_N: Uint32Array, tail_levels_N: Uint32Array) -> LevelRule:
        """The rule that suits some rows."""
        if last_levels_N.size == 0:
            return LevelRule.none()
        low, high = (int(level) for level in np.quantile(last_levels_N, (0.05, 0.95)))
        step_shift = (high // LONG_STEP_CONTEXTS).bit_length()
        rule = LevelRule(step_shift, low, max((high - low).bit_length() - 3, 0), 0, 0)
        steps = rule.steps(last_levels_N)
        first, last = steps <= steps.min(), steps >= steps.max()
        base = float(np.median(tail_levels_N[first]))
        rise = float(np.median(tail_levels_N[last])) - base
        slope = round(rise / max(int(steps.max() - steps.min()), 1))
        base = round(base - slope * int(steps.min()))
        bound = (1 << 15) - 1
        bounded = (max(-bound, min(value, bound)) for value in (base, slope))
        return LevelRule(step_shift, low, rule.shift, *bounded)


@dataclass(frozen=True)
class CodeTables:
    """Code lengths of every context, and how levels choose among them."""

    merge: int
    """Index into `GROUPS_OF_MERGE`."""
    step_lengths: Uint8Array
    """Shape [groups, STEP_SYMBOLS + 1]."""
    number_lengths: Uint8Array
    """Shape [NUMBER_CONTEXTS, NUMBER_SYMBOLS + 1]."""
    level_rule: LevelRule
    draw_lengths: Uint8Array | None = None
    """Shape [DRAW_CONTEXTS, NUMBER_SYMBOLS + 1]; None: draws from tails are written as they are."""

    def cost_bits(self, counts: SymbolCounts, *, vocab_size: int) -> int:
        """What the codes of these symbols take; open bits aside."""
        groups = GROUPS_OF_MERGE[self.merge]
        return (
            _cost(counts.steps, self.step_lengths[groups], SYMBOL_BITS)
            + _cost(counts.numbers, self.number_lengths, _NUMBER_ESCAPE_BITS)
            + self._draw_cost_bits(counts.draws, vocab_size)
        )

    def _draw_cost_bits(self, draws: Int64Array, vocab_size: int) -> int:
        if self.draw_lengths is not None:
            return _cost(draws, self.draw_lengths, _NUMBER_ESCAPE_BITS)
        open_bits = draws[:, :NUMBER_SYMBOLS] * NUMBER_WIDTHS
        return int(draws.sum()) * plain_draw_bits(vocab_size) - int(open_bits.sum())

    @cached_property
    def step_codes(self) -> Uint32Array:
        """Code and length · 65536 of each symbol, shape [STEP_CONTEXTS, STEP_SYMBOLS + 1]."""
        return _codes(self.step_lengths)[GROUPS_OF_MERGE[self.merge]]

    @cached_property
    def number_codes(self) -> Uint32Array:
        """The same of numbers, shape [NUMBER_CONTEXTS, NUMBER_SYMBOLS + 1]."""
        return _codes(self.number_lengths)

    @cached_property
    def step_table(self) -> Uint32Array:
        """Decoding tables of all groups, for `row_kernels.read_rows`."""
        tables = np.empty((len(self.step_lengths), 1 << MAX_CODE_LENGTH), np.uint32)
        fill_tables(self.step_lengths, _STEP_ENTRIES, _NO_STEP, 5, STEP_ESCAPE, tables)
        return tables.ravel()

    @cached_property
    def step_states(self) -> tuple[int, Uint64Array, int]:
        """Where the decoding table of a context is, for `row_kernels.read_rows`.

        Bytes from a rank bucket's tables to the next one's; bytes from the table of state 0 to that of the
        state behind a row's first entry, by the 64s in its token code, shape [`STATE_RUNS`]; which bits of
        such a number stay along the row.
        """
        size = 4 << MAX_CODE_LENGTH
        by_bucket, by_state, remembered = (
            (0, 0, 0),
            (size, 0, 0),
            (TOKEN_OCTAVES * size, size, 0),
            (ENTRY_STATES * size, size, LISTS_USED),
        )[self.merge]
        states = STATES_BEHIND & np.uint64(TOKEN_OCTAVES - 1 | remembered)
        return by_bucket, states * np.uint64(by_state), remembered * by_state

    @cached_property
    def number_table(self) -> Uint64Array:
        """Decoding tables of all number contexts, for `number_kernels.read_numbers`."""
        tables = np.empty((len(self.number_lengths), 1 << MAX_CODE_LENGTH), np.uint64)
        fill_tables(self.number_lengths, _NUMBER_ENTRIES, _NO_NUMBER, 6, -1, tables)
        return tables.ravel()

    @cached_property
    def draw_codes(self) -> Uint32Array | None:
        """As `number_codes`, of draws, shape [DRAW_CONTEXTS, NUMBER_SYMBOLS + 1]; None without codes."""
        return None if self.draw_lengths is None else _codes(self.draw_lengths)

    @cached_property
    def draw_table(self) -> Uint64Array | None:
        """As `number_table`, of draws; None without codes."""
        if self.draw_lengths is None:
            return None
        tables = np.empty((DRAW_CONTEXTS, 1 << MAX_CODE_LENGTH), np.uint64)
        fill_tables(self.draw_lengths, _NUMBER_ENTRIES, _NO_NUMBER, 6, -1, tables)
        return tables.ravel()

    def to_bytes(self) -> bytes:
        """Merge kind, level rule, and the lengths in nibbles."""
        rule = self.level_rule
        head = _HEAD.pack(self.merge, rule.step_shift, rule.origin, rule.shift, rule.base, rule.slope)
        parts = [self.step_lengths, self.number_lengths]
        parts += [] if self.draw_lengths is None else [self.draw_lengths]
        return b"".join((head, *(_pack(lengths).tobytes() for lengths in parts)))

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> CodeTables:
        """What `to_bytes` wrote.

        Raises:
            CorruptBlockError: if the bytes are not that, or the lengths are no prefix code's.
        """
        if len(data) < _HEAD.size:
            raise CorruptBlockError("tables of code lengths end inside their head")
        merge, step_shift, origin, shift, base, slope = _HEAD.unpack_from(data)
        if merge >= len(GROUPS_OF_MERGE) or max(step_shift, shift) > 31:
            raise CorruptBlockError(f"tables of code lengths of kind {merge}, shifts {step_shift}, {shift}")
        packed = np.frombuffer(data, np.uint8, offset=_HEAD.size)
        nibbles = np.stack((packed & 15, packed >> 4), axis=1).astype(np.uint8).ravel()
        step_lengths = np.zeros((_group_count(merge), STEP_SYMBOLS + 1), np.uint8)
        number_lengths = np.zeros((NUMBER_CONTEXTS, NUMBER_SYMBOLS + 1), np.uint8)
        draw_lengths = np.zeros((DRAW_CONTEXTS, NUMBER_SYMBOLS + 1), np.uint8)
        end = _unpack_part(nibbles, 0, step_lengths)
        end = _unpack_part(nibbles, end, number_lengths)
        with_draws = end < nibbles.size
        end = _unpack_part(nibbles, end, draw_lengths) if with_draws else end
        if end != nibbles.size:
            raise CorruptBlockError("tables of code lengths end too late")
        rule = LevelRule(step_shift, origin, shift, base, slope)
        return CodeTables(merge, step_lengths, number_lengths, rule, draw_lengths if with_draws else None)


def build_tables(
    counts: SymbolCounts, *, merge: int, level_rule: LevelRule, with_escapes: bool
) -> CodeTables:
    """The best codes for some counts.

    Args:
        counts: What to code.
        merge: Index into `GROUPS_OF_MERGE`.
        level_rule: By which the tails were counted.
        with_escapes: Whether symbols that were not counted must be codable too.

    Returns:
        With codes of draws where some were counted.
    """
    groups = GROUPS_OF_MERGE[merge]
    steps = np.zeros((_group_count(merge), STEP_SYMBOLS + 1), np.int64)
    np.add.at(steps, groups, counts.steps)
    numbers, draws = counts.numbers.copy(), counts.draws.copy()
    with_draws = bool(draws.any())
    if with_escapes:
        # A symbol met once says how likely an unknown one is (Good 1953).
        steps[:, STEP_ESCAPE] = 1 + (steps == 1).sum(axis=1)
        numbers[:, NUMBER_ESCAPE] = 1 + (numbers == 1).sum(axis=1)
        draws[:, NUMBER_ESCAPE] = 1 + (draws == 1).sum(axis=1)
    return CodeTables(
        merge, _lengths(steps), _lengths(numbers), level_rule, _lengths(draws) if with_draws else None
    )


def plain_draw_bits(vocab_size: int) -> int:
    """Bits of a draw's number where the tables have no code for it: numbers are 0 to V."""
    return vocab_size.bit_length()


def _group_count(merge: int) -> int:
    return int(GROUPS_OF_MERGE[merge][-1]) + 1


def _cost(counts: Int64Array, lengths: Uint8Array, escape_bits: int) -> int:
    escape = lengths[:, -1:].astype(np.int64) + escape_bits
    return int((counts * np.where(lengths > 0, lengths, escape)).sum())


def _lengths(counts: Int64Array) -> Uint8Array:
    return np.stack([code_lengths(row) for row in counts])


def _codes(lengths: Uint8Array) -> Uint32Array:
    codes: Uint32Array = np.stack([canonical_codes(row) for row in lengths])
    codes |= lengths.astype(np.uint32) << 16
    return codes


@compiled
def _pack(lengths: Uint8Array) -> Uint8Array:
    """Nibbles, low one first: 1 to 10 a length; 0 and n: n + 1 zeros; 12: only zeros up to the row's end."""
    nibbles = np.zeros(lengths.size * 2 + lengths.shape[0] + 2, np.uint8)
    size = 0
    for row in range(lengths.shape[0]):
        last = lengths.shape[1] - 1
        while last >= 0 and lengths[row, last] == 0:
            last -= 1
        i = 0
        while i <= last:
            if lengths[row, i]:
                nibbles[size] = lengths[row, i]
                size += 1
                i += 1
            else:
                run = 1
                while run < 16 and lengths[row, i + run] == 0:
                    run += 1
                nibbles[size + 1] = run - 1
                size += 2
                i += run
        if last < lengths.shape[1] - 1:
            nibbles[size] = _REST_IS_ZERO
            size += 1
    size += size & 1
    packed: Uint8Array = (nibbles[0:size:2] | (nibbles[1:size:2] << 4)).astype(np.uint8)
    return packed


def _unpack_part(nibbles: Uint8Array, start: int, lengths: Uint8Array) -> int:
    """Fill and check `lengths`; the nibble behind them, since each part fills whole bytes.

    Raises:
        CorruptBlockError: if they are not there, or are no prefix code's.
    """
    end = _unpack(nibbles, start, lengths)
    if end < 0:
        raise CorruptBlockError("tables of code lengths end too early")
    check_lengths(lengths)
    return end + end % 2


@compiled
def _unpack(nibbles: Uint8Array, start: int, lengths: Uint8Array) -> int:
    """Fill `lengths`, which are zeros; return the nibble behind them, or −1 if they are not there."""
    at = start
    for row in range(lengths.shape[0]):
        i = 0
        while i < lengths.shape[1]:
            if at >= nibbles.size:
                return -1
            nibble = nibbles[at]
            at += 1
            if nibble == _REST_IS_ZERO:
                break
            if nibble > MAX_CODE_LENGTH:
                return -1
            if nibble == 0:
                if at >= nibbles.size:
                    return -1
                i += nibbles[at] + 1
                at += 1
                if i > lengths.shape[1]:
                    return -1
            else:
                lengths[row, i] = nibble
                i += 1
    return at


_NO_STEP = 1 | 1 << 9 | ((1 << 21) - 1) << 11
"""Where no code fits: a token code that is beyond every vocabulary."""

_NO_NUMBER = 1 | 1 << 42
"""Where no code fits: a number that is beyond all others."""


def _step_entries() -> Uint64Array:
    """Element of the decoding table of each symbol, for a code of no length."""
    entries = np.empty(STEP_SYMBOLS + 1, np.uint64)
    for symbol in range(STEP_SYMBOLS):
        base, width = int(STEP_BASES[symbol]), int(STEP_WIDTHS[symbol])
        # A gap is added to the token code before it, and 0 is the next one.
        base += symbol < GAP_CLASSES
        entries[symbol] = width | min(step_of_symbol(symbol), LONG_STEP) << 9 | base << 11
    # Looked for among the long steps only, where these are rare.
    entries[STEP_ESCAPE] = STEP_ESCAPE_TOTAL | LONG_STEP << 9
    return entries


def _number_entries() -> Uint64Array:
    entries = NUMBER_WIDTHS.astype(np.uint64) | NUMBER_BASES.astype(np.uint64) << 10
    return np.append(entries, np.uint64(_NUMBER_ESCAPE_BITS)).astype(np.uint64)


_LONG_STEP_MASKS = np.array([0] * LONG_STEP + [(1 << 64) - 1], np.uint64)
_STEP_ENTRIES = _step_entries()
_NUMBER_ENTRIES = _number_entries()
PLAIN_STEP_ENTRIES: Final[Uint32Array] = np.concatenate(
    [
        _LONG_STEP_MASKS.view(np.uint32),
        _STEP_ENTRIES[:STEP_SYMBOLS],
        np.full((1 << SYMBOL_BITS) - STEP_SYMBOLS, _NO_STEP),
    ]
).astype(np.uint32)
"""Masks of what is read as a long step behind each step, as uint64; elements for the symbols of escapes."""
