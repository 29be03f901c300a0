"""What becomes of the work of dead workers: taken over, tried again, or given up.

Nothing here waits: what has to be said to the service is an errand, whose end is looked at later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lynearm.client.job_calls import JobInfo
from lynearm.client.leases import Lease
from lynearm.teacher.chores import Chore
from lynearm.teacher.quarantine import Quarantine, Suspect, SuspectGroup
from lynearm.wire.errors import TeacherError

MAX_VERDICTS = 8
"""Prompts that end engines, of all workers and in a row: then it is not the prompts."""

DEATH_REMEDY = "lower max_batch or max_model_len if memory is short, and see Ray's logs"


class EstateQueue(Protocol):
    """The job, as far as dead workers go. Every method but `finish` may wait for the service."""

    def give_back(self, holder: str) -> None:
        """Let others have what a dead worker held."""
        ...

    def keep(self, holder: str) -> list[Lease]:
        """Hold what a dead worker held."""
        ...

    def finish(self, group: SuspectGroup) -> None:
        """Take note that prompts were answered."""
        ...

    def fail(self, suspect: Suspect, reason: str) -> JobInfo:
        """Give a prompt up for good."""
        ...


@dataclass(slots=True)
class _Errand:
    """A chore, and what is done with its result."""

    chore: Chore[object]
    then: Callable[[object], None]


class Errands:
    """Calls that may wait for the service, beside the supervisor's loop."""

    def __init__(self) -> None:
        self._under_way: list[_Errand] = []

    def send(self, work: Callable[[], object], then: Callable[..., None], name: str) -> None:
        """Start a call; `then` gets its result, in `collect`."""
        self._under_way.append(_Errand(Chore(work, name), then))

    def collect(self) -> None:
        """Look at those that have ended.

        Raises:
            LynearmError: what one of them raised.
        """
        for errand in [errand for errand in self._under_way if errand.chore.is_done]:
            self._under_way.remove(errand)
            errand.then(errand.chore.result())

    def wait(self) -> None:
        """Wait until all have ended; for tests."""
        for errand in self._under_way:
            errand.chore.wait()


class Recovery:
    """The work of dead workers of one job.

    Args:
        queue: The job.
        errands: Takes what may wait for the service.
        max_batch: Samples that an engine generates at once.
    """

    def __init__(self, queue: EstateQueue, errands: Errands, max_batch: int) -> None:
        self._queue = queue
        self._errands = errands
        self._quarantine = Quarantine(max_batch)
        self._verdicts = 0
        self._finished_at_verdict = 0
        self.given_up = 0
        """Prompts that ended engines."""
        self.job: JobInfo | None = None
        """The job after a prompt was given up; None while none was."""

    @property
    def has_suspects(self) -> bool:
        """Whether `next` gives something."""
        return len(self._quarantine) > 0

    def next(self) -> SuspectGroup | None:
        """Prompts to be answered with nothing else in the engine."""
        return self._quarantine.next()

    def clear(self, group: SuspectGroup) -> None:
        """They were answered."""
        self._queue.finish(group)

    def inherit(self, holder: str, *, suspicious: bool) -> None:
        """A worker that may hold leases has ended; what it held is suspect unless its node went too."""
        if suspicious:
            self._errands.send(lambda: self._queue.keep(holder), self._quarantine.admit, "take-over")
        else:
            self._errands.send(lambda: self._queue.give_back(holder), _nothing, "give-back")

    def try_again(self, group: SuspectGroup) -> None:
        """The node of those that were being answered went: that says nothing about them."""
        self._quarantine.put_back(group)

    def convict(self, group: SuspectGroup, reason: str, *, finished_prompts: int) -> None:
        """The engine ended again: a prompt that was alone in it is given up, several are tried one by one.

        Args:
            group: What was in the engine.
            reason: Of its end.
            finished_prompts: Of all workers so far; one between two verdicts says that engines do work.

        Raises:
            TeacherError: if that happens to one prompt after the other.
        """
        if not group.is_alone:
            self._quarantine.split(group)
            return
        self._verdicts = self._verdicts + 1 if finished_prompts == self._finished_at_verdict else 1
        self._finished_at_verdict = finished_prompts
        if self._verdicts >= MAX_VERDICTS:
            message = f"{self._verdicts} prompts in a row ended the engine, the last with: {reason}"
            raise TeacherError(message, DEATH_REMEDY)
        text = f"ended the engine again when it was alone in it: {reason}"
        self._errands.send(lambda: self._queue.fail(group.suspects[0], text), self._note_failure, "give-up")

    def _note_failure(self, job: JobInfo) -> None:
        self.given_up += 1
        self.job = job


def _nothing(_result: object) -> None:
    return None
