"""The traces that a run measures on: which they are, settled once, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from lynearm.student.batches import is_usable
from lynearm.student.config import TrainConfig
from lynearm.student.mixed_source import Selection, TraceSource
from lynearm.student.mixing import StreamPlan
from lynearm.student.reader import PositionedTrace
from lynearm.student.reporting import Reporter
from lynearm.wire.traces import Trace


def choose_held_out(
    plans: Sequence[StreamPlan],
    sources: Sequence[TraceSource],
    *,
    config: TrainConfig,
    selection: Selection,
    reporter: Reporter,
) -> tuple[tuple[Trace, ...], ...]:
    """The held-out traces of each stream; fewer where the run was told to stop.

    From each stream, the first `held_out_traces` of those that its split rule holds out, as far as they come
    before `held_out_window` others, which are given back to be trained on.

    Args:
        plans: Of the streams.
        sources: To read them by, in the same order, each at its start.
        config: Says how many.
        selection: Says which.
        reporter: Hears of it.
    """
    chosen: list[tuple[Trace, ...]] = []
    for plan, source in zip(plans, sources, strict=True):
        wanted = config.held_out_traces if plan.measured else 0
        of_which = f" of stream {plan.name}" if len(plans) > 1 else ""
        reporter.stage("collecting", f"{wanted} held-out traces{of_which}")
        chosen.append(_choose(source, wanted, window=config.held_out_window, selection=selection))
    return tuple(chosen)


def _choose(source: TraceSource, wanted: int, *, window: int, selection: Selection) -> tuple[Trace, ...]:
    passed, held_out = list[PositionedTrace](), list[Trace]()
    while len(held_out) < wanted and len(passed) < window:
        positioned = source.take()
        if positioned is None:
            break
        if not selection.rule.holds_out(positioned.trace):
            passed.append(positioned)
        elif is_usable(positioned.trace, selection.max_sequence_tokens):
            # Measured without hidden states, which would fill the checkpoint's blocks.
            held_out.append(replace(positioned.trace, hidden=None))
    source.give_back(passed)
    return tuple(held_out)


def split_held_out(traces: Sequence[Trace], counts: Sequence[int]) -> tuple[tuple[Trace, ...], ...]:
    """What a checkpoint holds as one sequence, by stream; `counts` says how many are of each."""
    ends = accumulate(counts)
    return tuple(tuple(traces[end - count : end]) for end, count in zip(ends, counts, strict=True))
