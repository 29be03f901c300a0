"""The traces that a run measures on: which they are, settled once, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lynearm.student.batches import is_usable
from lynearm.student.config import TrainConfig
from lynearm.student.mixed_source import Selection, TraceSource
from lynearm.student.mixing import StreamPlan, StreamState
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
    return tuple(
        _choose(plan.name, source, config, selection, reporter) if plan.measured else ()
        for plan, source in zip(plans, sources, strict=True)
    )


def _choose(
    name: str, source: TraceSource, config: TrainConfig, selection: Selection, reporter: Reporter
) -> tuple[Trace, ...]:
    wanted, passed, held_out = config.held_out_traces, list[PositionedTrace](), list[Trace]()
    of_which = f" of stream {name}" if len(config.streams) > 1 else ""
    reporter.stage("collecting", f"{wanted} held-out traces{of_which}")
    while len(held_out) < wanted and len(passed) < config.held_out_window:
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


def split_held_out(traces: Sequence[Trace], states: Sequence[StreamState]) -> tuple[tuple[Trace, ...], ...]:
    """What a checkpoint holds as one sequence, by stream."""
    parts: list[tuple[Trace, ...]] = []
    start = 0
    for state in states:
        parts.append(tuple(traces[start : start + state.held_out_traces]))
        start += state.held_out_traces
    return tuple(parts)
