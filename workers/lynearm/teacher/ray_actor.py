"""A teacher's worker in a Ray actor, and the Ray that it runs on."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import replace

from lynearm.cluster.session import RayUse, last_line, ray_session
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.placement import NodeView, WorkerShare, machine_memory_bytes
from lynearm.teacher.ray_cluster import Reservation, Untyped, live_nodes
from lynearm.teacher.slot import Place
from lynearm.teacher.worker import EngineFailedError, TeacherWorker
from lynearm.teacher.worker_progress import WorkerProgress
from lynearm.wire.errors import LynearmError, TeacherError

logger = logging.getLogger(__name__)

_USE = RayUse("the teacher", "pip install 'lynearm[teacher]' or 'lynearm[teacher-cpu]'", error=TeacherError)


class WorkerLostError(TeacherError):
    """The actor died, or its engine did: a new one can go on."""


class WorkerOutOfReachError(WorkerLostError):
    """The actor does not answer, and Ray has not found out yet whether its process ended or its node."""


def teacher_session(address: str, cpus: int) -> AbstractContextManager[Untyped]:
    """The module `ray`, connected: see `ray_session`.

    Args:
        address: "local" starts one.
        cpus: CPUs that a Ray of our own offers.

    Raises:
        MissingDependencyError: without Ray.
        TeacherError: if Ray cannot be started or reached.
    """
    return ray_session(address, _USE, local={"num_cpus": cpus, "_memory": machine_memory_bytes()})


class WorkerActor:
    """Handle of one actor that owns a `TeacherWorker`. Ray never restarts it: the supervisor does.

    Args:
        ray: The connected module.
        config: The worker's.
        share: What it takes of its node.
        place: Where it runs.
        producer_id: Names its blocks.
        holder: Names its leases.
    """

    def __init__(
        self,
        ray: Untyped,
        config: TeachConfig,
        share: WorkerShare,
        place: Place,
        *,
        producer_id: str,
        holder: str,
    ) -> None:
        self._ray = ray
        remote_class = ray.remote(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            memory=share.memory_bytes or None,
            scheduling_strategy=place.strategy(),
            max_restarts=0,
            max_task_retries=0,
            # One works, one answers for progress, one takes the order to end.
            max_concurrency=3,
        )(TeacherWorker)
        self._actor = remote_class.remote(config, producer_id, holder)
        self._actor.end_with_parent.remote()
        self._asked: Untyped = None

    def call(self, method: str, *arguments: object) -> Untyped:
        """Start a method of `TeacherWorker`; `finished` and `result` take what this returns."""
        return getattr(self._actor, method).remote(*arguments)

    def kill(self) -> None:
        """End it at once. Harmless for one that is dead."""
        self._ray.kill(self._actor)

    def finished(self, reference: Untyped, timeout_seconds: float = 0.0) -> bool:
        """Whether a call came to its end, in whatever way, within the time."""
        ready, _ = self._ray.wait([reference], timeout=timeout_seconds)
        return bool(ready)

    def result(self, reference: Untyped) -> Untyped:
        """What a call returned.

        Raises:
            WorkerLostError: if the actor died on the way, or its engine did.
            WorkerOutOfReachError: if it went, and it is not known how.
            LynearmError: what the call raised; TeacherError for anything else.
        """
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EngineFailedError):
                raise WorkerLostError(cause.message, cause.remedy) from error
            if isinstance(cause, LynearmError):
                raise cause from error
            raise TeacherError(f"the teacher failed: {type(cause).__name__}: {cause}") from error
        except self._ray.exceptions.ActorUnavailableError as error:
            raise WorkerOutOfReachError("the teacher's process cannot be reached") from error
        # Also what is no RayActorError: a node that went, or memory that ran out.
        except self._ray.exceptions.RayError as error:
            raise WorkerLostError(f"the teacher's process died: {_exit_detail(error)}") from error

    def progress(self) -> WorkerProgress | None:
        """How far it is, if it has answered since it was asked last. Never waits."""
        # One question at a time: an actor that is slow to answer would else answer a queue of old ones first.
        if self._asked is None:
            self._asked = self._actor.progress.remote()
        if not self.finished(self._asked):
            return None
        asked, self._asked = self._asked, None
        try:
            progress: WorkerProgress = self._ray.get(asked)
        except self._ray.exceptions.RayError:
            return None
        return progress


class RayWorkers:
    """Places and starts workers on a connected Ray.

    Args:
        ray: The module.
        config: Of each worker.
    """

    def __init__(self, ray: Untyped, config: TeachConfig) -> None:
        self._ray = ray
        self._config = config

    def nodes(self) -> list[NodeView]:
        """The nodes that are alive."""
        return live_nodes(self._ray)

    def reserve(self, share: WorkerShare) -> Reservation:
        """Ask for a share of some node."""
        return Reservation(self._ray, share)

    def start(self, share: WorkerShare, place: Place, *, producer_id: str, holder: str) -> WorkerActor:
        """Start a worker in a place that it has been given."""
        # "All" threads are those of its share: another worker has the rest of the node.
        threads = self._config.threads or (0 if share.gpus else int(share.cpus))
        config = replace(self._config, threads=threads)
        return WorkerActor(self._ray, config, share, place, producer_id=producer_id, holder=holder)


def _exit_detail(error: Exception) -> str:
    """How a process ended, out of what Ray says at length."""
    text = " ".join(str(error).split())
    _, found, detail = text.partition("Worker exit detail: ")
    if not found:
        return last_line(error)
    return detail.partition(" Some common causes")[0].partition(" There are some")[0][:200].rstrip(". ")
