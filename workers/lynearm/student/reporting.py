"""Turns what the loop does into progress events and, at the end, the report."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from lynearm.rollouts import RolloutStatus
from lynearm.student.progress import EvaluationRecord, OnProgress, Stage, StepRecord, TrainProgress

_RATE_STEPS = 16
"""Steps over which the shown rate is averaged: some seconds to a minute."""


class Reporter:
    """Keeps the rate, the waiting time and the latest figures of a run.

    Args:
        on_progress: Called on the training thread: it should return soon.
    """

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._rollouts: Callable[[], RolloutStatus | None] = lambda: None
        self._steps: deque[tuple[int, float]] = deque(maxlen=_RATE_STEPS)
        self._started = time.monotonic()
        self._record: StepRecord | None = None
        self._held_out: EvaluationRecord | None = None
        self._lag_blocks = 0
        self._working_seconds = 0.0
        self._waited_in_steps = 0.0
        self._waited_before = 0.0
        self.waiting_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Wall time since the run began."""
        return time.monotonic() - self._started

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens, over the latest steps, waiting not counted."""
        seconds = sum(seconds for _, seconds in self._steps)
        return sum(tokens for tokens, _ in self._steps) / seconds if seconds > 0 else 0.0

    @property
    def waiting_share(self) -> float:
        """Part of the time since the first step, measuring and saving not counted, without traces at hand."""
        seconds = self._working_seconds + self._waited_in_steps
        return self._waited_in_steps / seconds if seconds > 0 else 0.0

    def take_waiting_seconds(self) -> float:
        """What was waited since this was last asked."""
        seconds = self.waiting_seconds - self._waited_before
        self._waited_before = self.waiting_seconds
        return seconds

    def watch_rollouts(self, status: Callable[[], RolloutStatus]) -> None:
        """Tell with everything else how the student's own writing goes."""
        self._rollouts = status

    def stage(self, stage: Stage, message: str = "") -> None:
        """Announce what the run turns to."""
        self._on_progress(
            TrainProgress(
                stage=stage,
                message=message,
                record=self._record,
                tokens_per_second=self.tokens_per_second,
                lag_blocks=self._lag_blocks,
                held_out=self._held_out,
                rollouts=self._rollouts(),
                waiting_share=self.waiting_share,
            )
        )

    def stepped(self, record: StepRecord, *, tokens: int, lag_blocks: int) -> None:
        """Announce a step that trained on `tokens` completion tokens."""
        if self._record is not None:
            # Before the first step, a run may wait for the teacher to be started.
            self._waited_in_steps += record.waiting_seconds
        self._record = record
        self._lag_blocks = lag_blocks
        self._steps.append((tokens, record.seconds))
        self._working_seconds += record.seconds
        self.stage("training")

    def evaluated(self, record: EvaluationRecord) -> None:
        """Take note of a measurement; the next announcement shows it."""
        self._held_out = record
