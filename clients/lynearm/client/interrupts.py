"""Ctrl-C as a request: the step that runs is finished first.

A `KeyboardInterrupt` may be raised between any two bytecodes, also where grpc holds a lock: what was seen
then is a RuntimeError about that lock, or a process that waits for it for ever. So the sync client's blocking
calls are `Interruptible`: the interrupt ends what they wait for, and is raised when they have left grpc. A
loop over a `Subscription` that should end in an orderly way is better asked to, with `stop_on_interrupt`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Self


@contextmanager
def stop_on_interrupt(
    stop: threading.Event | None = None, wake: Callable[[], None] | None = None
) -> Generator[threading.Event]:
    """An event that the first SIGINT sets; the second raises `KeyboardInterrupt` at once.

    Outside the main thread, where Python delivers no signals, only the caller can set the event.

    Args:
        stop: The event to use; a new one if not given.
        wake: Called after the first SIGINT, from another thread, to end what the main thread waits in:
            `Subscription.close`, for one.
    """
    event = stop if stop is not None else threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    interrupts: SimpleQueue[bool] = SimpleQueue()  # The one queue that a signal handler may write to.

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        interrupts.put(True)

    def wake_once() -> None:
        if interrupts.get() and wake is not None:
            wake()

    waker = threading.Thread(target=wake_once, name="wake-on-interrupt", daemon=True)
    waker.start()
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
        interrupts.put(False)
        waker.join()


class Interruptible:
    """A context in which Ctrl-C raises nothing until it is left; it ends what is waited for there.

    It does so in the main thread, where SIGINT would raise `KeyboardInterrupt`; elsewhere, or where a program
    handles the signal in its own way, it does nothing. A second Ctrl-C raises at once.
    """

    __slots__ = ("_is_active", "_wake", "was_interrupted")

    def __init__(self) -> None:
        self.was_interrupted = False
        self._is_active = False
        self._wake: Callable[[], object] | None = None

    def __enter__(self) -> Self:
        """Hold interrupts back."""
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            _waker.start()
            self._is_active = True
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise the interrupt that came, in place of whatever it made fail."""
        if self._is_active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.was_interrupted:
            raise KeyboardInterrupt

    @property
    def is_active(self) -> bool:
        """Whether an interrupt would be held back."""
        return self._is_active

    def wake_by(self, wake: Callable[[], object]) -> None:
        """Say what ends the waiting. Called from another thread, and perhaps twice."""
        self._wake = wake
        if self.was_interrupted:
            wake()

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self.was_interrupted:
            raise KeyboardInterrupt
        self.was_interrupted = True
        if self._wake is not None:
            # grpc's locks may be held by the very frame that this handler interrupts.
            _waker.call(self._wake)


class _Waker:
    """A thread that calls what it is told to; started when first needed, in each process anew."""

    def __init__(self) -> None:
        self._pid = 0
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def start(self) -> None:
        if self._pid != os.getpid():
            self._pid, self._calls = os.getpid(), SimpleQueue()
            threading.Thread(target=self._run, name="wake-on-interrupt", daemon=True).start()

    def call(self, function: Callable[[], object]) -> None:
        """Safe in a signal handler."""
        self._calls.put(function)

    def _run(self) -> None:
        while True:
            self._calls.get()()


_waker = _Waker()
