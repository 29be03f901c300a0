"""A teacher's worker in a Ray actor, and the Ray that it runs on."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Generator
from dataclasses import replace

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.placement import NodeView, WorkerShare, machine_memory_bytes
from lynearm.teacher.ray_cluster import Reservation, Untyped, live_nodes
from lynearm.teacher.slot import Place
from lynearm.teacher.worker import EngineFailedError, TeacherWorker
from lynearm.teacher.worker_progress import WorkerProgress
from lynearm.wire.errors import LynearmError, MissingDependencyError, TeacherError

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 100 << 20
"""Prompts go through it, traces never do; Ray's own default takes a third of the machine's memory."""

_START_TRIES = 3
"""Ray gives a node 30 s to start, which a machine under load may exceed; the next try is warm."""

_PROBE_SECONDS = 5.0


class WorkerLostError(TeacherError):
    """The actor died, or its engine did: a new one can go on."""


class WorkerOutOfReachError(WorkerLostError):
    """The actor does not answer, and Ray has not found out yet whether its process ended or its node."""


@contextlib.contextmanager
def ray_session(address: str, cpus: int) -> Generator[Untyped]:
    """The module `ray`, connected; a Ray that was started here is shut down at the end.

    Args:
        address: "local" starts one; anything else is where to connect. Within a process that is connected
            already, that connection is used and left open.
        cpus: CPUs that a Ray of our own offers.

    Raises:
        MissingDependencyError: without Ray.
        TeacherError: if Ray cannot be started or reached.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            f"the teacher needs Ray: {error}", "pip install 'lynearm[teacher]' or 'lynearm[teacher-cpu]'"
        ) from error
    module: Untyped = ray
    if module.is_initialized():
        yield module
        return
    arguments: dict[str, object] = {"address": address, "log_to_driver": False, "logging_level": "warning"}
    if address == "local":
        # Ray runs workers at nice 15 by default: on a busy machine they would starve.
        os.environ.setdefault("RAY_worker_niceness", "0")
        arguments |= {
            "num_cpus": cpus,
            "_memory": machine_memory_bytes(),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    _connect(module, address, arguments)
    try:
        yield module
    finally:
        module.shutdown()


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


def _connect(module: Untyped, address: str, arguments: dict[str, object]) -> None:
    remedy = "use --ray-address local, or start a Ray and name its address"
    if address == "local":
        remedy = "run the same command again; a busy machine may be too slow for Ray to start in time"
    for attempt in range(1, _START_TRIES + 1):
        try:
            _probe(address)
            module.init(**arguments)
            return
        # A local Ray that does not come up in time raises a bare Exception.
        except Exception as error:
            module.shutdown()
            if address != "local" or attempt == _START_TRIES:
                message = f"cannot reach or start Ray ({address}): {_last_line(error)}"
                raise TeacherError(message, remedy) from error
            logger.warning("Ray did not start (%s); trying again", _last_line(error))


def _probe(address: str) -> None:
    """Fail at once for an address where nobody listens: Ray tries for minutes, then exits the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS).close()


def _exit_detail(error: Exception) -> str:
    """How a process ended, out of what Ray says at length."""
    text = " ".join(str(error).split())
    _, found, detail = text.partition("Worker exit detail: ")
    if not found:
        return _last_line(error)
    return detail.partition(" Some common causes")[0].partition(" There are some")[0][:200].rstrip(". ")


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
