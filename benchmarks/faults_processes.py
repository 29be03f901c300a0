"""The processes of one site by their roles: started by a fork, ended by SIGKILL, watched."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

STALL_SECONDS = 90.0
"""Without any progress: a hang, which is a finding."""

KILLED = -9
"""Exit code of what was killed."""

context = multiprocessing.get_context("forkserver")

# Starting a process, multiprocessing looks whether any other has ended; two threads that look at the same
# one both read its exit status, which is there once.
_lock = threading.Lock()


class FaultFound(Exception):
    """Something happened that no kill explains."""


class Processes:
    """One process for each role, or none.

    Args:
        directory: Where a role's log is.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._by_role: dict[str, ForkServerProcess] = {}

    @property
    def roles(self) -> list[str]:
        """Those that were started and not seen off by `await_success`."""
        return list(self._by_role)

    def start(self, role: str, body: Callable[..., None], *arguments: object) -> None:
        """Start a process; the one before it is dead."""
        with _lock:
            process = context.Process(target=body, args=arguments, daemon=True)
            process.start()
        self._by_role[role] = process

    def is_alive(self, role: str) -> bool:
        with _lock:
            return self._by_role[role].is_alive()

    def exit_code(self, role: str) -> int | None:
        with _lock:
            return self._by_role[role].exitcode

    def wait(self, role: str, seconds: float = STALL_SECONDS) -> None:
        """Wait for its end, for so long."""
        deadline = time.monotonic() + seconds
        while self.is_alive(role) and time.monotonic() < deadline:
            time.sleep(0.002)

    def kill(self, *roles: str) -> None:
        """Kill them in the same instant, as far as there is one.

        Raises:
            FaultFound: one had ended in another way.
        """
        for role in roles:
            self._by_role[role].kill()
        for role in roles:
            self.wait(role)
            if self.exit_code(role) != KILLED:
                raise self.ended(role)

    def await_success(self, role: str) -> None:
        """Wait until it has finished.

        Raises:
            FaultFound: it failed, or did not finish.
        """
        self.wait(role)
        if self.exit_code(role) != 0:
            raise self.ended(role)
        del self._by_role[role]

    def ended(self, role: str) -> FaultFound:
        """What to say of a process that ended by itself, or did not end when it should have."""
        path = self._directory / f"{role}.log"
        lines = path.read_text(errors="replace").splitlines()[-30:] if path.exists() else []
        return FaultFound("\n".join((f"the {role} ended with {self.exit_code(role)}", *lines)))

    def end(self) -> None:
        """Kill what is left."""
        for role in self.roles:
            self._by_role[role].kill()
            self.wait(role)
