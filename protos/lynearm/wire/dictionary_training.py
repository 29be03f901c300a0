"""What a codec learns about a teacher from its traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from lynearm.wire.adaptive import keep_likely
from lynearm.wire.code_tables import FEW_CODES, MANY_CODES, SymbolCounts, build_tables
from lynearm.wire.dictionaries import Dictionary, TokenLists, TokenOrder, list_tokens, order_tokens
from lynearm.wire.grids import Grid, choose_grid
from lynearm.wire.positions import first_previous_tokens
from lynearm.wire.row_naming import name_rows
from lynearm.wire.specs import CodecMode, CodecSpec
from lynearm.wire.token_kernels import AS_SAMPLED
from lynearm.wire.trace_rows import (
    check_arguments,
    check_rows,
    check_tail_draws,
    gather_positions,
    kept_mask,
    name_trace_rows,
    row_count,
    token_before,
    width_of,
)
from lynearm.wire.traces import Trace

_SHORT_ROWS = 16
"""Rows of the blocks for which a dictionary's second codes are trained."""


def train_dictionary(
    blocks: Iterable[Sequence[Trace]], *, codec: CodecSpec | CodecMode, vocab_size: int
) -> Dictionary:
    """A dictionary from a teacher's own traces, grouped as they will be in blocks.

    Args:
        blocks: Traces of the stream's first blocks, or of another stream of the same teacher; some
            thousand positions suffice.
        codec: As for `encode_block`.
        vocab_size: As for `encode_block`.

    Raises:
        CodecError: as for `encode_block`; also if there are no traces.
    """
    spec = codec if isinstance(codec, CodecSpec) else CodecSpec(codec)
    groups = [[keep_likely(trace, spec.min_probability) for trace in block] for block in blocks if block]
    everything = [trace for group in groups for trace in group]
    check_arguments(everything, spec, vocab_size, None)
    check_tail_draws(everything, codec)
    gathered = gather_positions(everything)
    check_rows(everything, gathered, vocab_size)
    common = order_tokens(np.bincount(gathered.token_ids[kept_mask(gathered)], minlength=vocab_size))
    grid: Grid | None = None
    if spec.mode not in ("exact", "sampled"):
        grid = choose_grid(spec.mode, gathered.logprobs, gathered.tail_mass)
    order = TokenOrder.common_first(common, vocab_size)
    # A draft fixes grid and level rule, by which the symbols of the final tables are counted.
    rows = name_trace_rows(everything, spec, order, None, grid=grid)
    merge = FEW_CODES if rows.fixed_width else MANY_CODES
    draft = build_tables(rows.counts, merge=merge, level_rule=rows.level_rule, with_escapes=True)
    counts, short_counts = SymbolCounts.zeros(), SymbolCounts.zeros()
    halves = (groups[::2], groups[1::2])
    for counted, others in (halves, halves[::-1]):
        # Lists made of the rows that are counted would seem better than they are for others.
        lists = _token_lists([trace for group in others or counted for trace in group])
        known = Dictionary(vocab_size, common, *lists, draft, grid)
        for group in counted:
            counts.add(name_trace_rows(group, spec, known.order, known).counts)
            for trace in group:
                _count_pieces(trace, spec, known, short_counts)
    rule = draft.level_rule
    tables = build_tables(counts, merge=merge, level_rule=rule, with_escapes=True)
    short_tables = build_tables(short_counts, merge=MANY_CODES, level_rule=rule, with_escapes=True)
    top_k = Counter(map(width_of, everything)).most_common(1)[0][0]
    return Dictionary(vocab_size, common, *_token_lists(everything), tables, grid, top_k, short_tables)


def _count_pieces(trace: Trace, spec: CodecSpec, known: Dictionary, counts: SymbolCounts) -> None:
    """Count the symbols of a trace's rows as blocks of a few rows each would write them."""
    rows, width = gather_positions([trace]), width_of(trace)
    for start in range(0, rows.kept.size, _SHORT_ROWS):
        piece = rows.select(slice(start, start + _SHORT_ROWS))
        before = int(rows.sampled_ids[start - 1]) if start else token_before(trace)
        named = name_rows(
            piece,
            [width],
            [piece.kept.size],
            first_previous_tokens([piece.kept.size], [before]),
            mode=spec.mode,
            draws=spec.draws,
            order=known.order,
            dictionary=known,
        )
        counts.add(named.counts)


def _token_lists(traces: Sequence[Trace]) -> tuple[TokenLists, TokenLists]:
    """Followers of tokens, and companions of first tokens."""
    rows = gather_positions(traces)
    kept_NK = kept_mask(rows)
    first = first_previous_tokens([row_count(t) for t in traces], [token_before(t) for t in traces])
    previous_N = np.where(first == AS_SAMPLED, np.roll(rows.sampled_ids, 1), first)
    if kept_NK.shape[1] == 0:
        return TokenLists.none(), TokenLists.none()
    first_N = np.where(rows.kept > 0, rows.token_ids[:, 0], -1)
    followers = list_tokens(previous_N, rows.token_ids, kept_NK)
    return followers, list_tokens(first_N, rows.token_ids[:, 1:], kept_NK[:, 1:])
