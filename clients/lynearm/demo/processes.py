"""Runs the roles of a demo as what they are elsewhere: processes of the `lynearm` command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

from lynearm.wire.errors import InternalError, LynearmError

Event: TypeAlias = Mapping[str, Any]
"""One line of `--progress json`. Any: fields differ by event, and come from JSON."""

_STOP_SECONDS = 20.0
_SHOWN_LOG_LINES = 3


class RoleProcess:
    """A `lynearm` verb in a process of its own, whose progress events are handed to a function.

    Use it as a context manager: leaving it stops the process as Ctrl-C would.

    Args:
        role: Name for people and for the log file.
        arguments: What follows `lynearm` on the command line.
        log_path: File that receives the process's standard error.
        on_event: Called from a thread of the process's own, once for each event, in order.
        threads: CPU threads that numeric libraries may use; 0 leaves that to them.
    """

    def __init__(
        self,
        role: str,
        arguments: Sequence[str],
        *,
        log_path: Path,
        on_event: Callable[[Event], None],
        threads: int = 0,
    ) -> None:
        self.role = role
        self._log_path = log_path
        self._on_event = on_event
        self._failure: BaseException | None = None
        with log_path.open("wb") as log:
            # A session of its own: the terminal's Ctrl-C reaches the demo alone, which stops roles in order.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lynearm.cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(threads),
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, name=f"read-{role}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        """The process itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the process."""
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait for a successful end.

        Returns:
            False if it still runs after `timeout_seconds`.

        Raises:
            LynearmError: if the process failed, with the last lines that it said.
        """
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        self._reader.join()
        if self._failure is not None:
            raise self._failure
        if code != 0:
            raise self._error(code)
        return True

    def stop(self) -> None:
        """Interrupt the process, and kill it if it does not leave."""
        if self.running:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._reader.join(_STOP_SECONDS)

    def _read(self) -> None:
        stdout = self._process.stdout
        if stdout is None:
            return
        with stdout:
            for line in stdout:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # what a library prints on stdout is not ours
                if isinstance(event, dict):
                    self._deliver(cast("Event", event))

    def _deliver(self, event: Event) -> None:
        try:
            self._on_event(event)
        except BaseException as error:  # reported by `wait`, in the thread that owns the process
            self._failure = self._failure or error

    def _error(self, code: int) -> LynearmError:
        lines = self._log_path.read_text(errors="replace").strip().splitlines()[-_SHOWN_LOG_LINES:]
        said = " | ".join(line.strip() for line in lines) or "nothing"
        return InternalError(
            f"`lynearm {self.role}` ended with code {code}, saying: {said}",
            f"its whole log is {self._log_path}",
        )


def _environment(threads: int) -> dict[str, str]:
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    # Unbuffered, so that events arrive when they happen.
    environment["PYTHONUNBUFFERED"] = "1"
    return environment
