"""A run under Ray Train: a rank is killed, and the student is that of an undisturbed run."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from models.service_process import ServiceProcess
from student.run_material import short_run
from student.teaching_material import offer

from lynearm.student.checkpoint import latest_checkpoint, load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.model import StudentModel
from lynearm.student.progress import TrainProgress
from lynearm.student.ray_launch import run_on_ray
from lynearm.student.trainer import run_train
from lynearm.wire.errors import ConfigError, MisalignmentError
from lynearm.wire.traces import Trace

numbers = itertools.count()


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()
    os.environ.pop("RAY_AUTH_MODE", None)  # set by `ray.init`; other tests choose their own


@pytest.fixture
def config(
    service: ServiceProcess, teacher: StudentModel, traces: list[Trace], student_dir: Path, tmp_path: Path
) -> TrainConfig:
    stream = f"on-ray-{next(numbers)}"
    offer(service.target, teacher, traces, name=stream)
    return short_run(
        service,
        student_dir,
        (stream,),
        tmp_path / "run",
        epochs=2,
        eval_every_steps=50,
        checkpoint_every_steps=2,
        ray=True,
        ranks=2,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, at its start and while it looks for a killed worker
def test_a_rank_that_is_killed_is_replaced_and_the_run_goes_on(
    ray_here: None, config: TrainConfig, tmp_path: Path, ranks_of: Callable[[], list[int]]
) -> None:
    events: list[TrainProgress] = []
    killed: list[int] = []

    def watch(event: TrainProgress) -> None:
        events.append(event)
        if event.record is not None and event.record.step >= 5 and not killed:
            killed.append(ranks_of()[-1])
            os.kill(killed[0], signal.SIGKILL)

    report = run_on_ray(config, watch)
    assert killed
    assert (report.stop_reason, report.steps) == ("stream_end", 26)
    alone = run_train(replace(config, out=tmp_path / "alone", ray=False))
    assert (report.traces, report.tokens) == (alone.traces, alone.tokens)
    assert [r.loss for r in report.curve] == pytest.approx([r.loss for r in alone.curve], rel=2e-3)
    newest = latest_checkpoint(config.out)
    assert newest is not None
    assert load_checkpoint(newest).state.step == 26
    assert [event.record.step for event in events if event.record is not None][-1] == 26


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_a_rank_refuses_ends_the_run_and_a_stop_is_passed_on(
    ray_here: None, config: TrainConfig, tmp_path: Path
) -> None:
    asked = threading.Event()
    asked.set()
    report = run_on_ray(replace(config, out=tmp_path / "stopped", ranks=1), stop=asked)
    assert report.stop_reason == "interrupted"
    assert report.steps <= 2
    with pytest.raises((ConfigError, MisalignmentError), match="already holds"):
        run_on_ray(replace(config, out=tmp_path / "stopped", ranks=1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ranks_under_ray_may_hold_parts_of_the_student_and_paths_are_those_of_the_driver(
    ray_here: None, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student = Path(os.path.relpath(config.student))
    config = replace(config, student=student, out=Path("run"), sharding="full", max_steps=4)
    report = run_on_ray(config)
    alone = run_train(replace(config, out=tmp_path / "alone", ray=False, sharding="none"))
    assert (report.steps, report.traces) == (4, alone.traces)
    assert [r.loss for r in report.curve] == pytest.approx([r.loss for r in alone.curve], rel=2e-3)


@pytest.fixture
def ranks_of() -> Callable[[], list[int]]:
    """Process ids of the ranks."""

    def find() -> list[int]:
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                title = path.read_bytes().decode(errors="replace")
            except OSError:
                continue
            if title.startswith("ray::") and "RayTrainWorker" in title:
                found.append(int(path.parent.name))
        assert len(found) >= 2, "no ranks"
        return sorted(found)

    return find
