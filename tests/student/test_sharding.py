"""Ranks that hold parts of the student: the steps of a whole one, and checkpoints that any run takes up."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from models.service_process import ServiceProcess
from student.run_material import short_run
from student.run_processes import join, run_ranks, start_ranks, start_run, train
from student.sharded_steps import Case, Lessons, Outcome, compare, meet, train_until_broken
from student.teaching_material import offer
from student.test_hidden_terms import carry_states
from torch import Tensor

from lynearm.student.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.exact_match import Question
from lynearm.student.model import StudentModel, load_student
from lynearm.student.ranks import Ranks
from lynearm.student.sharding import shard_student
from lynearm.student.trainer import run_train
from lynearm.wire.errors import ConfigError
from lynearm.wire.traces import Trace

CONFIG = TrainConfig(
    learning_rate=3e-3, warmup_steps=0, micro_batch_tokens=24, grad_clip=0.0, weight_decay=0.1
)
HIDDEN_TERMS = ("forward-kl", "hidden-cosine@0=0,1=1:0.5", "hidden-mse@norm=norm:0.25")

numbers = itertools.count()


@pytest.fixture(scope="module")
def outcomes(
    student_dir: Path, teacher: StudentModel, traces: list[Trace], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[Outcome, Outcome]]:
    """Of each case: two ranks with a whole student each, and with parts of one."""
    cases = {
        "plain": Case(CONFIG),
        "clipped": Case(
            replace(CONFIG, grad_clip=0.5, loss=HIDDEN_TERMS),
            teacher_hidden_size=teacher.hidden_size,
            tied=False,
            checkpointing=True,
            frozen="up_proj",
        ),
        "half": Case(replace(CONFIG, dtype="bfloat16", freeze_embeddings=True, packing="on")),
    }
    deep = [carry_states(teacher, trace) for trace in traces[:12]]
    # One rank has nothing to do in the second step, and less to write than the other.
    lessons = Lessons([deep[:5], deep[5:6], deep[6:12]], [Question("1 + 1 = ?", Decimal(2))] * 17)
    out = tmp_path_factory.mktemp("sharding") / "outcomes"
    join(start_ranks(2, compare, student_dir, cases, lessons, out))
    return torch.load(out, weights_only=False)  # type: ignore[no-any-return]  # as `compare` saves it


def test_steps_on_shards_are_bit_for_bit_those_on_the_whole_student(
    outcomes: Mapping[str, tuple[Outcome, Outcome]],
) -> None:
    whole, sharded = outcomes["plain"]
    assert sharded.local_numel == whole.local_numel // 2
    assert list(sharded.optimizer) == list(whole.optimizer)
    for mine, theirs in ((sharded.weights, whole.weights), (sharded.optimizer, whole.optimizer)):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert sharded.weights["lm_head.weight"] is sharded.weights["model.embed_tokens.weight"]
    assert [step.loss for step in sharded.steps] == [step.loss for step in whole.steps]
    assert sharded.held_out_kl == whole.held_out_kl
    assert len(whole.answers) == 9
    assert sharded.answers == whole.answers
    norms = [[step.gradient_norm for step in outcome.steps] for outcome in (sharded, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_clipping_own_heads_hidden_terms_frozen_parts_and_recomputing_change_rounding_only(
    outcomes: Mapping[str, tuple[Outcome, Outcome]],
) -> None:
    whole, sharded = outcomes["clipped"]
    assert min(step.gradient_norm for step in whole.steps) > 0.5
    assert any(name.startswith("projection.") for name in sharded.optimizer)
    assert not any("up_proj" in name for name in sharded.optimizer)
    assert not torch.equal(whole.weights["lm_head.weight"], whole.weights["model.embed_tokens.weight"])
    check_close(sharded.weights, whole.weights, tolerance=1e-5)
    check_close(sharded.optimizer, whole.optimizer, tolerance=1e-5)
    for mine, theirs in zip(sharded.steps, whole.steps, strict=True):
        assert (mine.loss, mine.hidden) == pytest.approx((theirs.loss, theirs.hidden), rel=1e-6)


def test_layers_that_are_gathered_in_bfloat16_learn_what_those_under_autocast_do(
    outcomes: Mapping[str, tuple[Outcome, Outcome]],
) -> None:
    whole, sharded = outcomes["half"]
    assert {tensor.dtype for tensor in sharded.weights.values()} == {torch.float32}
    assert not any("embed_tokens" in name for name in sharded.optimizer)
    for mine, theirs in zip(sharded.steps, whole.steps, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-2)
    assert sharded.held_out_kl == pytest.approx(whole.held_out_kl, rel=1e-2)


def test_an_error_of_one_rank_is_raised_on_all_and_ranks_that_fail_learn_whether_all_do(
    tmp_path: Path,
) -> None:
    join(start_ranks(2, meet, tmp_path / "met"))
    assert json.loads((tmp_path / "met").read_text()) == [True, False]


def test_what_cannot_be_sharded_is_refused(student_dir: Path) -> None:
    student = load_student(student_dir, device="cpu")
    with pytest.raises(ConfigError, match="this process is alone") as refused:
        shard_student(student, Ranks())
    assert "torchrun" in refused.value.remedy
    student.model.base_model.layers = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match="does not hold its decoder layers"):
        shard_student(student, Ranks(0, 2))
    with pytest.raises(ConfigError, match="sharding is 'half', expected one of"):
        TrainConfig(sharding="half")
    with pytest.raises(ConfigError, match="not with sharding 'full'"):
        TrainConfig(sharding="full", on_policy=True)


@pytest.fixture
def configure(
    service: ServiceProcess, teacher: StudentModel, traces: list[Trace], student_dir: Path, tmp_path: Path
) -> Callable[..., TrainConfig]:
    stream = f"shards-{next(numbers)}"
    offer(service.target, teacher, traces, name=stream)

    def make(out: str, **overrides: object) -> TrainConfig:
        own: dict[str, object] = {
            "batch_sequences": 5,
            "held_out_traces": 7,
            "eval_every_steps": 4,
            "checkpoint_every_steps": 2,
            "sharding": "full",
        }
        return short_run(service, student_dir, (stream,), tmp_path / out, **(own | overrides))

    return make


def last(config: TrainConfig) -> Checkpoint:
    directory = latest_checkpoint(config.out)
    assert directory is not None
    return load_checkpoint(directory)


def weights(config: TrainConfig) -> dict[str, Tensor]:
    student = load_student(last(config).directory, device="cpu")
    return {name: parameter.detach() for name, parameter in student.named_parameters()}


def losses(config: TrainConfig) -> list[float]:
    return [record.loss for record in last(config).state.curve]


def check_close(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, tolerance: float) -> None:
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=tolerance, atol=tolerance)


def test_a_sharded_run_needs_several_processes(configure: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="this process is alone"):
        run_train(configure("one"))


@pytest.mark.slow
def test_a_failure_of_all_ranks_is_saved_before_they_end(configure: Callable[..., TrainConfig]) -> None:
    config = configure("broken", checkpoint_every_steps=0, eval_every_steps=0)
    join(start_ranks(2, train_until_broken, config))
    assert last(config).state.step == 2
    assert set(weights(config)) == set(load_student(config.student, device="cpu").trainable_parameters())


@pytest.mark.slow
def test_a_sharded_run_may_be_killed_and_go_on_with_other_ranks_and_whole(
    configure: Callable[..., TrainConfig],
) -> None:
    whole, killed, turns = configure("whole"), configure("killed"), configure("turns")
    alone = configure("alone", sharding="none")
    run_ranks(whole, 2)
    processes = start_ranks(2, train, killed)
    while latest_checkpoint(killed.out) is None and all(process.is_alive() for process in processes):
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    assert 0 < last(killed).state.step < last(whole).state.step
    shutil.copytree(killed.out, turns.out)
    run_ranks(replace(killed, resume=True), 2)
    check_close(weights(killed), weights(whole), tolerance=0.0)
    assert losses(killed) == losses(whole)

    step = last(turns).state.step
    join([start_run(replace(turns, resume=True, sharding="none", max_steps=step + 2))])
    run_ranks(replace(turns, resume=True), 3)  # which its sizes do not divide by
    join([start_run(alone)])
    for config in (whole, turns):
        state, wanted = last(config).state, last(alone).state
        assert (state.step, state.streams) == (wanted.step, wanted.streams)
        assert losses(config) == pytest.approx(losses(alone), rel=2e-3)
        assert set(last(config).optimizer) == set(last(alone).optimizer)
    assert len(list((last(whole).directory).iterdir())) == len(list((last(alone).directory).iterdir()))
    assert (last(whole).directory / "config.json").read_text() == (
        last(alone).directory / "config.json"
    ).read_text()
