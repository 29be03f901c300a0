"""A teacher's worker in a Ray actor, and the Ray that it runs on."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Generator
from typing import Any, TypeAlias

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.worker import TeacherWorker, WorkerProgress
from lynearm.wire.errors import LynearmError, MissingDependencyError, PromptFinishedError, TeacherError
from lynearm.wire.specs import StreamSpec

logger = logging.getLogger(__name__)

Untyped: TypeAlias = Any
"""An object of Ray, whose remote calls no checker can follow."""

_OBJECT_STORE_BYTES = 100 << 20
"""Prompts go through it, traces never do; Ray's own default takes a third of the machine's memory."""

_START_TRIES = 3
"""Ray gives a node 30 s to start, which a machine under load may exceed; the next try is warm."""

_PROBE_SECONDS = 5.0


class WorkerLostError(TeacherError):
    """The actor died, or was overtaken: a new one can go on."""


@contextlib.contextmanager
def ray_session(address: str, cpus: int) -> Generator[Untyped]:
    """The module `ray`, connected; a Ray that was started here is shut down at the end.

    Args:
        address: "local" starts one; anything else is where to connect; empty: RAY_ADDRESS where it is set,
            else "local". Within a process that is connected already, that connection is used and left open.
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
    # Ray's own variable, which it sets for a submitted job: "auto" reads it.
    address = address or ("auto" if os.environ.get("RAY_ADDRESS") else "local")
    arguments: dict[str, object] = {"address": address, "log_to_driver": False, "logging_level": "warning"}
    if address == "local":
        # Ray runs workers at nice 15 by default: on a busy machine they would starve.
        os.environ.setdefault("RAY_worker_niceness", "0")
        arguments |= {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    _connect(module, address, arguments)
    try:
        yield module
    finally:
        module.shutdown()


class WorkerActor:
    """Handle of one actor that owns a `TeacherWorker`. Ray never restarts it: the job does.

    Args:
        ray: The connected module.
        config: The worker's.
        cpus: CPUs that the actor asks Ray for.
    """

    def __init__(self, ray: Untyped, config: TeachConfig, cpus: int) -> None:
        self._ray = ray
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        # Three threads: one runs, one answers for progress, one takes the order to stop.
        remote_class = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=3
        )(TeacherWorker)
        self._actor = remote_class.remote(config)
        self._asked: Untyped = None

    def load(self) -> Untyped:
        """Start loading; `wait` on what this returns."""
        return self._actor.load.remote()

    def run(self, spec: StreamSpec, prompts: Untyped) -> Untyped:
        """Start running; `wait` on what this returns."""
        return self._actor.run.remote(spec, prompts)

    def stop(self) -> None:
        """Ask it to stop; `run` returns soon after."""
        self._actor.stop.remote()

    def kill(self) -> None:
        """End it at once. Harmless for one that is dead."""
        self._ray.kill(self._actor)

    def finished(self, reference: Untyped, timeout_seconds: float) -> bool:
        """Whether a call came to its end, in whatever way, within the time."""
        ready, _ = self._ray.wait([reference], timeout=timeout_seconds)
        return bool(ready)

    def result(self, reference: Untyped) -> Untyped:
        """What a call returned.

        Raises:
            WorkerLostError: if the actor died on the way, or its stream finished a prompt behind its back.
            LynearmError: what the call raised; TeacherError for anything else.
        """
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            raise WorkerLostError(f"the teacher's process died: {_last_line(error)}") from error
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, PromptFinishedError):
                raise WorkerLostError(cause.message, cause.remedy) from error
            if isinstance(cause, LynearmError):
                raise cause from error
            raise TeacherError(f"the teacher failed: {type(cause).__name__}: {cause}") from error
        except self._ray.exceptions.RayError as error:
            raise TeacherError(f"Ray failed: {_last_line(error)}", "run the same command again") from error

    def progress(self, timeout_seconds: float) -> WorkerProgress | None:
        """How far it is; None when it has not answered yet, as while it imports, or is dead."""
        # One question at a time: an actor that is slow to answer would else answer a queue of old ones first.
        if self._asked is None:
            self._asked = self._actor.progress.remote()
        if not self.finished(self._asked, timeout_seconds):
            return None
        asked, self._asked = self._asked, None
        try:
            progress: WorkerProgress = self._ray.get(asked)
        except self._ray.exceptions.RayError:
            return None
        return progress


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


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
