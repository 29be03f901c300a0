"""Runs whose ranks hold parts of the student: the same steps as whole, and checkpoints that any run can go on from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.service_process import ServiceProcess
from student.run_processes import join, run_ranks, start_ranks, start_run
from student.teaching_material import offer

from lynearm.student.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.model import StudentModel, load_student
from lynearm.student.trainer import run_train
from lynearm.wire.errors import ConfigError
from lynearm.wire.traces import Trace

numbers = itertools.count()


@pytest.fixture
def configure(
    service: ServiceProcess, teacher: StudentModel, traces: list[Trace], student_dir: Path, tmp_path: Path
) -> Callable[..., TrainConfig]:
    stream = f"shards-{next(numbers)}"
    offer(service.target, teacher, traces, name=stream)

    def make(out: str, **overrides: object) -> TrainConfig:
        config = TrainConfig(
            student=student_dir,
            stream=stream,
            service=service.target,
            out=tmp_path / out,
            learning_rate=3e-3,
            warmup_steps=2,
            batch_sequences=5,
            micro_batch_tokens=64,
            held_out_traces=7,
            eval_every_steps=4,
            checkpoint_every_steps=3,
            keep_checkpoints=9,
            device="cpu",
            threads=1,
            sharding="full",
        )
        return replace(config, **overrides)  # type: ignore[arg-type]  # fields by name

    return make


def last(config: TrainConfig) -> Checkpoint:
    directory = latest_checkpoint(config.out)
    assert directory is not None
    return load_checkpoint(directory)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_student(directory, device="cpu").named_parameters())


def test_two_ranks_take_the_steps_of_two_that_hold_the_whole_student(
    configure: Callable[..., TrainConfig],
) -> None:
    sharded, whole = configure("sharded", grad_clip=0.0), configure("whole", grad_clip=0.0, sharding="none")
    run_ranks(sharded, 2)
    run_ranks(whole, 2)
    mine, theirs = last(sharded), last(whole)
    a,b=weights(mine.directory),weights(theirs.directory)
    for n in a: print(n, float((a[n]-b[n]).abs().max()))
    for n in theirs.optimizer: print(n, float((mine.optimizer[n].float()-theirs.optimizer[n].float()).abs().max()))
    print([x.loss-y.loss for x,y in zip(mine.state.curve,theirs.state.curve)])
    print([x.gradient_norm-y.gradient_norm for x,y in zip(mine.state.curve,theirs.state.curve)])
    print(mine.state.evaluations[-1], theirs.state.evaluations[-1])
    assert 0
