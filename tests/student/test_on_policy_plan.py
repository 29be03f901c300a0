"""How rollouts are mixed, filtered and named; a whole run is in tests/teacher/test_on_policy.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from student.teaching_material import make_spec

from lynearm.student.config import TrainConfig
from lynearm.student.mixing import StreamPlan, StreamState, parse_streams
from lynearm.student.model import StudentModel
from lynearm.student.on_policy_plan import (
    account_for_rollouts,
    add_rollouts,
    digest_run,
    expected_per_step,
    is_fresh,
    mean_staleness,
    rollout_spec,
    rollout_stream_name,
    rollouts_ahead,
    rollouts_at_once,
)
from lynearm.student.rollout_share import parse_share
from lynearm.wire.errors import ConfigError, CorruptBlockError
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.scoring import TeacherInfo
from lynearm.wire.traces import Trace

CONFIG = TrainConfig(on_policy=True, streams=("maths",), out=Path("runs/Maths 2"))


def plan_streams(config: TrainConfig) -> tuple[StreamPlan, ...]:
    return add_rollouts(parse_streams(config.streams), config)


def shares(config: TrainConfig, step: int) -> dict[str, float]:
    plans = plan_streams(config)
    total = sum(plan.weights.at(step) for plan in plans)
    return {plan.name: plan.weights.at(step) / total for plan in plans}


def test_the_share_is_taken_from_all_other_streams_alike() -> None:
    config = replace(CONFIG, streams=("maths:3", "code:1"), on_policy_share="0.2")
    assert shares(config, 7) == pytest.approx({"maths": 0.6, "code": 0.2, "maths.maths-2.rollouts": 0.2})


@pytest.mark.parametrize("streams", [("maths",), ("maths:3", "code:1"), ("maths:1..0@100", "code:0.5")])
@pytest.mark.parametrize("share", ["0.5", "0..0.5@200", "1..0.25@50"])
def test_the_share_moves_as_it_is_told(streams: tuple[str, ...], share: str) -> None:
    config = replace(CONFIG, streams=streams, on_policy_share=share)
    told = parse_share(share)
    for step in (0, 50, 100, 200, 1000):
        assert shares(config, step)["maths.maths-2.rollouts"] == pytest.approx(told.at(step), abs=2e-6)


def test_a_share_of_one_leaves_the_other_streams_open() -> None:
    plans = plan_streams(replace(CONFIG, on_policy_share="1"))
    assert not plans[0].weights.is_over(10**6)
    assert plans[0].weights.at(0) < 1e-5
    assert (plans[1].endless, plans[1].measured) == (True, False)


def test_rollouts_are_used_until_they_are_too_old(traces: list[Trace]) -> None:
    rollout = replace(traces[0], tags={"student_step": "10"})
    (_, plan) = plan_streams(replace(CONFIG, max_staleness=4))
    assert plan.accepts is not None
    assert [step for step in range(10, 20) if plan.accepts(rollout, step)] == [10, 11, 12, 13, 14]
    # In a run that goes over its steps again, rollouts of later steps come up as they did.
    assert is_fresh(rollout, 3, max_staleness=0)
    with pytest.raises(CorruptBlockError, match="rollout-stream"):
        plan.accepts(traces[0], 1)
    assert mean_staleness([rollout, replace(traces[0], tags={"student_step": "13"})], 14) == 2.5
    assert mean_staleness([], 14) is None


def test_names_are_made_of_stream_and_run() -> None:
    assert rollout_stream_name(CONFIG) == "maths.maths-2.rollouts"
    assert rollout_stream_name(replace(CONFIG, out=Path("."))) == "maths.run.rollouts"
    assert rollout_stream_name(replace(CONFIG, rollout_stream="mine")) == "mine"


def test_what_is_ahead_is_used_before_it_is_too_old() -> None:
    config = replace(
        CONFIG, batch_sequences=8, on_policy_share="0.5", max_staleness=16, refresh_every_steps=4
    )
    assert expected_per_step(config) == 4
    assert rollouts_ahead(config) == 13 * 4
    assert rollouts_at_once(config) == 26
    strict = replace(config, max_staleness=0, refresh_every_steps=1)
    assert (rollouts_ahead(strict), rollouts_at_once(strict)) == (4, 2)
    assert rollouts_at_once(replace(config, batch_sequences=512)) == 64
    assert rollouts_ahead(replace(config, rollout_batch=100)) == 100
    assert expected_per_step(replace(config, batch_tokens=2560, rollout_tokens=128)) == 10


def test_a_rollout_stream_says_whose_it_is(teacher: StudentModel, student_dir: Path) -> None:
    config = replace(CONFIG, student=student_dir, temperature=0.7, rollout_top_k=8, rollout_support="student")
    others = [StreamInfo(make_spec(teacher, "maths"), False, 1, 0)]
    served = TeacherInfo(make_spec(teacher).teacher, teacher.tokenizer)
    spec = rollout_spec("rollouts", served, config, others)
    assert spec.teacher.logprobs_temperature == 0.7
    assert spec.license == "Apache-2.0"
    assert (spec.labels["source"], spec.labels["support"]) == ("student", "student")
    assert spec.labels["prompts"] == "stream maths"
    assert spec.codec.tail_draws == 0
    with_draws = replace(config, rollout_support="teacher", rollout_tail_draws=2)
    assert rollout_spec("rollouts", served, with_draws, others).codec.tail_draws == 2
    # Of another teacher, the terms are not known.
    another = replace(served, spec=replace(served.spec, revision="sha256:ff"))
    assert rollout_spec("rollouts", another, config, others).license == "unknown"
    assert rollout_spec("rollouts", replace(served, license="MIT"), config, others).license == "MIT"
    asked = replace(config, rollout_prompts="data/questions.jsonl")
    assert rollout_spec("rollouts", served, asked, others).labels["prompts"] == "questions.jsonl"


def test_a_run_is_named_by_student_and_settings(student_dir: Path, teacher_dir: Path) -> None:
    config = replace(CONFIG, student=student_dir)
    same = replace(config, teacher="elsewhere:1", threads=3, out=Path("elsewhere"), rollout_threads=2)
    assert digest_run(config) == digest_run(same)
    others = [
        replace(config, student=teacher_dir),
        replace(config, learning_rate=1e-3),
        replace(config, seed=1),
    ]
    assert len({digest_run(one) for one in [config, *others]}) == 4


def test_a_manifest_says_how_much_was_on_policy(teacher: StudentModel) -> None:
    states = [StreamState("maths", 1, traces=6, tokens=300), StreamState("r", 2, traces=4, tokens=100)]
    account = account_for_rollouts(states, make_spec(teacher, "r"))
    assert account["share_of_tokens"] == 0.25
    assert (account["traces"], account["completion_tokens"]) == (4, 100)
    assert account_for_rollouts([StreamState("r", 2)], make_spec(teacher, "r"))["share_of_tokens"] == 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"on_policy_share": "1.5"}, "on_policy_share is '1.5', expected 0 to 1"),
        ({"on_policy_share": "half"}, "on_policy_share is 'half'"),
        ({"refresh_every_steps": 18}, "refresh_every_steps is 18, expected at most max_staleness"),
        ({"rollout_support": "both"}, "rollout_support is 'both'"),
        ({"rollout_tail_draws": 17}, "rollout_tail_draws is 17"),
        ({"rollout_tail_draws": 1, "rollout_support": "student"}, "goes with rollout_support 'teacher'"),
        ({"rollout_loss": ("banana",)}, "banana"),
        ({"rollout_stream": "No Name"}, "rollout_stream is 'No Name'"),
        ({"loss": ("forward-kl", "hidden-cosine")}, "hidden states"),
        ({"ray": True}, "on_policy does not go with ray"),
        ({"rollout_tokens": 0}, "rollout_tokens is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        replace(CONFIG, **changes)  # type: ignore[arg-type]  # wrong on purpose
