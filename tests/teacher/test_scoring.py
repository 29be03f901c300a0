"""Scoring in real vLLM over a tiny Llama: against transformers, against generating, and what it costs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from models.reference import reference_distributions

from lynearm.teacher import scoring_rows
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.scoring import EngineScoring, Score, ScoreTask
from lynearm.wire.errors import InvalidInputError, LynearmError, PreconditionError, PromptTooLongError
from lynearm.wire.traces import Int32Array

# torch and vLLM warn about each other's old names while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

VOCAB = 384


def some_ids(seed: int, *shape: int) -> Int32Array:
    return np.random.default_rng(seed).integers(5, VOCAB, shape).astype(np.int32)


def make_task(name: str, prompt: int, completion: int, chosen: int = 3, **changes: Any) -> ScoreTask:
    seed = zlib.crc32(name.encode()) % 1000
    task = ScoreTask(
        name,
        some_ids(seed, prompt),
        some_ids(seed + 1, completion),
        top_k=8,
        chosen_ids=some_ids(seed + 2, completion, chosen),
    )
    return replace(task, **changes)


def score_all(engine: TeacherEngine, tasks: Sequence[ScoreTask]) -> dict[str, Score]:
    for task in tasks:
        engine.scoring.add(task)
    while engine.unfinished:
        engine.step()
    return {score.request_id: score for score in engine.scoring.take_finished()}


def check(score: Score, task: ScoreTask, expected: npt.NDArray[np.float64], tolerance: float = 1e-3) -> None:
    """Compare everything in a score with the whole distributions, shape [T, V]."""
    rows = np.arange(task.completion_token_ids.size)
    assert np.abs(score.sampled_logprobs - expected[rows, task.completion_token_ids]).max() < tolerance
    best = np.sort(expected, axis=1)[:, ::-1][:, : task.top_k]
    assert np.abs(score.top_k.logprobs - best).max(initial=0.0) < tolerance
    there = np.take_along_axis(expected, score.top_k.token_ids.astype(np.int64), axis=1)
    assert np.abs(score.top_k.logprobs - there).max(initial=0.0) < tolerance
    assert np.abs(score.top_k.tail_mass - (1 - np.exp(best).sum(axis=1))).max() < tolerance
    if task.chosen_ids is not None:
        chosen = np.take_along_axis(expected, task.chosen_ids.astype(np.int64), axis=1)
        assert score.chosen_logprobs.shape == chosen.shape
        assert np.abs(score.chosen_logprobs - chosen).max(initial=0.0) < tolerance


def test_scores_of_different_lengths_in_flight_are_those_of_transformers(
    engine: TeacherEngine, tiny_model: Path
) -> None:
    lengths = [(1, 1), (1, 30), (17, 2), (40, 80), (16, 16), (33, 1), (90, 38)]
    tasks = [make_task(f"different-{p}-{t}", p, t) for p, t in lengths]
    sampling = engine.sampling("beside", 0, 10)
    engine.add("beside", some_ids(1, 10).tolist(), replace(sampling, max_tokens=20))
    scores = score_all(engine, tasks)
    for task in tasks:
        check(scores[task.request_id], task, reference_distributions(tiny_model, task))


def test_a_temperature_is_applied_to_the_whole_distribution(engine: TeacherEngine, tiny_model: Path) -> None:
    tasks = [make_task(f"warm-{t}", 9, 12, temperature=t) for t in (0.5, 2.0, 1.0)]
    scores = score_all(engine, tasks)
    for task in tasks:
        check(scores[task.request_id], task, reference_distributions(tiny_model, task))
    assert not np.allclose(scores["warm-0.5"].top_k.tail_mass, scores["warm-2.0"].top_k.tail_mass, atol=0.01)


def test_draws_from_the_tail_come_with_a_score(engine: TeacherEngine, tiny_model: Path) -> None:
    prompt, completion = some_ids(3, 9), some_ids(4, 60)
    tasks = [
        ScoreTask(f"tail-{draws}-{k}", prompt, completion, top_k=k, temperature=t, tail_draws=draws)
        for draws, k, t in [(0, 8, 1.0), (2, 8, 1.0), (16, 370, 0.5), (1, VOCAB, 1.0)]
    ]
    scores = score_all(engine, tasks)
    assert scores["tail-0-8"].top_k.tail_draws is None
    np.testing.assert_array_equal(scores["tail-2-8"].top_k.token_ids, scores["tail-0-8"].top_k.token_ids)
    for task in tasks[1:]:
        check(scores[task.request_id], task, reference_distributions(tiny_model, task))
        top_k = scores[task.request_id].top_k
        drawn = top_k.tail_draws
        assert drawn is not None
        assert drawn.shape == (60, task.tail_draws)
        if task.top_k == VOCAB:
            assert (drawn == -1).all()
        else:
            assert drawn.min() >= 0
            assert drawn.max() < VOCAB
            assert not (drawn[:, :, None] == top_k.token_ids[:, None]).any()
            # Another chance at each position: 60 times the same few would not be.
            assert len(set(drawn.ravel().tolist())) > 10


def test_scoring_says_what_generating_said(engine: TeacherEngine) -> None:
    prompt = some_ids(7, 21)
    sampling = replace(engine.sampling("again", 0, 21), max_tokens=24, temperature=2.0)
    engine.add("again", prompt.tolist(), sampling)
    generated = []
    while engine.unfinished:
        generated += engine.step()
    written = generated[0].token_ids
    task = ScoreTask("again", prompt, written, top_k=16)
    score = score_all(engine, [task])["again"]
    assert written.size > 1
    assert np.abs(score.sampled_logprobs - generated[0].sampled_logprobs).max() < 1e-4
    assert np.abs(score.top_k.logprobs - generated[0].top_k.logprobs).max() < 1e-4
    assert np.abs(score.top_k.tail_mass - generated[0].top_k.tail_mass).max() < 1e-4


def test_prefixes_are_reused_up_to_the_prompts_end_and_no_further(
    engine: TeacherEngine, tiny_model: Path
) -> None:
    prompt = some_ids(11, 70)
    first = make_task("reuse-0", 70, 40, prompt_token_ids=prompt)
    # The same completion, another one, and one that begins in the first one's completion.
    others = [
        replace(first, request_id="reuse-1"),
        make_task("reuse-2", 70, 50, prompt_token_ids=prompt),
        ScoreTask(
            "reuse-3",
            np.concatenate([prompt, first.completion_token_ids[:30]]),
            first.completion_token_ids[30:],
            8,
        ),
    ]
    scores = score_all(engine, [first]) | score_all(engine, others)
    cached = [scores[f"reuse-{number}"].cached_tokens for number in range(4)]
    # Whole blocks of 32 tokens: of the prompts of 70 two, though the completion's blocks are cached too.
    assert cached == [0, 64, 64, 96]
    for task in (first, *others):
        check(scores[task.request_id], task, reference_distributions(tiny_model, task))


def test_a_shared_prompt_in_one_step_gives_right_rows(engine: TeacherEngine, tiny_model: Path) -> None:
    prompt = some_ids(13, 64)
    tasks = [make_task(f"shared-{number}", 64, 8 + number, prompt_token_ids=prompt) for number in range(6)]
    scores = score_all(engine, tasks)
    for task in tasks:
        check(scores[task.request_id], task, reference_distributions(tiny_model, task))


def test_only_completion_rows_are_computed_and_few_exist_at_a_time(
    engine: TeacherEngine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_rows, "MAX_CHUNK_BYTES", 4 * VOCAB * 10)
    engine.scoring.counts.most_rows = 0
    before = engine.scoring.counts.rows
    tasks = [make_task(f"long-{number}", 80, 47) for number in range(3)]
    scores = score_all(engine, tasks)
    assert engine.scoring.counts.rows - before == 3 * 47
    assert engine.scoring.counts.most_rows == 10
    for task in tasks:
        check(scores[task.request_id], task, reference_distributions(tiny_model, task))


def test_nothing_is_kept_of_an_aborted_request(engine: TeacherEngine) -> None:
    engine.scoring.add(make_task("gone", 10, 10))
    engine.scoring.add(make_task("stays", 10, 10))
    engine.abort(["gone"])
    assert engine.unfinished == 1
    assert set(score_all(engine, [])) == {"stays"}


def test_without_top_k_chosen_ids_or_tokens_there_is_nothing_of_them(
    engine: TeacherEngine, tiny_model: Path
) -> None:
    bare = make_task("bare", 5, 6, top_k=0, chosen_ids=None)
    empty = make_task("empty", 5, 0)
    scores = score_all(engine, [bare, empty])
    check(scores["bare"], bare, reference_distributions(tiny_model, bare))
    assert scores["bare"].top_k.token_ids.shape == (6, 0)
    assert scores["bare"].chosen_logprobs.shape == (6, 0)
    np.testing.assert_array_equal(scores["bare"].top_k.tail_mass, np.ones(6, np.float32))
    assert scores["empty"].top_k.token_ids.shape == (0, 8)
    assert scores["empty"].chosen_logprobs.shape == (0, 3)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt_token_ids": np.zeros(0, np.int32)}, InvalidInputError, "empty prompt"),
        ({"completion_token_ids": some_ids(1, 124), "chosen_ids": None}, PromptTooLongError, "context 128"),
        ({"prompt_token_ids": np.asarray([3, 384], np.int32)}, InvalidInputError, "prompt token id 384"),
        ({"chosen_ids": np.full((4, 1), -1, np.int32)}, InvalidInputError, "chosen token id -1"),
        ({"chosen_ids": np.zeros((3, 1), np.int32)}, InvalidInputError, "4 positions"),
        ({"top_k": 385}, InvalidInputError, "top_k 385"),
        ({"temperature": 0.0}, InvalidInputError, "temperature 0.0"),
        ({"temperature": float("nan")}, InvalidInputError, "temperature nan"),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused_before_vllm_sees_it(
    engine: TeacherEngine, changes: dict[str, Any], error: type[LynearmError], words: str
) -> None:
    with pytest.raises(error, match=words):
        engine.scoring.add(make_task("bad", 5, 4, **changes))
    assert engine.unfinished == 0


def test_the_whole_context_can_be_scored(engine: TeacherEngine, tiny_model: Path) -> None:
    task = make_task("whole", 1, 127)
    check(score_all(engine, [task])["whole"], task, reference_distributions(tiny_model, task))


def test_without_the_worker_prompt_logprobs_give_the_same(
    engine: TeacherEngine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task("public", 20, 30, chosen_ids=None)
    gathered = score_all(engine, [task])["public"]
    monkeypatch.setattr(scoring_rows, "_looks_as_expected", lambda runner: False)
    public = EngineScoring(engine.scoring._engine, vocab_size=VOCAB, max_model_len=128)
    monkeypatch.setattr(engine, "scoring", public)
    again = score_all(engine, [task])["public"]
    assert not public.gathers
    assert [record.message for record in caplog.records if "not known" in record.message]
    np.testing.assert_array_equal(gathered.top_k.token_ids, again.top_k.token_ids)
    assert np.abs(gathered.top_k.logprobs - again.top_k.logprobs).max() < 1e-4
    assert np.abs(gathered.sampled_logprobs - again.sampled_logprobs).max() < 1e-4
    for refused in (make_task("ids", 5, 5), replace(task, temperature=2.0), replace(task, tail_draws=1)):
        with pytest.raises(PreconditionError, match="neither chosen ids nor temperatures"):
            public.add(refused)
