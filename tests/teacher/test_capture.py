"""What is captured inside vLLM: against transformers, against scoring, and against vLLM's own way."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lynearm.teacher import vllm_internals
from lynearm.teacher.capture import CaptureReport, CaptureWish
from lynearm.teacher.engine import Completion, TeacherEngine
from lynearm.teacher.logprob_arrays import LogprobRows, collect_as_arrays
from lynearm.wire.errors import ConfigError

# torch and vLLM warn about each other's old names while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPT_LENGTHS = (1, 2, 9, 30, 64, 90, 101)
"""In flight together, so that prefills and completions of all lengths share steps."""

Tell = Callable[[CaptureWish | None], CaptureReport]


@pytest.fixture
def tell(engine: TeacherEngine) -> Iterator[Tell]:
    """Tells the shared engine how to capture; None: as vLLM does. What it did before comes back."""

    def tell_worker(wish: CaptureWish | None) -> CaptureReport:
        if wish is None:
            engine._engine.collective_rpc("lynearm_capture_as_vllm")
            return CaptureReport(has_temperature=True)
        report: CaptureReport = engine._engine.collective_rpc("lynearm_capture", args=(wish,))[0]
        return report

    yield tell_worker
    tell_worker(CaptureWish())


def prompts_of(engine: TeacherEngine) -> dict[str, list[int]]:
    generator = np.random.default_rng(5)
    return {str(n): generator.integers(5, engine.vocab_size, n).tolist() for n in PROMPT_LENGTHS}


def generate(engine: TeacherEngine, *, seeded: bool = True, **changes: Any) -> dict[str, Completion]:
    for name, token_ids in prompts_of(engine).items():
        sampling = engine.sampling(name, 0, len(token_ids))
        seed = sampling.seed if seeded else None
        engine.add(name, token_ids, replace(sampling, seed=seed, **changes))
    done: dict[str, Completion] = {}
    while engine.unfinished:
        done |= {completion.request_id: completion for completion in engine.step()}
    return done


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Callable[[list[int], npt.NDArray[np.int32]], npt.NDArray[np.float64]]:
    """Logits of transformers, float32, at each completion position, shape [T, V]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    def logits(prompt: list[int], completion: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        with torch.no_grad():
            rows = model(torch.tensor([prompt + completion.tolist()])).logits[0, len(prompt) - 1 : -1]
        return np.asarray(rows.double().numpy())

    return logits


def check(completion: Completion, logits_TV: npt.NDArray[np.float64], temperature: float) -> None:
    scaled = logits_TV / temperature
    largest = scaled.max(axis=1, keepdims=True)
    expected = scaled - largest - np.log(np.exp(scaled - largest).sum(axis=1, keepdims=True))
    rows = np.arange(completion.token_ids.size)
    k = completion.top_k.token_ids.shape[1]
    kept = np.take_along_axis(expected, completion.top_k.token_ids.astype(np.int64), axis=1)
    best = -np.sort(-expected, axis=1)[:, :k]
    assert np.abs(completion.sampled_logprobs - expected[rows, completion.token_ids]).max() < 1e-3
    assert np.abs(completion.top_k.logprobs - kept).max(initial=0.0) < 1e-3
    assert np.abs(completion.top_k.logprobs - best).max(initial=0.0) < 1e-3
    assert np.abs(completion.top_k.tail_mass - (1 - np.exp(best).sum(axis=1))).max() < 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("chunked", [False, True])
def test_distributions_are_those_of_transformers(
    engine: TeacherEngine,
    tell: Tell,
    reference: Any,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
    chunked: bool,
) -> None:
    tell(CaptureWish(temperature))
    if chunked:
        scheduler = engine._engine.engine_core.engine_core.scheduler
        monkeypatch.setattr(scheduler.scheduler_config, "enable_chunked_prefill", True)
        monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 48)
    # Seeds and chunks do not go together on a CPU: see the engine's arguments.
    for name, completion in generate(engine, seeded=not chunked).items():
        check(completion, reference(prompts_of(engine)[name], completion.token_ids), temperature)


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.7}])
def test_sampling_leaves_the_distributions_alone(
    engine: TeacherEngine, reference: Any, changes: dict[str, float]
) -> None:
    for name, completion in generate(engine, **changes).items():
        check(completion, reference(prompts_of(engine)[name], completion.token_ids), 1.0)


