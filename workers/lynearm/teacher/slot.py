"""One worker of a job through all its lives: where it runs, what it does, and what all of them did."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from lynearm.teacher.progress import WorkerState, WorkerStatus
from lynearm.teacher.quarantine import SuspectGroup
from lynearm.teacher.rates import RateMeter
from lynearm.teacher.worker_progress import WorkerProgress
from lynearm.wire.specs import StreamSpec


class Place(Protocol):
    """A share of a node, reserved for a worker; `Reservation` is one."""

    def node_id(self) -> str:
        """The node; empty while there is no room."""
        ...

    def strategy(self) -> Any:
        """What Ray is told, so that an actor runs in it."""
        ...

    def release(self) -> None:
        """Let others have it."""
        ...


class Actor(Protocol):
    """A worker in a process of its own; `WorkerActor` is one."""

    # Any: what Ray calls an object reference.
    def call(self, method: str, *arguments: object) -> Any:
        """Start a method."""
        ...

    def finished(self, reference: Any, timeout_seconds: float = 0.0) -> bool:
        """Whether a call came to its end."""
        ...

    def result(self, reference: Any) -> Any:
        """What a call returned, or raises what it raised; WorkerLostError for a dead worker."""
        ...

    def progress(self) -> WorkerProgress | None:
        """How far it is, if it has answered."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


@dataclass(slots=True)
class Totals:
    """What workers did."""

    generated_prompts: int = 0
    generated_tokens: int = 0
    empty_completions: int = 0
    acked_blocks: int = 0
    waiting_seconds: float = 0.0
    encode_seconds: float = 0.0
    failed_prompts: int = 0
    verdicts: Counter[str] = field(default_factory=Counter[str])
    left_out: int = 0

    def add(self, other: Totals | WorkerProgress) -> None:
        """Count in what another did."""
        for one in fields(Totals):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


class Slot:
    """A worker that is wanted: one producer id, one place, and one process after the other.

    Args:
        name: Producer id.
        place: Reserved for it.
        clock: Seconds that only grow.
    """

    def __init__(self, name: str, place: Place, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.place = place
        self.clock = clock
        self.since = clock()
        """When it came into its state."""
        self.node_id = ""
        self.node_host = ""
        self.actor: Actor | None = None
        self.lives = 0
        """Processes that have had its name."""
        self.earlier_lives = 0
        """Those of workers of that name which are gone."""
        self.method = ""
        """What its process does; empty: nothing."""
        self.reference: Any = None  # of Ray, to what the method will return
        self.spec: StreamSpec | None = None
        """What it would write, once it has loaded its model."""
        self.is_connected = False
        """Whether it may hold leases."""
        self.group: SuspectGroup | None = None
        """What it answers with nothing else in its engine."""
        self.barren_deaths = 0
        """In a row, without a prompt finished between them."""
        self.inquest_seconds = 0.0
        """After its death, until it counts as none of its node's."""
        self.reason = ""
        self.progress = WorkerProgress()
        self.totals = Totals()
        """Of its dead predecessors."""
        self._state: WorkerState = "waiting"
        self._meter = RateMeter(clock=clock)
        self._moved_at = clock()

    @property
    def state(self) -> WorkerState:
        """What it is at."""
        return self._state

    @state.setter
    def state(self, state: WorkerState) -> None:
        if state != self._state:
            self.since = self.clock()
            self._moved_at = self.since
        self._state = state

    @property
    def holder(self) -> str:
        """Names the leases of its present process: each has its own, so that the last one's can be told."""
        return f"{self.name}.{self.lives}"

    @property
    def seconds_without_a_token(self) -> float:
        """Since its engine, which has work, made the last one."""
        return self.clock() - self._moved_at

    def call(self, method: str, *arguments: object) -> None:
        """Give its process something to do."""
        if self.actor is not None:
            self.method, self.reference = method, self.actor.call(method, *arguments)

    def look(self) -> None:
        """Take note of its progress, if it has answered."""
        progress = self.actor.progress() if self.actor is not None else None
        if progress is None:
            return
        grown = progress.generated_tokens > self.progress.generated_tokens
        if grown or not progress.running or progress.waiting_reason:
            self._moved_at = self.clock()
        if progress.generated_prompts > self.progress.generated_prompts:
            self.barren_deaths = 0
        self.progress = progress

    def bury(self, reason: str, inquest_seconds: float) -> None:
        """Its process has ended: count in what it did, and find out why within some time."""
        self.forget_process()
        self.inquest_seconds = inquest_seconds
        self.reason = reason
        self.barren_deaths += 1
        self.state = "replacing"

    def forget_process(self) -> None:
        """End what is left of its process."""
        if self.actor is not None:
            self.actor.kill()
        self.totals.add(self.progress)
        self.progress = WorkerProgress()
        self.actor, self.method, self.reference, self.spec = None, "", None, None

    def all_totals(self) -> Totals:
        """What it and its predecessors did."""
        total = Totals()
        total.add(self.totals)
        total.add(self.progress)
        return total

    def status(self, max_batch: int) -> WorkerStatus:
        """For people."""
        total = self.all_totals()
        return WorkerStatus(
            name=self.name,
            state=self.state,
            node=self.node_host,
            waiting_reason=self.progress.waiting_reason or self.reason,
            tokens_per_second=self._meter.update(total.generated_tokens),
            running=self.progress.running,
            max_batch=max_batch,
            done_prompts=total.generated_prompts,
            generated_tokens=total.generated_tokens,
            restarts=max(0, self.lives - self.earlier_lives - 1),
            process_id=self.progress.process_id,
        )
