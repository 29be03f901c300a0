"""What a run trains on, out of all its streams, one trace after the other.

Invariants: every trace that `Selection` and a plan's filter give to training is given once a pass of its
stream, and a stream's traces come in its order; of streams, `mixing` settles the order. The stream that has
the turn is waited for, whatever others have at hand. The states that come with a trace lead on to exactly the
traces after it. A stream that has ended gives its share to the others; the source is exhausted when all have.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from lynearm.student.batches import DrawnTrace, SplitRule, completion_positions, is_usable
from lynearm.student.mixing import (
    StreamPlan,
    StreamState,
    choose_stream,
    count_trace,
    find_shares,
    finish_pass,
    has_ended,
    note_damaged,
)
from lynearm.student.reader import PositionedTrace
from lynearm.student.reporting import Reporter
from lynearm.wire.traces import Cursor, Trace

logger = logging.getLogger(__name__)


class TraceSource(Protocol):
    """One stream: what `source.StreamSource` offers."""

    @property
    def is_open(self) -> bool:
        """Whether a pass is in progress."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether every trace of the pass has been taken."""
        ...

    @property
    def next_offset(self) -> int:
        """Blocks that the stream is known to have."""
        ...

    @property
    def received_all(self) -> bool:
        """Whether the stream's last block has arrived."""
        ...

    @property
    def damaged_offsets(self) -> tuple[int, ...]:
        """Offsets of the blocks that this pass has passed over, being damaged."""
        ...

    def open(self, start: Cursor) -> None:
        """Begin, or begin again, at a trace."""
        ...

    def take(self) -> PositionedTrace | None:
        """The next trace; None when all have been taken, or the run should stop."""
        ...

    def give_back(self, traces: Sequence[PositionedTrace]) -> None:
        """Traces that come first again."""
        ...

    def close(self) -> None:
        """End the pass."""
        ...


@dataclass(frozen=True, slots=True)
class Selection:
    """Which traces of a stream are trained on, apart from its plan's own filter."""

    rule: SplitRule
    max_sequence_tokens: int


class MixedSource:
    """Draws traces by the rule of `mixing`; use it as a context manager.

    Args:
        plans: How each stream takes part.
        states: Where each stream begins, in the order of `plans`.
        sources: To read them by, in the same order; they are opened and closed here.
        selection: What is trained on.
        epochs: Passes over each stream. One that begins again does not wait for the others.
        reporter: Hears which streams have ended.
    """

    def __init__(
        self,
        plans: Sequence[StreamPlan],
        states: Sequence[StreamState],
        sources: Sequence[TraceSource],
        *,
        selection: Selection,
        epochs: int,
        reporter: Reporter,
    ) -> None:
        self._plans = tuple(plans)
        self._states = tuple(states)
        self._sources = tuple(sources)
        self._selection = selection
        self._epochs = epochs
        self._reporter = reporter
        self._exhausted = False
        self.skipped_traces = 0
        """That have nothing to learn from, or no room for it."""
        self.refused_traces = [0] * len(plans)
        """Of each stream, those that its plan's filter did not accept."""

    def __enter__(self) -> Self:
        """Begin to read every stream that has not ended."""
        for source, state in zip(self._sources, self._states, strict=True):
            if state.epoch < self._epochs:
                source.open(state.cursor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every source."""
        for source in self._sources:
            source.close()

    @property
    def states(self) -> tuple[StreamState, ...]:
        """After what was drawn last."""
        return self._states

    @property
    def exhausted(self) -> bool:
        """Whether the last draw found all streams at their end."""
        return self._exhausted

    @property
    def is_live(self) -> bool:
        """Whether some stream, in its first pass, may still be growing."""
        return any(
            state.epoch == 0 and not source.received_all
            for state, source in zip(self._states, self._sources, strict=True)
        )

    @property
    def lag_blocks(self) -> int:
        """Blocks that are known to be there and were not trained on yet, of streams in their first pass."""
        pairs = zip(self._states, self._sources, strict=True)
        return sum(
            max(0, source.next_offset - state.cursor.offset) for state, source in pairs if state.epoch == 0
        )

    def take(self, step: int) -> DrawnTrace | None:
        """The next trace to train on; waits for it. None when the run is over or should stop.

        Args:
            step: Steps that are done.

        Raises:
            LynearmError: as for `TraceReader.poll`.
        """
        while shares := self._shares(step):
            index = choose_stream(self._states, shares)
            positioned = self._sources[index].take()
            if positioned is not None:
                if self._is_trained_on(index, positioned.trace, step):
                    return self._count(index, positioned, shares)
            elif self._sources[index].exhausted:
                self._finish_pass(index)
            else:
                return None
        self._exhausted = True
        return None

    def _shares(self, step: int) -> tuple[float, ...]:
        for plan, state, source in zip(self._plans, self._states, self._sources, strict=True):
            if source.is_open and has_ended(plan, state, step=step, epochs=self._epochs):
                source.close()
                self._tell_end(plan.name, step)
        return find_shares(self._plans, self._states, step=step, epochs=self._epochs)

    def _tell_end(self, name: str, step: int) -> None:
        shares = find_shares(self._plans, self._states, step=step, epochs=self._epochs)
        left = [f"{plan.name} {share:.0%}" for plan, share in zip(self._plans, shares, strict=False) if share]
        if left:
            told = f"stream {name} has ended; from here on {', '.join(left)}"
            logger.info("%s", told)
            self._reporter.stage("training", told)

    def _is_trained_on(self, index: int, trace: Trace, step: int) -> bool:
        if self._selection.rule.holds_out(trace):
            return False
        if not is_usable(trace, self._selection.max_sequence_tokens):
            self.skipped_traces += 1
            return False
        accepts = self._plans[index].accepts
        if accepts is not None and not accepts(trace, step):
            self.refused_traces[index] += 1
            return False
        return True

    def _count(self, index: int, positioned: PositionedTrace, shares: Sequence[float]) -> DrawnTrace:
        tokens = completion_positions(positioned.trace, self._selection.max_sequence_tokens)
        self._states = count_trace(self._states, index, tokens=tokens, after=positioned.after, shares=shares)
        if damaged := self._sources[index].damaged_offsets:
            self._states = note_damaged(self._states, index, damaged, before=positioned.after)
        return DrawnTrace(positioned.trace, index, self._states)

    def _finish_pass(self, index: int) -> None:
        damaged = self._sources[index].damaged_offsets
        self._states = finish_pass(note_damaged(self._states, index, damaged), index)
        if self._states[index].epoch < self._epochs:
            self._sources[index].open(Cursor())
