"""Rows whose entries have symbols: all that a writer does before it chooses codes.

Shape legend: N = positions of a block, K = entries of the widest row, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import BUCKET_OF_RANK, LONG_STEP_CONTEXTS, number_symbols
from lynearm.wire.code_tables import LevelRule, NumberContext, SymbolCounts
from lynearm.wire.dictionaries import Dictionary, TokenOrder
from lynearm.wire.errors import CodecError
from lynearm.wire.grids import GRID_LAWS, Bits, Counts, Grid, Scale, choose_grid
from lynearm.wire.logit_grids import PLAIN, LogitRows, find_logit_grid
from lynearm.wire.positions import Positions
from lynearm.wire.row_layout import (
    FIRST_SHIFT,
    KEPT_VARIES,
    SAMPLED_APART,
    TAIL_DRAWS,
    TOP_OFFSET,
    USUAL_FIRST,
    expect_tails,
    predicted_tails,
    room_for_lists,
    zigzag,
)
from lynearm.wire.specs import CodecMode
from lynearm.wire.tail_draws import number_draws
from lynearm.wire.token_kernels import AS_SAMPLED, assign_token_codes
from lynearm.wire.traces import Int32Array
from lynearm.wire.write_kernels import name_entries

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]
Uint16Array = npt.NDArray[np.uint16]
Uint32Array = npt.NDArray[np.uint32]

_BINARY_DIGITS: Uint8Array = np.array([level.bit_length() for level in range(65)], np.uint8)
"""Of the levels up to 64, which has as many as any context tells apart."""

_NEGATIVE_ZERO = np.uint32(1 << 31)

_BLOCK_KL_SLACK = 2.0
"""A block may exceed its mode's bound this much on its dictionary's grid: the bound is for the stream."""


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
    tail_draws: _Column | None = None
    """What was drawn from the tails, which has codes of its own; None where nothing was."""
    tail_draw_count: int = 0
    """Draws of each row."""

    @property
    def fixed_width(self) -> bool:
        """Whether every row keeps as many entries as its trace allows."""
        return not self.flags & KEPT_VARIES


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
        *room_for_lists(kept.size if varies else 0),
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
            _column(NumberContext.FIRST, zigzag(USUAL_FIRST - (first_bits >> FIRST_SHIFT).astype(np.int64))),
            _column(NumberContext.LOGIT, _pack_tops(logit_rows)),
        ]
        fixed.append((first_bits & np.uint32((1 << FIRST_SHIFT) - 1), FIRST_SHIFT))
    tail_contexts, expected = expect_tails(rule, scale, levels, kept, last_levels)
    columns.append(_Column(tail_contexts, _tail_numbers(positions, scale, tail_levels, expected)))
    for column in columns:
        np.add.at(counts.numbers, (column.contexts, number_symbols(column.numbers)), 1)
    drawn = _draw_column(positions, order)
    if drawn is not None:
        np.add.at(counts.draws, (drawn.contexts, number_symbols(drawn.numbers)), 1)
    return NamedRows(
        scale=scale,
        kept=kept,
        levels=levels,
        symbols=symbols,
        open_bits=open_bits,
        columns=tuple(columns),
        fixed=tuple(fixed),
        flags=(KEPT_VARIES if varies else 0)
        | (SAMPLED_APART if apart else 0)
        | (TAIL_DRAWS if drawn is not None else 0),
        counts=counts,
        level_rule=rule,
        tail_draws=drawn,
        tail_draw_count=0 if positions.tail_draws is None else positions.tail_draws.shape[1],
    )


def _column(context: NumberContext, numbers: npt.NDArray[np.integer]) -> _Column:
    return _Column(np.full(numbers.size, context, np.uint8), numbers.astype(np.uint32))


def _draw_column(positions: Positions, order: TokenOrder) -> _Column | None:
    if positions.tail_draws is None:
        return None
    return _Column(*number_draws(positions.tail_draws, order.rank_of_token))


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
        away = zigzag(tail_levels.astype(np.int64) - expected).astype(np.int64)
        return np.where(tails > 0, away + 1, 0).astype(np.uint32)
    predicted = predicted_tails(positions.logprobs, positions.kept, scale)
    return zigzag((tails.view(np.uint32) - predicted.view(np.uint32)).view(np.int32).astype(np.int64))


def _pack_tops(rows: LogitRows) -> Uint32Array:
    """Top logits in halves where they are such, which most are, else as places of the grid; 0: plain."""
    tops = rows.tops_N.astype(np.int64)
    shift = 23 - rows.grid.mantissa_bits
    values = (tops << shift).astype(np.uint32).view(np.float32)
    halves = np.where(tops > 0, values * 2, 0.0)
    is_half = (halves > 0) & (halves < 4096) & (halves == np.rint(halves))
    numbers = np.where(is_half, halves, 4096 + TOP_OFFSET + tops)
    return np.where(tops == PLAIN, 0, numbers).astype(np.uint32)
