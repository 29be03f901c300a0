"""Calls that may take long, beside a loop that must not wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Chore(Generic[Result]):
    """One call on a thread of its own, which does not keep the process alive.

    Args:
        work: The call.
        name: Of the thread.
    """

    def __init__(self, work: Callable[[], Result], name: str) -> None:
        self._work = work
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether `result` has something to say."""
        return not self._thread.is_alive()

    def result(self) -> Result:
        """What the call returned; waits for it, or raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        # Raised where the result is asked for.
        except BaseException as error:
            self._error = error
