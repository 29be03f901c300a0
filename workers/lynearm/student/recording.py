"""Keeps what a run measures: in its file of metrics always, with trackers when asked; says when it stalls."""

from __future__ import annotations

from collections.abc import Sequence

from lynearm.student.checkpoint import TrainState
from lynearm.student.config import TrainConfig
from lynearm.student.metrics import MetricsLog, metric_values
from lynearm.student.progress import EvaluationRecord, StepRecord
from lynearm.student.trackers import open_tracker


class Recorder:
    """Hands each record of a run to its file and its trackers; `close` it.

    Args:
        config: Names the directory and the trackers.
        state: Where the run begins: what it has recorded so far.

    Raises:
        CheckpointError: if the file cannot be written.
        MissingDependencyError: if a tracker's package is not installed.
    """

    def __init__(self, config: TrainConfig, state: TrainState) -> None:
        self._trackers = [open_tracker(name, config, step=state.step) for name in config.trackers]
        self._log = MetricsLog(config.out, state.curve, state.evaluations)

    def add(self, record: StepRecord | EvaluationRecord) -> None:
        """Keep a record.

        Raises:
            CheckpointError: if it cannot be written.
        """
        self._log.add(record)
        if self._trackers:
            values = metric_values(record)
            for tracker in self._trackers:
                tracker.log(values, record.step)

    def close(self) -> None:
        """Send what is left, and write no more."""
        self._log.close()
        for tracker in self._trackers:
            tracker.close()


def has_stalled(evaluations: Sequence[EvaluationRecord], patience: int) -> bool:
    """Whether the last `patience` measurements all failed to lower the held-out KL; 0 never stalls."""
    if not patience or len(evaluations) <= patience:
        return False
    best_before = min(record.kl for record in evaluations[:-patience])
    # Written so that a KL that is not a number counts as no improvement.
    return not any(record.kl < best_before for record in evaluations[-patience:])
