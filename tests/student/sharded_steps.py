"""What two processes do for `test_sharding`: the same steps on whole students and on a sharded one."""

from __future__ import annotations

import datetime
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lynearm.student import optimization as optimization_module
from lynearm.student import ranks as ranks_module
from lynearm.student.batches import Batch
from lynearm.student.config import TrainConfig
from lynearm.student.evaluation import evaluate
from lynearm.student.exact_match import ExactMatch, Question
from lynearm.student.model import StudentModel, load_student
from lynearm.student.objective import DEFAULT_LOSS, Objective, parse_terms
from lynearm.student.optimization import Optimization, StepResult
from lynearm.student.ranks import Ranks, is_sharded, join_ranks
from lynearm.student.sharding import clip_gradients, shard_student
from lynearm.student.trainer import run_train
from lynearm.wire.errors import CheckpointError, InvalidInputError
from lynearm.wire.traces import Trace


@dataclass(frozen=True)
class Case:
    """A student, and how it is trained."""

    config: TrainConfig
    teacher_hidden_size: int = 0
    tied: bool = True
    checkpointing: bool = False
    frozen: str = ""
    """Part of the names of parameters that are not trained."""


@dataclass
class Outcome:
    """What came of the steps, as the first rank sees it."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    steps: list[StepResult]
    held_out_kl: float
    answers: list[str]
    """What this rank's questions were answered."""
    local_numel: int
    """Entries of parameters that this rank holds between the steps."""


@dataclass(frozen=True)
class Lessons:
    """What the steps learn from."""

    batches: list[list[Trace]]
    questions: list[Question]


class RecordedMatch(ExactMatch):
    """Keeps what the student writes."""

    def __init__(self, student: StudentModel) -> None:
        super().__init__(student, max_new_tokens=4)
        self.answers: list[str] = []

    def _write(self, student: StudentModel, prompts: Sequence[str]) -> list[str]:
        written = super()._write(student, prompts)
        self.answers += written
        return written


def compare(directory: Path, cases: dict[str, Case], lessons: Lessons, out: Path) -> None:
    """Run by each rank; rank 0 saves a pair of outcomes for each case: of whole students, and sharded."""
    with join_ranks("cpu") as ranks:
        outcomes = {
            name: [train(directory, case, lessons, ranks, sharded=sharded) for sharded in (False, True)]
            for name, case in cases.items()
        }
        if ranks.writes:
            torch.save(outcomes, out)


def meet(out: Path) -> None:
    """Run by each rank: both meet, and then the first one waits for the other in vain."""
    with pytest.MonkeyPatch.context() as patch, join_ranks("cpu") as ranks:
        with pytest.raises(CheckpointError, match="the disk is full"):
            ranks.raise_together(CheckpointError("the disk is full") if ranks.writes else None)
        ranks.raise_together(None)
        met = [ranks.meet()]
        if ranks.writes:
            patch.setattr(ranks_module, "_MEETING", datetime.timedelta(seconds=1))
            met.append(ranks.meet())
            out.write_text(json.dumps(met))
        ranks.all_hold(True)


def train_until_broken(config: TrainConfig) -> None:
    """Run by each rank: the gradient of the third step is not finite."""
    numbers = itertools.count(1)

    def clip(parameters: Iterable[nn.Parameter], limit: float, ranks: Ranks) -> float:
        return math.nan if next(numbers) == 3 else clip_gradients(parameters, limit, ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimization_module, "clip_gradients", clip)
        with pytest.raises(InvalidInputError, match="step 3 is not finite"):
            run_train(config)


def train(directory: Path, case: Case, lessons: Lessons, ranks: Ranks, *, sharded: bool) -> Outcome:
    """Steps, a measurement and questions."""
    torch.manual_seed(0)
    student, config = prepare(directory, case), case.config
    if sharded:
        student = shard_student(student, ranks)
    student.train(True)
    objective = Objective(
        parse_terms(config.loss or DEFAULT_LOSS), teacher_hidden_size=case.teacher_hidden_size
    )
    optimization = Optimization(student, config, objectives=(objective,), ranks=ranks)
    steps = [
        optimization.step(Batch(tuple(traces)), number) for number, traces in enumerate(lessons.batches, 1)
    ]
    held_out = lessons.batches[0]
    sums = evaluate(
        student,
        ranks.share(held_out, [1] * len(held_out)),
        micro_batch_tokens=16,
        max_sequence_tokens=64,
        objective=objective,
    )
    exact = RecordedMatch(student)
    exact.count_correct(student, ranks.share(lessons.questions, [1] * len(lessons.questions)))
    if student.shards is None:
        weights = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    else:
        weights = student.shards.gather_weights(keep=ranks.writes)
    return Outcome(
        weights=weights,
        optimizer=optimization.state(),
        steps=steps,
        held_out_kl=ranks.sum(sums.kl)[0],
        answers=exact.answers,
        local_numel=sum(local_numel(parameter) for _, parameter in student.named_parameters()),
    )


def prepare(directory: Path, case: Case) -> StudentModel:
    """The student of a case, whole."""
    student = load_student(directory, device="cpu", dtype=case.config.dtype)
    if not case.tied:
        head = student.model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach() * 0.9)
    if case.config.freeze_embeddings:
        student.freeze_embeddings()
    for name, parameter in student.named_parameters():
        if case.frozen and case.frozen in name:
            parameter.requires_grad_(False)
    if case.checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def local_numel(parameter: Any) -> int:
    """Entries that are here."""
    return int((parameter.to_local() if is_sharded(parameter) else parameter).numel())
