"""Ctrl-C as a request: the step that runs is finished and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_interrupt(stop: threading.Event | None = None) -> Generator[threading.Event]:
    """An event that the first SIGINT sets; the second raises `KeyboardInterrupt` at once.

    Outside the main thread, where Python delivers no signals, only the caller can set the event.

    Args:
        stop: The event to use; a new one if not given.
    """
    event = stop if stop is not None else threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
