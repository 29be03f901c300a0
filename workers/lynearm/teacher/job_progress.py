"""What a job says while it runs: where it is, how fast, and what a person should know now."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.progress import Stage, TeachProgress
from lynearm.teacher.rates import RateMeter
from lynearm.teacher.slot import Totals
from lynearm.teacher.supervisor import Supervisor

OnProgress: TypeAlias = Callable[[TeachProgress], None]

_REPORT_SECONDS = 0.5
_MESSAGE_SECONDS = 10.0
"""How long it is said what happened: those who print a line now and then shall not miss it."""

_ETA_WINDOW_SECONDS = 120.0


class JobProgress:
    """Tells `on_progress` of one job.

    Args:
        config: Of the job.
        on_progress: Called on the thread that says something.
    """

    def __init__(self, config: TeachConfig, on_progress: OnProgress) -> None:
        self._config = config
        self._on_progress = on_progress
        self._started = time.monotonic()
        self._entered = self._started
        self._tokens = RateMeter()
        self._done = RateMeter(_ETA_WINDOW_SECONDS)
        self._said_at = float("-inf")
        self._message = ("", float("-inf"))
        self.stage: Stage = "waiting"
        self.stage_seconds: dict[str, float] = {}
        """Wall time in each stage that was left."""
        self.prompts = 0
        self.skipped_prompts = 0
        self.finished_before = 0
        """Prompts that the stream had when the job looked."""
        self.supervisor: Supervisor | None = None
        """Of the workers, once there is one."""

    @property
    def seconds(self) -> float:
        """Since the job began."""
        return time.monotonic() - self._started

    def enter(self, stage: Stage) -> None:
        """Go on to a stage, and say so."""
        now = time.monotonic()
        self.stage_seconds[self.stage] = self.stage_seconds.get(self.stage, 0.0) + now - self._entered
        self.stage, self._entered = stage, now
        self.say()

    def say_now_and_then(self, supervisor: Supervisor, *, is_stopping: bool) -> None:
        """Say how it goes, if that was not said a moment ago."""
        now = time.monotonic()
        if supervisor.message:
            self._message, supervisor.message = (supervisor.message, now + _MESSAGE_SECONDS), ""
        if now - self._said_at < _REPORT_SECONDS:
            return
        self._said_at = now
        message, until = self._message
        if is_stopping:
            message = "stopping"
        elif now > until:
            message = next((slot.progress.waiting_reason for slot in supervisor.slots), "")
            if self.stage == "loading" and supervisor.slots and not message:
                message = supervisor.slots[0].reason
        self.say(message)

    def say(self, message: str = "") -> None:
        """Say how it goes."""
        supervisor = self.supervisor
        totals = supervisor.totals() if supervisor else Totals()
        max_batch = self._config.max_batch
        done = self._done_prompts(totals)
        self._on_progress(
            TeachProgress(
                stage=self.stage,
                message=message,
                prompts=self.prompts,
                done_prompts=done,
                skipped_prompts=self.skipped_prompts,
                failed_prompts=totals.failed_prompts + (supervisor.given_up if supervisor else 0),
                generated_tokens=totals.generated_tokens,
                tokens_per_second=self._tokens.update(totals.generated_tokens),
                acked_blocks=totals.acked_blocks,
                waiting_seconds=totals.waiting_seconds,
                restarts=supervisor.restarts if supervisor else 0,
                verdicts=dict(totals.verdicts),
                eta_seconds=self._eta_seconds(done),
                workers=tuple(slot.status(max_batch) for slot in supervisor.slots) if supervisor else (),
            )
        )

    def _done_prompts(self, totals: Totals) -> int:
        """By what workers generated, or by what the service said, which counts those of other commands."""
        here = self.finished_before + totals.generated_prompts
        heard = self.supervisor.done_units() // self._config.completions if self.supervisor else 0
        return min(max(here, heard), self.prompts)

    def _eta_seconds(self, done_prompts: int) -> float | None:
        if self.stage != "generating":
            return None
        rate = self._done.update(done_prompts)
        return (self.prompts - done_prompts) / rate if rate > 0 else None
