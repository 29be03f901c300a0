"""Forks: what is closed before a process is copied, and what the copy may use.

gRPC survives a fork only while none of its threads is at work. So before one, the channels of every sync
client are closed, which waits for those threads; publishers and subscriptions connect again by themselves and
lose nothing. grpc.aio cannot be stopped from outside its event loop: a process that was forked while one of
our aio channels was open, or its thread still ran, is told so by every client, in place of hanging, or
crashing once in a while.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

import grpc
import grpc.aio

from lynearm.wire.errors import PreconditionError


class Forkable(Protocol):
    """Something whose gRPC threads end when it is asked to."""

    def prepare_fork(self) -> None:
        """Close every channel; return when no thread of theirs is in gRPC."""
        ...


class _Forks:
    """What this process has open."""

    def __init__(self) -> None:
        self.guard = threading.RLock()
        """Held from before a fork until after it, so that nothing opens meanwhile."""
        self.forkables: WeakSet[Forkable] = WeakSet()
        self.aio_channels: WeakSet[grpc.aio.Channel] = WeakSet()
        self.is_broken = False
        self.anchor: grpc.Channel | None = None
        """Never connected, never closed: with its last channel gRPC would end its threads in the background,
        and a fork in the midst of that leaves a child that hangs."""
        self._aio_runs_at_fork = False
        self._inherited: list[object] = []

    def leave_to_parent(self, thing: object) -> None:
        self._inherited.append(thing)

    def before(self) -> None:
        self.guard.acquire()
        for forkable in list(self.forkables):
            forkable.prepare_fork()
        if is_aio_idling():
            gc.collect()
        self._aio_runs_at_fork = bool(self.aio_channels) or _has_aio_thread()

    def after_in_parent(self) -> None:
        self.guard.release()

    def after_in_child(self) -> None:
        self.guard = threading.RLock()
        if self._aio_runs_at_fork:
            self.is_broken = True
            self.leave_to_parent(list(self.aio_channels))
            self.aio_channels.clear()


_forks = _Forks()
os.register_at_fork(
    before=_forks.before,
    after_in_parent=_forks.after_in_parent,
    after_in_child=_forks.after_in_child,
)


def close_before_forks(forkable: Forkable) -> None:
    """Ask this, before each fork of this process, to close its channels."""
    with _forks.guard:
        _forks.forkables.add(forkable)


def note_aio_channel(channel: grpc.aio.Channel) -> None:
    """Say that children cannot use gRPC while this channel is open."""
    _forks.aio_channels.add(channel)


def forget_aio_channel(channel: grpc.aio.Channel) -> None:
    """Say that it is closed."""
    _forks.aio_channels.discard(channel)


def is_aio_idling() -> bool:
    """Whether grpc.aio is at work though no client is open: for others, or a closed channel's last calls."""
    return not _forks.aio_channels and _has_aio_thread()


def _has_aio_thread() -> bool:
    # From the first channel, server or call until the last is gone. The name is all that grpc shows of it.
    return any("_poll_wrapper" in thread.name for thread in threading.enumerate())


@contextmanager
def opening() -> Generator[None]:
    """A context in which a channel may be opened, and no other thread forks.

    Raises:
        PreconditionError: in a process in which gRPC does not work.
    """
    if _forks.is_broken:
        raise PreconditionError(
            "this process was forked while an AsyncTraceClient was connected, or grpc.aio at work for "
            "something else, and gRPC does not work in it",
            "start it by spawn or forkserver, or close the client before it and keep no exception of it",
        )
    with _forks.guard:
        if _forks.anchor is None:
            _forks.anchor = grpc.insecure_channel("127.0.0.1:1")
        yield


def leave_to_parent(thing: object) -> None:
    """Never destroy what belongs to the process that this one was forked from.

    To destroy its calls would use the parent's sockets, and locks that threads held which are not here.
    """
    _forks.leave_to_parent(thing)
