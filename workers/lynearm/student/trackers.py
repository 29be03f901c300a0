"""Sends a run's figures to TensorBoard, Weights & Biases or Trackio, each only when it is asked for.

A resumed run goes on in the same place: TensorBoard forgets what a killed run had written after its last
checkpoint; the other two find their run again by its name, which is that of the run's directory.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from lynearm.student.config import TrainConfig
from lynearm.wire.errors import MissingDependencyError

PROJECT = "lynearm"
"""Of the runs, at W&B and Trackio."""


class Tracker(Protocol):
    """Takes figures; called on the training thread."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show figures at a step."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


def open_tracker(name: str, config: TrainConfig, *, step: int = 0) -> Tracker:
    """A tracker by name.

    Args:
        name: One of `config.TRACKERS`.
        config: Of the run; its settings are shown beside the figures.
        step: Steps that are done, for a run that is resumed.

    Raises:
        MissingDependencyError: if its package is not installed.
    """
    return _OPEN[name](config, step)


class _TensorBoard:
    def __init__(self, config: TrainConfig, step: int) -> None:
        writer_module = _import("torch.utils.tensorboard", "tensorboard")
        directory = str(config.out / "tensorboard")
        self._writer: Any = writer_module.SummaryWriter(directory, purge_step=step + 1 if step else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, config: TrainConfig, step: int) -> None:
        self._run: Any = _import("wandb", "wandb").init(
            project=PROJECT,
            name=config.out.name,
            id=_run_id(config.out),
            resume="allow",
            config=_settings(config),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, config: TrainConfig, step: int) -> None:
        self._module: Any = _import("trackio", "trackio")
        self._module.init(project=PROJECT, name=config.out.name, resume="allow", config=_settings(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


_OPEN: Mapping[str, Callable[[TrainConfig, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "trackio": _Trackio,
}


def _import(module: str, package: str) -> Any:  # Any: none of them is typed for strict checkers
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"the tracker {package!r} needs the package {package}", f"pip install {package}"
        ) from error


def _run_id(out: Path) -> str:
    """The same for every part of a run."""
    return hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()


def _settings(config: TrainConfig) -> dict[str, object]:
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in asdict(config).items()
    }
