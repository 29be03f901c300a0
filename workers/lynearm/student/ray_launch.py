"""A training run whose ranks Ray Train places, and starts again when one is lost.

Invariants: the ranks run the same loop as under torchrun; Ray decides only where. After a loss all ranks
start again from the run's latest checkpoint, which every node has to see: `out` is on shared storage.
The driver hears of progress through an actor of its own, and tells the ranks through it to stop.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections import Counter, deque
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from lynearm.client import stop_on_interrupt
from lynearm.cluster.session import RayUse, ray_session
from lynearm.student.config import TrainConfig
from lynearm.student.progress import OnProgress, TrainProgress, TrainReport, ignore_progress
from lynearm.wire.errors import ConfigError, LynearmError, TrainingError

logger = logging.getLogger(__name__)

Untyped: TypeAlias = Any
"""An object of Ray, whose remote calls no checker can follow."""

MAX_LOSSES = 8
"""Times that Ray Train may start the ranks again before it gives up."""

_POLL_SECONDS = 0.5
_USE = RayUse(
    "training under Ray",
    "pip install 'lynearm[student,ray-train]'",
    error=ConfigError,
    modules=("ray.train.torch",),
)


class Board:
    """An actor between the driver and the ranks: progress one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._events: deque[TrainProgress] = deque(maxlen=256)
        self._attempts: Counter[int] = Counter()
        self._report: TrainReport | None = None
        self._error: LynearmError | None = None
        self._stop = False

    def begin(self, rank: int) -> int | None:
        """From a rank that starts: how often it was lost; None if the run has ended."""
        if self._error is not None:
            return None
        self._attempts[rank] += 1
        return self._attempts[rank] - 1

    def post(self, event: TrainProgress) -> bool:
        """From rank 0; answers whether the run should stop."""
        self._events.append(event)
        return self._stop

    def conclude(self, report: TrainReport | None, error: LynearmError | None) -> None:
        """From the ranks: how it ended."""
        self._report = report or self._report
        self._error = self._error or error

    def take(self) -> list[TrainProgress]:
        """To the driver: what is new."""
        events = list(self._events)
        self._events.clear()
        return events

    def outcome(self) -> tuple[TrainReport | None, LynearmError | None]:
        """To the driver, once the ranks have ended."""
        return self._report, self._error

    def stop(self) -> None:
        """From the driver: end after the running step."""
        self._stop = True


def run_on_ray(
    config: TrainConfig, on_progress: OnProgress = ignore_progress, *, stop: threading.Event | None = None
) -> TrainReport:
    """`run_train` by `config.ranks` processes that Ray Train places.

    Args:
        config: `ray_address` says which Ray; `out` has to be seen by all of its nodes.
        on_progress: Called on this thread.
        stop: Set it for what Ctrl-C does.

    Raises:
        MissingDependencyError: without Ray.
        ConfigError: if Ray cannot be reached, or never has room for the ranks.
        TrainingError: if ranks were lost more than `MAX_LOSSES` times.
        LynearmError: as for `run_train`.
    """
    config = _with_absolute_paths(config)
    with _session(config) as ray, stop_on_interrupt(stop) as event:
        board = ray.remote(num_cpus=0)(Board).remote()
        fit = _Fit(config, ray, board)
        asked = False
        while fit.running:
            fit.join(_POLL_SECONDS)
            for progress in ray.get(board.take.remote()):
                on_progress(progress)
            if event.is_set() and not asked:
                asked = True
                ray.get(board.stop.remote())
        outcome: tuple[TrainReport | None, LynearmError | None] = ray.get(board.outcome.remote())
    report, error = outcome
    if report is not None:
        return report
    raise error or TrainingError(
        f"the ranks were lost: {fit.failure or 'Ray Train does not say why'}",
        "see Ray's logs; the same command with --resume goes on from the latest checkpoint",
    )


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same, where paths mean what they mean here: Ray's processes run in a directory of their own."""
    values: dict[str, object] = {field.name: getattr(config, field.name) for field in fields(config)}
    paths: dict[str, Any] = {
        name: value.absolute() for name, value in values.items() if isinstance(value, Path)
    }
    return replace(config, **paths)


def _session(config: TrainConfig) -> AbstractContextManager[Untyped]:
    cpus = max(1, config.ranks) * max(1, config.threads)
    return ray_session(config.ray_address, _USE, local={"num_cpus": cpus})


class _Fit:
    """Ray Train's own loop, on a thread: it would else hold up progress and Ctrl-C."""

    def __init__(self, config: TrainConfig, ray: Untyped, board: Untyped) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpus = int(ray.cluster_resources().get("GPU", 0))
        ranks = config.ranks or gpus or 1
        self.failure = ""
        self._storage = tempfile.TemporaryDirectory(prefix="lynearm-ray-train-")
        trainer: Untyped = TorchTrainer
        self._trainer = trainer(
            _train_one_rank,
            train_loop_config={"config": config, "board": board},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=ranks,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": config.threads or 1, **({"GPU": 1} if gpus else {})},
            ),
            run_config=RunConfig(
                storage_path=self._storage.name, failure_config=FailureConfig(max_failures=MAX_LOSSES)
            ),
        )
        self._thread = threading.Thread(target=self._run, name="ray-train", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_seconds: float) -> None:
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            self._trainer.fit()
        # Whatever Ray raises is told by `run_on_ray`, on the thread that waits.
        except Exception as error:
            self.failure = (str(error).strip() or type(error).__name__).splitlines()[-1][:300]
        finally:
            self._storage.cleanup()


def _train_one_rank(loop: dict[str, Untyped]) -> None:
    """What every rank runs."""
    import ray
    from ray.train import get_context

    from lynearm.student.checkpoint import latest_checkpoint
    from lynearm.student.trainer import run_train

    module: Untyped = ray
    context: Untyped = get_context
    rank = int(context().get_world_rank())
    board, config = loop["board"], loop["config"]
    losses = module.get(board.begin.remote(rank))
    if losses is None:
        return
    if losses and latest_checkpoint(config.out) is not None:
        config = replace(config, resume=True)
    stop = threading.Event()

    def tell(event: TrainProgress) -> None:
        if module.get(board.post.remote(event)):
            stop.set()

    try:
        report = run_train(config, tell if rank == 0 else ignore_progress, stop=stop)
    except LynearmError as error:
        # Ray Train starts the ranks again, since the others may wait for this one: they find the run ended.
        module.get(board.conclude.remote(None, error))
        raise
    if rank == 0:
        module.get(board.conclude.remote(report, None))
