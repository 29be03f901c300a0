"""Ctrl-C as a request: the step that runs is finished first.

A `KeyboardInterrupt` may be raised between any two bytecodes, also where grpc holds a lock: what was seen
then is a RuntimeError about that lock, or a process that waits for it for ever. A loop over a `Subscription`
should therefore be asked to end, and not be torn out of it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType


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