@pytest.mark.parametrize("k", [0, 1, 384, 1024])
def test_any_k_is_kept(
    engine: TeacherEngine, reference: Any, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    kept = min(k, engine.vocab_size)
    monkeypatch.setattr(engine, "top_k", kept)
    monkeypatch.setattr(engine, "_logprob_count", kept)
    monkeypatch.setattr(engine._engine.model_config, "max_logprobs", -1)
    for name, completion in generate(engine).items():
        assert completion.top_k.logprobs.shape == (completion.token_ids.size, kept)
        check(completion, reference(prompts_of(engine)[name], completion.token_ids), 1.0)
        if kept == engine.vocab_size:
            assert completion.top_k.tail_mass.max() < 1e-6


def test_the_sampled_token_and_its_entry_say_the_same(engine: TeacherEngine) -> None:
    found = 0
    for completion in generate(engine).values():
        where = completion.top_k.token_ids == completion.token_ids[:, None]
        entries = np.where(where, completion.top_k.logprobs, 0).sum(axis=1)
        inside = where.any(axis=1)
        found += int(inside.sum())
        np.testing.assert_array_equal(completion.sampled_logprobs[inside], entries[inside])
    assert found > 10


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_generating_says_what_scoring_says(engine: TeacherEngine, tell: Tell, temperature: float) -> None:
    from vllm import SamplingParams

    tell(CaptureWish(temperature))
    done = generate(engine)
    k = engine.top_k
    for name, prompt in prompts_of(engine).items():
        parameters = SamplingParams(
            max_tokens=1, prompt_logprobs=k, flat_logprobs=True, detokenize=False, ignore_eos=True
        )
        # The last token's row follows from what precedes it.
        token_ids = [*prompt, *done[name].token_ids.tolist()]
        engine._engine.add_request(name, {"prompt_token_ids": token_ids[:127]}, parameters)
    scored: dict[str, Any] = {}
    while engine._engine.has_unfinished_requests():
        scored |= {output.request_id: output for output in engine._engine.step() if output.finished}
    for name, prompt in prompts_of(engine).items():
        completion, flat = done[name], scored[name].prompt_logprobs
        rows = np.asarray(flat.logprobs, np.float32).reshape(-1, k + 1)[len(prompt) - 1 :]
        assert rows.shape[0] >= completion.token_ids.size - 1
        assert np.abs(rows[:, 0] - completion.sampled_logprobs[: len(rows)]).max(initial=0.0) < 1e-4
        assert np.abs(rows[:, 1:] - completion.top_k.logprobs[: len(rows)]).max(initial=0.0) < 1e-4


def test_vllms_own_way_gives_the_same(engine: TeacherEngine, tell: Tell) -> None:
    cheap = generate(engine)
    tell(None)
    engine.close()
    seen = LogprobRows.rows_seen
    try:
        public = generate(engine)
    finally:
        engine._restore = collect_as_arrays()
    assert engine._restore is not None
    assert LogprobRows.rows_seen == seen, "the public path collected arrays"
    for name, completion in cheap.items():
        other = public[name]
        np.testing.assert_array_equal(completion.token_ids, other.token_ids)
        assert np.abs(completion.top_k.logprobs - other.top_k.logprobs).max() < 1e-5
        assert np.abs(completion.sampled_logprobs - other.sampled_logprobs).max() < 1e-5
        assert np.abs(completion.top_k.tail_mass - other.top_k.tail_mass).max() < 1e-5
        assert (completion.top_k.token_ids == other.top_k.token_ids).mean() > 0.99


@pytest.fixture
def unknown_version(monkeypatch: pytest.MonkeyPatch, engine: TeacherEngine) -> Iterator[None]:
    engine.close()
    monkeypatch.setattr(vllm_internals, "KNOWN_VERSIONS", ("0.1",))
    vllm_internals.say_slower.cache_clear()
    yield
    vllm_internals.say_slower.cache_clear()
    monkeypatch.undo()
    engine._restore = collect_as_arrays()


@pytest.mark.usefixtures("unknown_version")
def test_an_unknown_vllm_is_left_alone_and_said_once(
    engine: TeacherEngine, tell: Tell, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert collect_as_arrays() is None
        assert collect_as_arrays() is None
        assert engine._start_capture(fast=True) is False
    assert len(caplog.records) == 1
    assert "its internals are known in 0.1 only" in caplog.text
    assert tell(CaptureWish()).has_temperature
    sampler = engine._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.sampler
    assert "compute_logprobs" not in vars(sampler)
    assert len(generate(engine)) == len(PROMPT_LENGTHS)


def test_rows_of_an_unknown_shape_are_left_to_vllm_and_said_once(
    engine: TeacherEngine, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists

    assert engine._restore is not None
    vllm_internals.say_slower.cache_clear()
    processor = LogprobsProcessor(None, FlatLogprobs(), None, 0.0, 2, None)
    narrow = LogprobsLists(np.array([[7, 8]]), np.array([[-0.5, -1.5]]), np.array([1]))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            processor._update_sample_logprobs(narrow)
    assert len(caplog.records) == 1
    assert "unknown shapes" in caplog.text
    assert isinstance(processor.logprobs, FlatLogprobs)
    assert processor.logprobs.token_ids == [7, 8, 7, 8]
    vllm_internals.say_slower.cache_clear()


@pytest.mark.usefixtures("unknown_version")
def test_another_temperature_is_refused_where_it_cannot_be_had(
    engine: TeacherEngine, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not tell(CaptureWish(2.0)).has_temperature
    monkeypatch.setattr(engine, "_config", replace(engine._config, logprobs_temperature=2.0))
    with pytest.raises(ConfigError, match="cannot record logprobs at temperature 2: its internals"):
        engine._start_capture(fast=True)


def test_a_sampler_of_another_shape_is_left_alone(
    engine: TeacherEngine, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.sample.sampler import Sampler

    tell(None)
    monkeypatch.setattr(Sampler, "gather_logprobs", staticmethod(lambda scores, count: None))
    report = tell(CaptureWish(2.0))
    assert not report.has_temperature
    assert report.problem == "its sampler has no gather_logprobs(logprobs, num_logprobs, token_ids)"


@pytest.mark.usefixtures("tell")
def test_an_engine_records_at_the_temperature_of_its_config_and_says_so(
    engine: TeacherEngine, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_config", replace(engine._config, logprobs_temperature=1.7))
    assert engine._start_capture(fast=True) is False, "no draws were asked for"
    for name, completion in generate(engine).items():
        check(completion, reference(prompts_of(engine)[name], completion.token_ids), 1.7)
    assert engine.describe()[0].logprobs_temperature == 1.7


def test_draws_come_out_of_the_sampler(
    engine: TeacherEngine, tell: Tell, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = 12
    plain = generate(engine)
    monkeypatch.setattr(engine, "_config", replace(engine._config, codec="sampled", draws=draws))
    monkeypatch.setattr(engine, "_logprob_count", draws)
    assert tell(CaptureWish(draws=draws)).has_draws
    seen: set[int] = set()
    for name, completion in generate(engine).items():
        np.testing.assert_array_equal(completion.token_ids, plain[name].token_ids)
        np.testing.assert_array_equal(completion.sampled_logprobs, plain[name].sampled_logprobs)
        counts = np.rint(np.exp(completion.top_k.logprobs.astype(np.float64)) * draws)
        assert (counts.sum(axis=1) == draws).all()
        assert (completion.top_k.tail_mass == 0).all()
        seen |= set(completion.top_k.token_ids[counts > 0].tolist())
    assert len(seen) > 2 * draws


@pytest.mark.parametrize("outside", [False, True], ids=["in the sampler", "from whole rows"])
def test_draws_from_the_tail_come_beside_the_likeliest_entries(
    engine: TeacherEngine, tell: Tell, reference: Any, monkeypatch: pytest.MonkeyPatch, outside: bool
) -> None:
    draws, k = 3, 300
    monkeypatch.setattr(engine, "top_k", k)
    monkeypatch.setattr(engine, "_logprob_count", k)
    monkeypatch.setattr(engine._engine.model_config, "max_logprobs", -1)
    plain = generate(engine)
    monkeypatch.setattr(engine, "_config", replace(engine._config, tail_draws=draws))
    if outside:
        monkeypatch.setattr(engine, "_logprob_count", engine.vocab_size)
        monkeypatch.setattr(LogprobRows, "reduce", engine._draw)
    else:
        monkeypatch.setattr(engine, "_logprob_count", k + draws)
        assert tell(CaptureWish(tail_draws=draws)).has_draws
    seen, tail_ids = 0, set[int]()
    for name, completion in generate(engine).items():
        check(completion, reference(prompts_of(engine)[name], completion.token_ids), 1.0)
        np.testing.assert_array_equal(completion.token_ids, plain[name].token_ids)
        np.testing.assert_array_equal(completion.top_k.token_ids, plain[name].top_k.token_ids)
        drawn = completion.top_k.tail_draws
        assert drawn is not None
        assert drawn.shape == (completion.token_ids.size, draws)
        assert drawn.min() >= 0
        assert drawn.max() < engine.vocab_size
        assert not (drawn[:, :, None] == completion.top_k.token_ids[:, None]).any()
        seen, tail_ids = seen + drawn.size, tail_ids | set(drawn.ravel().tolist())
    # The tiny model is nearly uniform: a few tokens again and again would be a cumulated sum gone wrong.
    assert len(tail_ids) > seen // 4


def test_a_row_that_keeps_the_whole_vocabulary_has_no_draw(
    engine: TeacherEngine, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_config", replace(engine._config, tail_draws=1))
    monkeypatch.setattr(engine, "top_k", engine.vocab_size)
    monkeypatch.setattr(engine, "_logprob_count", engine.vocab_size + 1)
    monkeypatch.setattr(engine._engine.model_config, "max_logprobs", engine.vocab_size + 1)
    tell(CaptureWish(tail_draws=1))
    for completion in generate(engine).values():
        drawn = completion.top_k.tail_draws
        assert drawn is not None
        assert (drawn == -1).all()


def test_the_newer_runner_is_given_logits_at_the_temperature(
    engine: TeacherEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It needs Triton, and so a GPU: what vLLM's modules would be given is checked with two in their place.
    import torch

    from lynearm.teacher import capture

    given: list[torch.Tensor] = []

    def compute_topk_scores(logits: torch.Tensor, num_logprobs: int) -> int:
        given.append(logits)
        return num_logprobs

    class Sampler:
        """Named as the newer runner's, in a module of its name."""

    modules = [SimpleNamespace(compute_topk_scores=compute_topk_scores) for _ in range(2)]
    names = [f"newer_runner_{number}" for number in range(2)]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(capture, "_TRITON_MODULES", tuple(names))
    monkeypatch.setattr(Sampler, "__module__", names[0])
    worker = capture.CaptureWorker()
    worker.model_runner = SimpleNamespace(sampler=Sampler())
    assert worker.lynearm_capture(CaptureWish(4.0)) == CaptureReport(has_temperature=True)
    logits = torch.full((1, 2), 8.0)
    for temperature in (4.0, 2.0, 1.0):
        worker.lynearm_capture(CaptureWish(temperature))
        for module in modules:
            assert module.compute_topk_scores(logits, num_logprobs=3) == 3
            assert torch.equal(given[-1], logits / temperature)
    assert all(module.compute_topk_scores is compute_topk_scores for module in modules)
