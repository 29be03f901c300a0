"""Which hidden states become rows, however vLLM cuts and mixes the tokens of its steps.

vLLM on a CPU reads each prompt in one step; on a GPU it cuts them, takes beginnings from its cache, and
begins requests anew. A stand-in for its model runner does all of that here; `test_scoring.py` runs the real
one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynearm.teacher import scoring_rows
from lynearm.teacher.scoring_rows import ROWS_KEY, RowsWanted, ScoredRows, ScoringWorker

VOCAB, WIDTH = 50, 8


class Runner:
    """Requests whose hidden state at each position is a row of a matrix."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.input_batch = SimpleNamespace(req_id_to_index={})
        self.query_start_loc = SimpleNamespace(np=np.zeros(1, np.int32))
        self.model = SimpleNamespace(compute_logits=self.compute_logits)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCAB)
        self.states: dict[str, torch.Tensor] = {}
        self.matrix = torch.randn(WIDTH, VOCAB, generator=torch.Generator().manual_seed(1))
        self.largest = 0

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        self.largest = max(self.largest, states.shape[0])
        return states @ self.matrix

    def _get_prompt_logprobs_dict(self, hidden_states: Any, num_scheduled_tokens: Any) -> dict[str, Any]:
        return {"vLLM's own": len(num_scheduled_tokens)}

    def add(self, name: str, length: int, wanted: RowsWanted | None) -> None:
        extra = None if wanted is None else {ROWS_KEY: wanted}
        self.requests[name] = SimpleNamespace(
            num_computed_tokens=0, sampling_params=SimpleNamespace(extra_args=extra)
        )
        self.states[name] = torch.randn(
            length, WIDTH, generator=torch.Generator().manual_seed(len(self.states))
        )

    def step(self, scheduled: dict[str, int]) -> Any:
        """Run some tokens of some requests, in that order."""
        pieces, starts = [], [0]
        for index, (name, count) in enumerate(scheduled.items()):
            begin = self.requests[name].num_computed_tokens
            pieces.append(self.states[name][begin : begin + count])
            starts.append(starts[-1] + count)
            self.input_batch.req_id_to_index[name] = index
        self.query_start_loc.np = np.asarray(starts, np.int32)
        result = self._get_prompt_logprobs_dict(torch.cat(pieces), scheduled)
        for name, count in scheduled.items():
            self.requests[name].num_computed_tokens += count
        return result


def make_wanted(name: str, first: int, rows: int, temperature: float = 1.0) -> RowsWanted:
    generator = np.random.default_rng(first + rows)
    targets = generator.integers(0, VOCAB, rows).astype(np.int32)
    chosen = generator.integers(0, VOCAB, (rows, 2)).astype(np.int32)
    return RowsWanted(name, first, targets, 3, temperature, chosen)


def make_worker(runner: Runner) -> ScoringWorker:
    worker = ScoringWorker()
    worker.model_runner = runner
    assert worker.lynearm_install_scoring()
    return worker


def check(found: ScoredRows, wanted: RowsWanted, runner: Runner, name: str) -> None:
    rows = wanted.target_ids.size
    states = runner.states[name][wanted.first : wanted.first + rows].double()
    logits = states @ runner.matrix.double() / wanted.temperature
    expected = torch.log_softmax(logits, dim=-1).numpy()
    assert all(found.is_filled)
    np.testing.assert_allclose(found.logprobs, -np.sort(-expected, axis=1)[:, :3], atol=1e-4)
    at_target = expected[np.arange(rows), wanted.target_ids]
    np.testing.assert_allclose(found.target_logprobs, at_target, atol=1e-4)
    at_chosen = np.take_along_axis(expected, wanted.chosen_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(found.chosen_logprobs, at_chosen, atol=1e-4)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_right_however_the_tokens_are_cut_and_mixed(data: st.DataObject) -> None:
    runner = Runner()
    worker = make_worker(runner)
    lengths: dict[str, int] = {}
    asked: dict[str, RowsWanted] = {}
    for number in range(data.draw(st.integers(1, 4))):
        name, first, rows = f"r{number}", data.draw(st.integers(0, 12)), data.draw(st.integers(1, 12))
        lengths[name] = first + rows
        asked[name] = make_wanted(name, first, rows, data.draw(st.sampled_from([1.0, 0.5, 2.0])))
        runner.add(name, lengths[name], asked[name])
        # A beginning from the cache, which never reaches the first row.
        runner.requests[name].num_computed_tokens = data.draw(st.integers(0, first))
    runner.add("other", 40, None)
    lengths["other"] = 40
    restarts = data.draw(st.integers(0, 2))
    while unread := [name for name in lengths if runner.requests[name].num_computed_tokens < lengths[name]]:
        names = data.draw(st.lists(st.sampled_from(unread), min_size=1, unique=True))
        runner.step(
            {
                name: data.draw(st.integers(1, lengths[name] - runner.requests[name].num_computed_tokens))
                for name in names
            }
        )
        if restarts:  # vLLM lets go of a request, and begins it anew
            restarts -= 1
            runner.requests[names[0]].num_computed_tokens = 0
    found = worker.lynearm_take_scores(list(asked))
    for name, wanted in asked.items():
        check(found[name], wanted, runner, name)
    assert worker.lynearm_take_scores(list(asked)) == {}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_no_more_rows_exist_at_a_time_than_are_allowed(rows: list[int], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_rows, "MAX_CHUNK_BYTES", 4 * VOCAB * most)
        runner = Runner()
        worker = make_worker(runner)
        asked = {f"r{number}": make_wanted(f"r{number}", 2, count) for number, count in enumerate(rows)}
        for name, wanted in asked.items():
            runner.add(name, 2 + wanted.target_ids.size, wanted)
        runner.step({name: 2 + wanted.target_ids.size for name, wanted in asked.items()})
    assert runner.largest <= most
    assert worker.lynearm_scoring_counts().rows == sum(rows)
    found = worker.lynearm_take_scores(list(asked))
    for name, wanted in asked.items():
        check(found[name], wanted, runner, name)


def test_a_row_that_the_cache_swallowed_is_not_taken_for_filled() -> None:
    runner = Runner()
    worker = make_worker(runner)
    wanted = make_wanted("r", 4, 6)
    runner.add("r", 10, wanted)
    runner.requests["r"].num_computed_tokens = 6
    runner.step({"r": 4})
    assert worker.lynearm_take_scores(["r"])["r"].is_filled == [False, False, True, True, True, True]


def test_vllms_own_prompt_logprobs_go_on() -> None:
    runner = Runner()
    worker = make_worker(runner)
    assert worker.lynearm_install_scoring()  # once more changes nothing
    runner.add("own", 4, None)
    assert runner.step({"own": 4}) == {"vLLM's own": 1}


def test_what_was_dropped_is_forgotten() -> None:
    runner = Runner()
    worker = make_worker(runner)
    runner.add("r", 10, make_wanted("r", 4, 6))
    runner.step({"r": 8})
    worker.lynearm_drop_scores(["r", "unknown"])
    assert worker.lynearm_take_scores(["r"]) == {}


@pytest.mark.parametrize("missing", ["requests", "query_start_loc", "model"])
def test_a_runner_that_looks_otherwise_is_left_alone(missing: str) -> None:
    runner = Runner()
    delattr(runner, missing)
    worker = ScoringWorker()
    worker.model_runner = runner
    assert not worker.lynearm_install_scoring()
    assert runner._get_prompt_logprobs_dict.__func__ is Runner._get_prompt_logprobs_dict
