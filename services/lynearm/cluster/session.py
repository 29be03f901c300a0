"""A connection to Ray, or a Ray of one's own for as long as it is needed."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lynearm.wire.errors import LynearmError, MissingDependencyError

logger = logging.getLogger(__name__)

Untyped: TypeAlias = Any
"""An object of Ray, whose remote calls no checker can follow."""

LOCAL = "local"
"""Address of a Ray that is started here, and ends with its session."""

_OBJECT_STORE_BYTES = 100 << 20
"""Prompts and progress go through it, traces never do; Ray's own default takes a third of the machine's
memory."""

_START_TRIES = 3
"""Ray gives a node 30 s to start, which a machine under load may exceed; the next try is warm."""

_PROBE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class RayUse:
    """What needs Ray, for errors that say what to do."""

    subject: str
    """As in "the teacher needs Ray"."""
    install: str
    """Command that installs it."""
    error: type[LynearmError]
    """Raised when Ray cannot be reached or started."""
    remedy: str = "use --ray-address local, or start a Ray and name its address"
    modules: tuple[str, ...] = ()
    """Of Ray, which have to be there as well."""


@contextlib.contextmanager
def ray_session(
    address: str, use: RayUse, *, local: Mapping[str, object] | None = None, namespace: str | None = None
) -> Generator[Untyped]:
    """The module `ray`, connected; a Ray that was started here is shut down at the end.

    Within a process that is connected already, that connection is used and left open.

    Args:
        address: `LOCAL` starts one; anything else is where to connect.
        use: What for.
        local: Arguments of `ray.init` for a Ray that is started here, such as `num_cpus`.
        namespace: Of named actors; None: one that nobody else has.

    Raises:
        MissingDependencyError: without Ray.
        LynearmError: `use.error`, if Ray cannot be started or reached.
    """
    module = _load(use)
    if module.is_initialized():
        yield module
        return
    arguments: dict[str, object] = {"address": address, "log_to_driver": False, "logging_level": "warning"}
    if namespace is not None:
        arguments["namespace"] = namespace
    if address == LOCAL:
        # Ray runs workers at nice 15 by default: on a busy machine they would starve.
        os.environ.setdefault("RAY_worker_niceness", "0")
        arguments |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES, **(local or {})}
    _connect(module, address, arguments, use)
    try:
        yield module
    finally:
        module.shutdown()


def last_line(error: Exception) -> str:
    """What Ray says of an error, which it does at length, and at the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300].rstrip(".") if lines else type(error).__name__


def _load(use: RayUse) -> Untyped:
    try:
        for name in use.modules:
            importlib.import_module(name)
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingDependencyError(f"{use.subject} needs Ray: {error}", use.install) from error


def _connect(module: Untyped, address: str, arguments: Mapping[str, object], use: RayUse) -> None:
    for attempt in range(1, _START_TRIES + 1):
        try:
            _probe(address)
            module.init(**arguments)
            return
        # Ray raises ConnectionError, ValueError, RuntimeError or a bare Exception, as the case may be.
        except Exception as error:
            module.shutdown()
            if address != LOCAL:
                raise use.error(f"cannot reach Ray ({address}): {last_line(error)}", use.remedy) from error
            if attempt == _START_TRIES:
                raise use.error(
                    f"cannot start Ray here: {last_line(error)}",
                    "run the same command again; a busy machine may be too slow for Ray to start in time",
                ) from error
            logger.warning("Ray did not start (%s); trying again", last_line(error))


def _probe(address: str) -> None:
    """Fail at once for an address where nobody listens: Ray tries for minutes, then exits the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS).close()
