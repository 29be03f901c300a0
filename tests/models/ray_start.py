"""Starts of Ray on a machine that may be busy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def patiently(start: Callable[[], T]) -> T:
    """Ray gives a node 30 s to start, which a busy machine may exceed; the next try is warm."""
    for _ in range(2):
        try:
            return start()
        # A node that does not come up in time raises a bare Exception.
        except Exception as error:
            print(f"Ray did not start ({error}); trying again")
    return start()
