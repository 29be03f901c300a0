"""Runs that are killed at any instant, and runs by several ranks: the same examples, the same student."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.service_process import ServiceProcess
from student.run_material import short_run
from student.run_processes import join, run_ranks, start_run
from student.teaching_material import offer, write_traces

from lynearm.student.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.metrics import read_metrics
from lynearm.student.model import StudentModel, load_student
from lynearm.student.run_directory import best_checkpoint
from lynearm.student.trainer import run_train
from lynearm.wire.errors import CheckpointError
from lynearm.wire.traces import Trace

numbers = itertools.count()


@pytest.fixture
def configure(
    service: ServiceProcess, teacher: StudentModel, traces: list[Trace], student_dir: Path, tmp_path: Path
) -> Callable[..., TrainConfig]:
    stream = f"kills-{next(numbers)}"
    offer(service.target, teacher, traces, name=stream)

    def make(out: str, **overrides: object) -> TrainConfig:
        own: dict[str, object] = {"epochs": 2, "eval_every_steps": 5, "checkpoint_every_steps": 2}
        return short_run(service, student_dir, (stream,), tmp_path / out, **(own | overrides))

    return make


def last(config: TrainConfig) -> Checkpoint:
    directory = latest_checkpoint(config.out)
    assert directory is not None
    return load_checkpoint(directory)


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return dict(load_student(last(config).directory, device="cpu").named_parameters())


def losses(config: TrainConfig) -> list[float]:
    return [record.loss for record in last(config).state.curve]


def kill_until_done(config: TrainConfig, run_seconds: float, kills: int) -> int:
    """Start a run again and again, and kill it at random instants; how often it was killed."""
    generator = random.Random(5)
    killed = 0
    while True:
        process = start_run(replace(config, resume=latest_checkpoint(config.out) is not None))
        process.join(None if killed >= kills else generator.uniform(0.05, 0.6) * run_seconds)
        if process.exitcode is not None:
            assert process.exitcode == 0
            return killed
        process.kill()
        process.join()
        killed += 1


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(
    configure: Callable[..., TrainConfig],
) -> None:
    whole, killed = configure("whole"), configure("killed")
    join([start_run(configure("warm-up", max_steps=1))])
    started = time.monotonic()
    join([start_run(whole)])
    run_seconds = time.monotonic() - started
    assert kill_until_done(killed, run_seconds, kills=10) > 1
    assert last(killed).state.step == last(whole).state.step == 26
    assert losses(killed) == losses(whole)
    assert last(killed).state.traces == 2 * 52
    theirs = weights(whole)
    for name, mine in weights(killed).items():
        assert torch.equal(mine, theirs[name]), name
    metrics = read_metrics(killed.out)
    assert metrics.steps == last(killed).state.curve
    assert metrics.evaluations == last(killed).state.evaluations == last(whole).state.evaluations
    best, wanted = best_checkpoint(killed.out), best_checkpoint(whole.out)
    assert best is not None
    assert wanted is not None
    assert best.name == wanted.name
    # What a killed run left half written is not taken for a checkpoint, and the next run removes it.
    assert not [path.name for path in killed.out.iterdir() if path.name.startswith(".unfinished")]


@pytest.mark.slow
def test_ranks_take_the_same_steps_as_one_process_and_can_take_turns(
    configure: Callable[..., TrainConfig],
) -> None:
    alone, together, in_turns = configure("alone"), configure("together"), configure("in-turns")
    join([start_run(alone)])
    run_ranks(replace(together, on_corrupt="skip"), 2)
    run_ranks(replace(in_turns, max_steps=7), 2)
    join([start_run(replace(in_turns, max_steps=15, resume=True))])
    run_ranks(replace(in_turns, resume=True), 3)
    wanted = last(alone).state
    for config in (together, in_turns):
        state = last(config).state
        assert (state.step, state.streams) == (wanted.step, wanted.streams)
        assert losses(config) == pytest.approx(losses(alone), rel=2e-3)
        measured = {record.step: record.kl for record in state.evaluations}
        for record in wanted.evaluations:
            assert measured[record.step] == pytest.approx(record.kl, rel=2e-3)
    theirs = weights(alone)
    for name, mine in weights(together).items():
        torch.testing.assert_close(mine, theirs[name], rtol=1e-2, atol=2e-4)


@pytest.mark.slow
def test_a_mixture_of_streams_survives_kills_and_is_the_same_for_any_number_of_ranks(
    service: ServiceProcess, teacher: StudentModel, configure: Callable[..., TrainConfig]
) -> None:
    second = f"kills-{next(numbers)}"
    more = write_traces(teacher, 30, seed=9, held_out=4)
    offer(service.target, teacher, more, name=second, traces_per_block=4)
    (first,) = configure("any").streams
    whole = configure("whole", streams=(f"{first}:0.8..0.4@10", f"{second}:0.3"), epochs=1)
    killed, together = (replace(whole, out=whole.out.with_name(name)) for name in ("killed", "together"))
    started = time.monotonic()
    join([start_run(whole)])
    assert kill_until_done(killed, time.monotonic() - started, kills=4) > 0
    run_ranks(together, 2)
    wanted = last(whole).state
    assert [stream.traces for stream in wanted.streams] == [52, 26]
    assert last(killed).state == wanted
    theirs = weights(whole)
    for name, mine in weights(killed).items():
        assert torch.equal(mine, theirs[name]), name
    by_two = last(together).state
    assert (by_two.step, by_two.streams) == (wanted.step, wanted.streams)
    assert [record.stream_tokens for record in by_two.curve] == [one.stream_tokens for one in wanted.curve]
    assert losses(together) == pytest.approx(losses(whole), rel=2e-3)
    ours = by_two.evaluations[-1].streams
    for name, part in wanted.evaluations[-1].streams.items():
        assert ours[name].kl == pytest.approx(part.kl, rel=2e-3)


def test_checkpoints_beside_the_training_are_those_of_their_step(
    configure: Callable[..., TrainConfig],
) -> None:
    beside = configure("beside", max_steps=6, keep_checkpoints=9)
    inside = replace(beside, out=beside.out.with_name("inside"), async_checkpoints=False)
    for config in (beside, inside):
        run_train(config)
    for step in (2, 4, 6):
        names = [config.out / f"step-{step:08d}" for config in (beside, inside)]
        first, second = (dict(load_student(name, device="cpu").named_parameters()) for name in names)
        assert all(torch.equal(first[name], second[name]) for name in first)
        mine, other = (load_checkpoint(name) for name in names)
        assert mine.state == other.state
        assert all(torch.equal(mine.optimizer[name], other.optimizer[name]) for name in other.optimizer)
        config_files = [json.loads((name / "config.json").read_text()) for name in names]
        assert config_files[0] == config_files[1]
        assert {path.name for path in names[0].iterdir()} == {path.name for path in names[1].iterdir()}


def test_a_checkpoint_that_cannot_be_written_beside_ends_the_run(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("broken", checkpoint_every_steps=2)
    from lynearm.student import saving

    real, failures = saving.save_checkpoint, iter([True])

    def fail_once(*arguments: object, **named: object) -> None:
        if next(failures, False):
            raise CheckpointError("the disk is full")
        real(*arguments, **named)  # type: ignore[arg-type]  # passed on as they are

    monkeypatch.setattr(saving, "save_checkpoint", fail_once)
    with pytest.raises(CheckpointError, match="the disk is full"):
        run_train(config)
    # What it had learnt by then was saved all the same.
    assert last(config).state.step == 4


@pytest.mark.slow
def test_of_ranks_that_torchrun_starts_one_speaks(configure: Callable[..., TrainConfig]) -> None:
    config = configure("spoken")
    scripts = Path(sys.executable).parent
    command: list[str | Path] = [scripts / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [scripts / "lynearm", "train", "--student", config.student, "--stream", *config.streams]
    command += ["--service", config.service, "--out", config.out, "--threads", "1", "--device", "cpu"]
    command += ["--batch-sequences", "4", "--progress", "json", "--max-steps"]
    ran = subprocess.run([*command, "2"], capture_output=True, text=True, timeout=300, check=True)
    events = [json.loads(line)["event"] for line in ran.stdout.splitlines()]
    assert events[-1] == "train_report"
    plain = [*command, "3", "--resume", "--progress", "plain"]
    ran = subprocess.run(plain, capture_output=True, text=True, timeout=300, check=True)
    (summary,) = ran.stdout.splitlines()
    assert summary.startswith("3 steps, 12 traces")
