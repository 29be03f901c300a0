"""From rollouts and scores to traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rollouts.building import make_rollout

from lynearm.rollouts.config import RolloutConfig
from lynearm.rollouts.scoring import into_blocks, rows_at, score_request, score_settings, scored_rollout
from lynearm.rollouts.waves import rollout_tags, sampled_divergence, student_step
from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.scoring import ScoredCompletion


def scored_by(rollout_number: int) -> ScoredCompletion:
    rollout = make_rollout(rollout_number, 3)
    teacher = replace(
        make_rollout(rollout_number, 3),
        prompt_id="request",
        sampled_logprobs=np.full(5, -1.5, np.float32),
        tags={},
    )
    rng = np.random.default_rng(1)
    chosen = np.log(rng.dirichlet(np.ones(5), 5)[:, : rollout.top_k.k]).astype(np.float32)
    return ScoredCompletion(teacher, chosen)


def test_on_the_teachers_support_rows_are_the_teachers() -> None:
    rollout, scored = make_rollout(2, 3), scored_by(2)
    trace = scored_rollout(rollout, scored, "teacher")
    assert trace.top_k is scored.trace.top_k
    assert (trace.sampled_logprobs == -1.5).all()
    assert (trace.prompt_id, trace.sample_index, student_step(trace)) == ("p2", 2, 3)
    assert trace.tags["domain"] == "maths"
    assert score_request(rollout, "teacher").chosen_ids is None


def test_on_the_students_support_rows_are_its_tokens_with_the_teachers_probabilities() -> None:
    rollout, scored = make_rollout(2, 3), scored_by(2)
    trace = scored_rollout(rollout, scored, "student")
    for row, ids, kept, tail in zip(
        range(5), trace.top_k.token_ids, trace.top_k.logprobs, trace.top_k.tail_mass, strict=True
    ):
        given = dict(
            zip(rollout.top_k.token_ids[row].tolist(), scored.chosen_logprobs[row].tolist(), strict=True)
        )
        assert dict(zip(ids.tolist(), kept.tolist(), strict=True)) == given
        assert (np.diff(kept) <= 0).all()
        assert tail == pytest.approx(1 - np.exp(kept).sum(), abs=1e-6)
    chosen = score_request(rollout, "student").chosen_ids
    assert chosen is rollout.top_k.token_ids


def test_rows_whose_rounding_exceeds_one_have_an_empty_tail() -> None:
    row = rows_at(np.array([[7, 9]], np.int32), np.log(np.array([[0.6, 0.4001]], np.float32)))
    assert row.tail_mass.tolist() == [0.0]
    assert row.token_ids.tolist() == [[7, 9]]


def test_a_request_is_named_by_what_it_is_about() -> None:
    rollout = make_rollout(2, 3)
    name = score_request(rollout, "teacher").request_id
    assert name == score_request(make_rollout(2, 9), "teacher").request_id
    other = replace(rollout, completion_token_ids=rollout.completion_token_ids + np.int32(1))
    moved = replace(
        rollout,
        prompt_token_ids=np.concatenate((rollout.prompt_token_ids, rollout.completion_token_ids[:0])),
        sample_index=3,
    )
    names = {name, score_request(other, "teacher").request_id, score_request(moved, "teacher").request_id}
    assert len(names) == 3


def test_settings_ask_for_what_the_rows_hold() -> None:
    config = RolloutConfig("s", "t", "stream", Path(), prompts="p", top_k=32, score_temperature=0.8)
    on_teacher = score_settings(config, "session")
    assert (on_teacher.top_k, on_teacher.temperature, on_teacher.codec) == (32, 0.8, "fine")
    on_student = score_settings(replace(config, support="student"), "session")
    assert (on_student.top_k, on_student.codec) == (0, "exact")


def test_blocks_are_cut_by_size_and_keep_the_order() -> None:
    traces = [make_rollout(number, 1) for number in range(10)]
    assert into_blocks(traces, 20.0, 1 << 20) == [traces]
    runs = into_blocks(traces, 20.0, 400)
    assert [trace for run in runs for trace in run] == traces
    assert 1 < len(runs) < 10
    assert [len(run) for run in into_blocks(traces, 20.0, 1)] == [1] * 10
    assert into_blocks([], 20.0, 400) == []


def test_the_divergence_is_the_mean_over_tokens() -> None:
    rollouts = [make_rollout(1, 1, positions=2), make_rollout(2, 1, positions=6)]
    scored = [replace(one, sampled_logprobs=one.sampled_logprobs - np.float32(0.5)) for one in rollouts]
    assert sampled_divergence(rollouts, scored) == pytest.approx(0.5)
    assert sampled_divergence([], []) is None


def test_a_trace_that_is_no_rollout_is_refused() -> None:
    assert student_step(make_rollout(1, 12)) == 12
    for tags in ({}, {"student_step": "soon"}, {"student_step": "-1"}):
        with pytest.raises(CorruptBlockError, match="student_step"):
            student_step(replace(make_rollout(1, 12), tags=tags))
    assert rollout_tags({"source": "book"}, 3, -1.0)["source"] == "student"
