"""Writes checkpoints beside the training: the loop pays for a copy in memory, not for the disk.

Invariants: at most one checkpoint is written at a time, so that they come in order; what went wrong is raised
on the training thread, at the next save or at the end, and never passed over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from torch import Tensor

from lynearm.student.model import StudentModel


class CheckpointWriter:
    """Runs one write at a time on a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Start a write, once the one before has ended.

        Args:
            write: Must not touch what the training changes.

        Raises:
            CheckpointError: what the write before came to; the new one is not started then.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name="write-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: if the last write failed; said once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error


def copy_weights(student: StudentModel) -> dict[str, Tensor]:
    """What a checkpoint holds of the model, on the CPU and in memory of its own: all of it, or its adapter.

    Tensors that are tied stay tied.
    """
    if student.adapter is not None:
        return copy_tensors(student.adapter.weights())
    copies: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in student.model.state_dict().items():
        key = (int(tensor.data_ptr()), tuple(tensor.shape))
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        weights[name] = copies[key]
    return weights


def copy_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, in memory of its own."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
