"""Keeps the workers of a job running: places them, replaces the dead, follows the cluster, ends them.

Invariants:

- A loop looks at everything and waits for nothing: calls of actors are started, and looked at later; what
  may wait for the service is a `Chore`. A worker that loads, hangs or is dead holds up no other.
- What a dead worker held is taken over at once, or, from one that went with its node, given back: nothing
  waits until the service finds it silent. Nothing that a dead worker may still publish counts: its leases
  are superseded.
- A process that ends on a live node makes its prompts suspect: see `quarantine`.
- Whatever ends the loop, every actor is killed and every place is released.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from lynearm.client.job_calls import JobInfo
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.crew import Allow, Crew, WorkerCluster
from lynearm.teacher.quarantine import by_lease
from lynearm.teacher.ray_actor import WorkerLostError, WorkerOutOfReachError
from lynearm.teacher.recovery import DEATH_REMEDY, Errands, EstateQueue, Recovery
from lynearm.teacher.slot import Actor, Slot, Totals
from lynearm.teacher.worker_progress import LeasedWork
from lynearm.wire.errors import LynearmError, TeacherError
from lynearm.wire.specs import StreamSpec

logger = logging.getLogger(__name__)

MAX_BARREN_DEATHS = 3
"""Processes of one worker that may end in a row without a prompt finished between them, those not counted
that a prompt ended which was alone in the engine."""

_INQUEST_SECONDS = 5.0
"""After a process ended, until its node counts as alive: Ray says so about both, in any order."""

_LONG_INQUEST_SECONDS = 30.0
"""The same for one that cannot be reached: Ray asks a node five times before it calls it dead."""

_IDLE_SECONDS = 2.0
"""Until a worker that had nothing to do asks again."""

_STOP_SECONDS = 30.0
"""How long workers may take to publish what they have when they are asked to stop."""

_STALL_SECONDS = 900.0
"""A worker with prompts in its engine that makes no token for so long is replaced. No step takes minutes."""


class JobQueue(EstateQueue, Protocol):
    """The job, as far as the supervisor deals with it. `prepare` may wait for the service."""

    @property
    def name(self) -> str:
        """Of the job."""
        ...

    @property
    def unit_count(self) -> int:
        """Units of the whole job."""
        ...

    def prepare(self, spec: StreamSpec) -> JobInfo:
        """Open the stream, and create or find the job."""
        ...


class Supervisor:
    """The workers of one job.

    Args:
        config: How many, and what each is.
        cluster: Where they run.
        queue: The job.
        allow: Asked before workers are placed, where others share the cluster.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        config: TeachConfig,
        cluster: WorkerCluster,
        queue: JobQueue,
        *,
        allow: Allow = lambda count: count,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._queue = queue
        self._clock = clock
        self._crew = Crew(config, cluster, allow, clock)
        self._errands = Errands()
        self._recovery = Recovery(queue, self._errands, config.max_batch)
        self._heard = 0
        self._preparing = False
        self._job: JobInfo | None = None
        self._stopping_since: float | None = None
        self._is_done = False
        self.restarts = 0
        """Processes that ended and were replaced."""
        self.most_workers = 0
        """That generated at the same time."""
        self.message = ""
        """What happened last that a person should know; for one progress report."""

    @property
    def slots(self) -> list[Slot]:
        """The workers, by number."""
        return [slot for _, slot in sorted(self._crew.slots.items())]

    @property
    def sees_room(self) -> bool:
        """Whether there was room and work for more workers than it has when it looked last."""
        return self._crew.sees_room

    @property
    def job(self) -> JobInfo | None:
        """The job as it was when it was created or found; None before that."""
        return self._job

    @property
    def given_up(self) -> int:
        """Prompts that ended engines."""
        return self._recovery.given_up

    @property
    def is_settled(self) -> bool:
        """Whether every worker has its place, and Ray's account of what is free counts them in."""
        return self._crew.is_settled

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to look at."""
        return (self._is_done or self._stopping_since is not None) and not self._crew.slots

    @property
    def has_connected(self) -> bool:
        """Whether some worker is, or was, at work."""
        return any(slot.is_connected for slot in self._crew.slots.values()) or self.most_workers > 0

    def totals(self) -> Totals:
        """What all workers did, those that are gone too."""
        return self._crew.totals()

    def done_units(self) -> int:
        """Units of the job that are done, as far as workers have heard."""
        if self._is_done:
            return self._queue.unit_count
        return max(self._heard, self._job.done_units if self._job else 0)

    def tick(self) -> None:
        """Look at everything once, and start what is due.

        Raises:
            LynearmError: what makes the job impossible; TeacherError if workers keep dying.
        """
        self._collect_errands()
        self._look_at_nodes()
        for number, slot in list(self._crew.slots.items()):
            slot.look()
            self._heard = max(self._heard, slot.progress.job_done_units)
            self._advance(number, slot)
        working = sum(slot.state in ("generating", "retrying") for slot in self._crew.slots.values())
        self.most_workers = max(self.most_workers, working)
        if self._is_done or self._is_overdue():
            self._end_all()

    def stop(self) -> None:
        """End soon: unfinished completions are dropped, finished prompts are published."""
        self._stopping_since = self._clock()
        for number, slot in list(self._crew.slots.items()):
            if slot.method == "run" or slot.method == "attempt":
                slot.state = "draining"
                self._order(slot, "stop")
            elif slot.method != "disconnect":
                self._end(number, slot)

    def close(self) -> None:
        """End everything at once."""
        for number, slot in list(self._crew.slots.items()):
            slot.is_connected = False
            self._end(number, slot)

    def _collect_errands(self) -> None:
        before = self._recovery.given_up
        self._errands.collect()
        if self._recovery.given_up > before:
            self.message = "a prompt that ended the engine twice was given up"
        job = self._recovery.job
        self._is_done = self._is_done or (job is not None and job.state == "done")

    # The cluster.

    def _look_at_nodes(self) -> None:
        if not self._crew.look_at_nodes():
            return
        for number, slot in list(self._crew.slots.items()):
            if slot.state == "waiting":
                self._crew.wait_for_place(number, slot)
            elif self._crew.is_leaving(slot) or (slot.state == "given up" and self._crew.is_gone(slot)):
                self._leave_node(number, slot)
        if self._stopping_since is None and not self._is_done:
            self._crew.grow(self._queue.unit_count - self.done_units())

    def _leave_node(self, number: int, slot: Slot) -> None:
        """Its node is to go: let it finish what it began, and no more."""
        if slot.method == "run" and slot.state != "draining":
            slot.state, slot.reason = "draining", "its node is to go"
            self.message = f"{slot.name} leaves node {slot.node_host}, which is to go"
            self._order(slot, "drain")
        elif slot.method in ("load", "connect") or slot.state in ("idle", "given up"):
            self._end(number, slot)

    # One worker.

    def _advance(self, number: int, slot: Slot) -> None:
        if slot.state == "waiting":
            self._crew.start_if_placed(slot)
        elif slot.state == "replacing":
            self._replace(number, slot)
        elif slot.reference is not None and slot.actor is not None:
            if slot.actor.finished(slot.reference):
                self._take_result(number, slot, slot.actor)
            else:
                self._watch(number, slot)
        elif slot.state == "loading":
            self._connect(slot)
        elif slot.state == "idle" and self._is_due(slot):
            self._assign(number, slot)

    def _watch(self, number: int, slot: Slot) -> None:
        """Look at one that is at work."""
        if slot.method == "disconnect" and self._clock() - slot.since > _STOP_SECONDS:
            self._crew.remove(number, slot)
        elif slot.method in ("run", "attempt") and slot.seconds_without_a_token > _STALL_SECONDS:
            self._bury(slot, f"it made no token for {_STALL_SECONDS:g} s")
        elif slot.state == "idle" and slot.progress.running:
            slot.state = "generating"

    def _take_result(self, number: int, slot: Slot, actor: Actor) -> None:
        method, reference = slot.method, slot.reference
        try:
            result = actor.result(reference)
        except WorkerLostError as error:
            if method == "disconnect":
                self._crew.remove(number, slot)
            else:
                is_clear = not isinstance(error, WorkerOutOfReachError)
                self._bury(slot, error.message, _INQUEST_SECONDS if is_clear else _LONG_INQUEST_SECONDS)
            return
        except LynearmError as error:
            if method == "disconnect":  # what it made was durable before
                logger.warning("stream %s: %s: %s", self._config.stream, slot.name, error)
                self._crew.remove(number, slot)
            else:
                self._refuse(slot, method, error)
            return
        slot.method, slot.reference = "", None
        if method == "load":
            slot.spec = result
            self._prepare(result)
        elif method == "connect":
            slot.is_connected = True
            self._assign(number, slot)
        elif method == "disconnect":
            slot.progress = result
            self._crew.remove(number, slot)
        elif method == "attempt":
            slot.barren_deaths = 0
            if slot.group is not None:
                self._recovery.clear(slot.group)
            slot.group = None
            self._assign(number, slot)
        else:
            self._take_end(number, slot, result)

    def _take_end(self, number: int, slot: Slot, end: str) -> None:
        if end in ("drained", "stopped") or self._stopping_since is not None:
            self._end(number, slot)
            return
        slot.state, slot.since = "idle", self._clock()
        self._is_done = self._is_done or end == "done"

    def _refuse(self, slot: Slot, method: str, error: LynearmError) -> None:
        """An error that another process would meet again."""
        others = [other for other in self._crew.slots.values() if other is not slot and other.is_connected]
        if method not in ("load", "connect") or not others:
            raise error
        logger.warning("stream %s: %s on node %s: %s", self._config.stream, slot.name, slot.node_host, error)
        slot.forget_process()
        # It keeps its place, so that no other is tried there.
        slot.state, slot.reason = "given up", error.message

    def _prepare(self, spec: StreamSpec) -> None:
        if self._preparing:
            return
        self._preparing = True
        self._errands.send(lambda: self._queue.prepare(spec), self._note_job, "prepare-job")

    def _note_job(self, job: JobInfo) -> None:
        self._job = job

    def _connect(self, slot: Slot) -> None:
        if self._job is not None and slot.spec is not None:
            slot.call("connect", slot.spec, self._queue.name)

    def _is_due(self, slot: Slot) -> bool:
        waited = self._clock() - slot.since > _IDLE_SECONDS
        return not self._is_done and (self._recovery.has_suspects or waited)

    def _assign(self, number: int, slot: Slot) -> None:
        """Give a worker that does nothing something to do."""
        if self._stopping_since is not None or self._crew.is_leaving(slot):
            self._end(number, slot)
            return
        slot.group = self._recovery.next()
        if slot.group is None:
            # An idle one asks now and then: it is at work once it has got something.
            if slot.state != "idle":
                slot.state = "generating"
            slot.reason = ""
            slot.call("run")
            return
        slot.state = "retrying"
        count = len(slot.group.suspects)
        slot.reason = f"trying {count} prompts that were in an engine which died"
        work = [
            LeasedWork(lease.key, tuple(prompts)) for lease, prompts in by_lease(slot.group.suspects).items()
        ]
        slot.call("attempt", work)

    # Its death.

    def _bury(self, slot: Slot, reason: str, inquest_seconds: float = _INQUEST_SECONDS) -> None:
        logger.warning("stream %s: %s: %s", self._config.stream, slot.name, reason)
        slot.bury(reason, inquest_seconds)
        self.message = f"{slot.name}: {reason}; starting another"
        self._crew.look_soon()  # whether its node is there

    def _replace(self, number: int, slot: Slot) -> None:
        is_gone = self._crew.is_gone(slot)
        if not is_gone and self._clock() - slot.since < slot.inquest_seconds:
            return
        self._settle_estate(slot, suspicious=not is_gone)
        if self._stopping_since is not None or self._is_done or is_gone:
            self._crew.remove(number, slot)
            return
        self.restarts += 1
        if slot.barren_deaths >= MAX_BARREN_DEATHS:
            self._give_up(slot)
        else:
            self._crew.start(slot)

    def _settle_estate(self, slot: Slot, *, suspicious: bool) -> None:
        group, slot.group = slot.group, None
        if slot.is_connected:
            slot.is_connected = False
            self._recovery.inherit(slot.holder, suspicious=suspicious)
        if group is not None and not suspicious:
            self._recovery.try_again(group)
        elif group is not None:
            # It is known what this one died of.
            slot.barren_deaths -= int(group.is_alone)
            finished = self.totals().generated_prompts
            self._recovery.convict(group, slot.reason, finished_prompts=finished)

    def _give_up(self, slot: Slot) -> None:
        reason = (
            f"{slot.reason}; {slot.name} died {slot.barren_deaths} times in a row without a finished prompt"
        )
        if not any(other.is_connected for other in self._crew.slots.values()):
            raise TeacherError(reason, DEATH_REMEDY)
        slot.state, slot.reason = "given up", reason

    # Ends.

    def _end_all(self) -> None:
        for number, slot in list(self._crew.slots.items()):
            if slot.method != "disconnect" or self._is_overdue():
                self._end(number, slot)

    def _is_overdue(self) -> bool:
        return self._stopping_since is not None and self._clock() - self._stopping_since > _STOP_SECONDS

    def _end(self, number: int, slot: Slot) -> None:
        """End a worker: one that may hold leases gives them back first."""
        is_idle = slot.actor is not None and slot.reference is None
        if slot.is_connected and is_idle and not self._is_overdue():
            slot.state = "draining"
            slot.call("disconnect")
            return
        if slot.is_connected and slot.method == "run" and not self._is_overdue():
            return  # it returns soon: the job is done
        self._crew.remove(number, slot)

    def _order(self, slot: Slot, method: str) -> None:
        if slot.actor is not None:
            slot.actor.call(method)
