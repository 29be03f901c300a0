"""Benchmarks by the names that EleutherAI's harness gives them, on a student that is being trained.

Rank 0 runs them, and the others wait for its figures: a task is not cut into shares. The training's random
generators are left as they were, so that a run goes on as if nothing had been measured.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any, cast

import numpy as np
import torch

from lynearm.student.config import TrainConfig
from lynearm.student.model import StudentModel, load_tokenizer
from lynearm.wire.errors import ConfigError, LynearmError, MissingDependencyError, TrainingError

BATCH_REQUESTS = 8
"""Answered at once, as in `exact_match`."""


class Harness:
    """The tasks of a configuration.

    Args:
        config: Names the tasks, the folder of further ones, and how many examples of each count.
        student: Its tokenizer is read once.

    Raises:
        MissingDependencyError: if lm-eval is not installed.
        ConfigError: if there is no task of a name.
    """

    def __init__(self, config: TrainConfig, student: StudentModel) -> None:
        self._evaluator: Any = _import("lm_eval.evaluator")
        self._models: Any = _import("lm_eval.models.huggingface")
        self._tokenizer: Any = load_tokenizer(student.directory)
        folder = str(config.lm_eval_path) if config.lm_eval_path else None
        try:
            self._tasks: Any = _import("lm_eval.tasks").TaskManager(include_path=folder)
        # What a task's file can be wrong in is not the library's to list.
        except Exception as error:
            raise ConfigError(
                f"the tasks of {folder or 'lm-eval'} cannot be read: {error}", "see lm-eval's guide"
            ) from error
        self._names = config.lm_eval
        self._limit = config.lm_eval_limit or None
        self._max_length = config.max_sequence_tokens
        unknown = sorted(set(self._names) - set(cast("list[str]", self._tasks.all_tasks)))
        if unknown:
            raise ConfigError(
                f"lm-eval has no task {', '.join(unknown)}",
                "`lm-eval ls tasks` lists those that it has; --lm-eval-path names a folder of further ones",
            )

    def measure(self, student: StudentModel) -> dict[str, float]:
        """Figures by TASK/METRIC, a metric of a filter being METRIC,FILTER.

        Args:
            student: In training mode afterwards.

        Raises:
            TrainingError: if a task cannot be run, as where its data cannot be fetched.
        """
        student.train(False)
        try:
            with _quiet(), _generators_kept(student.device), _autocast(student):
                model = self._models.HFLM(
                    pretrained=student.model,
                    tokenizer=self._tokenizer,
                    backend="causal",
                    batch_size=BATCH_REQUESTS,
                    max_length=self._max_length,
                )
                found = self._evaluator.simple_evaluate(
                    model=model,
                    tasks=list(self._names),
                    task_manager=self._tasks,
                    limit=self._limit,
                    bootstrap_iters=0,
                    log_samples=False,
                    random_seed=None,
                    numpy_random_seed=None,
                    torch_random_seed=None,
                )
        except LynearmError:
            raise
        # The library and its tasks raise whatever they like, data sets over the network not the least.
        except Exception as error:
            raise TrainingError(
                f"lm-eval could not run {', '.join(self._names)}: {type(error).__name__}: {error}",
                "look whether its data set can be fetched from here; go on with --resume, without the task",
            ) from error
        finally:
            student.train(True)
        return read_figures(cast("Mapping[str, Mapping[str, object]]", found["results"]))


def read_figures(results: Mapping[str, Mapping[str, object]]) -> dict[str, float]:
    """What lm-eval says of its tasks, without standard errors and texts."""
    return {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, figures in results.items()
        for name, value in figures.items()
        if isinstance(value, int | float) and "," in name and "_stderr," not in name and math.isfinite(value)
    }


@contextmanager
def _generators_kept(device: torch.device) -> Generator[None]:
    devices = [device] if device.type == "cuda" else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # others draw from it
    try:
        with torch.random.fork_rng(devices=devices):  # pyright: ignore[reportUnknownMemberType]  # half typed
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _quiet() -> Generator[None]:
    """Keeps away its progress bars, which would break up the run's own, and its advice to other callers."""
    library = logging.getLogger("lm_eval")
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        library.setLevel(level)


def _autocast(student: StudentModel) -> torch.autocast:
    enabled = student.compute_dtype != torch.float32
    return torch.autocast(student.device.type, student.compute_dtype, enabled=enabled)


def _import(module: str) -> Any:  # Any: lm-eval is not typed
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"measuring with lm-eval needs the package lm-eval: {error}", "pip install 'lynearm[lm-eval]'"
        ) from error
