"""A teacher's worker with prompts that end its engine, for tests of what becomes of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from lynearm.teacher.worker import TeacherWorker
from lynearm.teacher.worker_progress import LeasedWork

POISON = "poison"
"""A prompt whose id begins with it makes the engine raise an error, and ends the process when it is alone."""

STEP_SECONDS = 0.05
"""Beside each step, so that a job takes long enough to be disturbed and the machine has little to do."""


class FaultyWorker(TeacherWorker):
    """Real in all but its faults."""

    def attempt(self, work: Sequence[LeasedWork]) -> None:
        """Die of a poisoned prompt as a process does in which memory is corrupted."""
        prompts = [prompt for one in work for prompt in one.prompts]
        if len(prompts) == 1 and prompts[0].prompt_id.startswith(POISON):
            os.kill(os.getpid(), signal.SIGKILL)
        super().attempt(work)

    def _step(self) -> None:
        time.sleep(STEP_SECONDS)
        if any(prompt_id.startswith(POISON) for prompt_id in self._pending):
            self._of_engine(_fail)
        super()._step()


def _fail() -> Any:
    raise RuntimeError("CUDA error: device-side assert triggered")
