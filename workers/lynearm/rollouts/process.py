"""The trainer's side of a rollout process: starts it, tells it, listens, and puts another one in its place.

Invariants: at most one process at a time. One that ends by itself is replaced, which begins with the latest
weights; after `MAX_RESTARTS` in a row that published nothing, or an error that another would come to as well,
that error is raised on the training thread, and never passed over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lynearm.rollouts.config import RolloutConfig
from lynearm.rollouts.messages import (
    Failed,
    Loaded,
    Message,
    Status,
    Stop,
    Weights,
    decode_message,
    encode_message,
)
from lynearm.wire import errors
from lynearm.wire.errors import InternalError, LynearmError, TrainingError

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
LOG_FILE = "rollouts.log"

_PAUSE_SECONDS = 1.0
"""Before another process is started; doubles each time in a row."""
_FAREWELL_SECONDS = 30.0
_KILL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class RolloutStatus:
    """How the rollouts of a run go; counts over all processes of this trainer."""

    activity: str
    """For people: what the process does, or what it waits for."""
    loaded_step: int | None
    """Steps that made the weights that write; None before the first."""
    rollouts: int
    """Scored and in the stream."""
    tokens: int
    """Written."""
    tokens_per_second: float
    scored_tokens: int
    """Answered by the teacher."""
    divergence: float | None
    """Estimate of the reverse KL on the student's own text, nats per token; None where there is none."""
    waiting_teacher_seconds: float
    waiting_trainer_seconds: float
    restarts: int
    stale_rollouts: int = 0
    """That were too old when the trainer came to them."""


class RolloutProcess:
    """A process that writes rollouts. Of its methods, those that start or stop it belong to one thread.

    Args:
        directory: For the log.
        variables: Environment of the process, beside this one's: the GPUs that it sees, for one.
        command: What is run; tests run something else.
    """

    def __init__(
        self,
        directory: Path,
        variables: Mapping[str, str] | None = None,
        command: tuple[str, ...] = (sys.executable, "-m", "lynearm.rollouts"),
    ) -> None:
        self._directory = directory
        self._variables = dict(variables or {})
        self._command = command
        self._speech = threading.Lock()
        self._lock = threading.Lock()
        # Guarded by _lock: written by the thread that listens.
        self._status = Status()
        self._loaded_step: int | None = None
        self._failed: Failed | None = None
        # What ended processes have done.
        self._ended = Status()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._restarts = 0
        self._in_a_row = 0
        self._not_before = 0.0

    @property
    def is_running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def process_id(self) -> int | None:
        """Of the present process; None without one."""
        return None if self._process is None else self._process.pid

    @property
    def loaded_step(self) -> int | None:
        """Steps that made the weights that the present process has loaded; None before."""
        with self._lock:
            return self._loaded_step

    @property
    def status(self) -> RolloutStatus:
        """How it goes."""
        with self._lock:
            now, before = self._status, self._ended
            return RolloutStatus(
                activity=now.activity if self.is_running else "starting",
                loaded_step=self._loaded_step,
                rollouts=before.rollouts + now.rollouts,
                tokens=before.tokens + now.tokens,
                tokens_per_second=now.tokens_per_second,
                scored_tokens=before.scored_tokens + now.scored_tokens,
                divergence=before.divergence if now.divergence is None else now.divergence,
                waiting_teacher_seconds=before.waiting_teacher_seconds + now.waiting_teacher_seconds,
                waiting_trainer_seconds=before.waiting_trainer_seconds + now.waiting_trainer_seconds,
                restarts=self._restarts,
            )

    def keep_running(self, make_config: Callable[[], RolloutConfig], weights: Weights) -> bool:
        """Start a process if there is none; whether one was started.

        Args:
            make_config: What it is told, as things stand.
            weights: Those that it begins with.

        Raises:
            LynearmError: what the process said, where another one would say the same.
            TrainingError: if processes keep ending.
        """
        if self.is_running:
            return False
        if self._process is not None:
            self._note_end(self._process)
        if time.monotonic() < self._not_before:
            return False
        self._start(make_config())
        self.tell(weights)
        return True

    def tell(self, message: Message) -> None:
        """Say something to the process, from any thread; one that has ended hears nothing."""
        process = self._process
        if process is not None and process.stdin is not None:
            with self._speech, contextlib.suppress(OSError, ValueError):
                process.stdin.write(encode_message(message))
                process.stdin.flush()

    def stop(self) -> None:
        """End the process: it has some time to publish what is scored."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if process.stdin is not None:
                process.stdin.write(encode_message(Stop()))
                process.stdin.close()
        for seconds, end in ((_FAREWELL_SECONDS, process.terminate), (_KILL_SECONDS, process.kill)):
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                end()
        process.wait()
        self._join_listener()

    def _start(self, config: RolloutConfig) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / LOG_FILE).open("ab") as log:
            # A fresh interpreter: gRPC, torch and CUDA do not survive a fork.
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self._variables},
            )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        with contextlib.suppress(OSError):
            process.stdin.write(config.to_json().encode() + b"\n")
            process.stdin.flush()
        self._listener = threading.Thread(
            target=self._listen, args=(process.stdout,), name="hear-rollouts", daemon=True
        )
        self._listener.start()

    def _listen(self, output: IO[bytes]) -> None:
        with output:
            for line in output:
                try:
                    message = decode_message(line)
                except InternalError as error:
                    logger.warning("%s", error)
                    continue
                with self._lock:
                    if isinstance(message, Status):
                        self._status = message
                    elif isinstance(message, Loaded):
                        self._loaded_step = message.step
                    elif isinstance(message, Failed):
                        self._failed = message

    def _note_end(self, process: subprocess.Popen[bytes]) -> None:
        """Count the end of a process, and settle when the next one may start."""
        self._join_listener()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        self._process = None
        status = self.status
        with self._lock:
            published = self._status.rollouts
            self._ended = Status(
                rollouts=status.rollouts,
                tokens=status.tokens,
                scored_tokens=status.scored_tokens,
                divergence=status.divergence,
                waiting_teacher_seconds=status.waiting_teacher_seconds,
                waiting_trainer_seconds=status.waiting_trainer_seconds,
            )
            self._status, self._loaded_step = Status(), None
            failed, self._failed = self._failed, None
        self._in_a_row = 0 if published else self._in_a_row
        if failed is not None and failed.is_lasting:
            raise _error_of(failed)
        reason = failed.message if failed is not None else f"it ended with status {process.returncode}"
        if self._in_a_row >= MAX_RESTARTS:
            raise TrainingError(
                f"the rollout process was started {MAX_RESTARTS + 1} times and keeps ending: {reason}",
                f"look into {self._directory / LOG_FILE}; the run goes on with --resume",
            )
        logger.warning("the rollout process is replaced: %s", reason)
        self._not_before = time.monotonic() + _PAUSE_SECONDS * 2**self._in_a_row
        self._in_a_row += 1
        self._restarts += 1

    def _join_listener(self) -> None:
        if self._listener is not None:
            self._listener.join(_KILL_SECONDS)
            self._listener = None


def _error_of(failed: Failed) -> LynearmError:
    """What a process said, as the error that it was."""
    kind: object = getattr(errors, failed.error, None)
    if isinstance(kind, type) and issubclass(kind, LynearmError):
        return kind(failed.message, failed.remedy)
    return TrainingError(failed.message, failed.remedy)
