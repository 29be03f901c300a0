"""A look inside real vLLM, against transformers: states of many requests at once, and what layers do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from teacher.inside_reference import ReferenceModel, Seen, cosine_distances

from lynearm.client import TraceClient
from lynearm.client.profiles import read_profile
from lynearm.teacher import model_layout
from lynearm.teacher.engine import Completion, TeacherEngine
from lynearm.teacher.inside_options import HiddenCapture, LayerStats
from lynearm.teacher.model_layout import ModelLayout, SampledRows, check_stream, layout_problem, take_rows
from lynearm.teacher.prompt_content import encode_prompt
from lynearm.teacher.prompts import Prompt
from lynearm.teacher.worker import TeacherWorker
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import ConfigError, TeacherError
from lynearm.wire.hidden import HiddenStates, HiddenStatesSpec
from lynearm.wire.specs import CodecSpec, StreamSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CAPTURE = HiddenCapture((0, -1, "norm"))


@dataclass
class Asked:
    """A request, and what came of it."""

    request_id: str
    prompt: list[int]
    completion: Completion | None = None


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> ReferenceModel:
    return ReferenceModel(tiny_model)


@pytest.fixture
def looking(engine: TeacherEngine) -> Iterator[TeacherEngine]:
    """The shared engine, with everything looked at in every step."""
    engine.look_inside(CAPTURE, LayerStats(every=1))
    yield engine
    engine.look_inside(None, None)


def ask(
    engine: TeacherEngine, lengths: Sequence[int], *, first: int = 0, temperature: float = 1.0
) -> list[Asked]:
    """Queue requests of these prompt lengths; some completions end early by an end token, some at 5 or 12."""
    asked: list[Asked] = []
    for number, length in enumerate(lengths, first):
        prompt = np.random.default_rng(number).integers(5, 300, length).tolist()
        limit = 5 if number % 3 == 0 else 12
        sampling = replace(
            engine.sampling(f"p{number}", 0, length), max_tokens=limit, temperature=temperature
        )
        engine.add(f"0:p{number}", prompt, sampling)
        asked.append(Asked(f"0:p{number}", prompt))
    return asked


def step(engine: TeacherEngine, asked: Sequence[Asked], times: int = 1) -> None:
    """Some steps, and who finished in them."""
    by_id = {one.request_id: one for one in asked}
    for _ in range(times):
        for completion in engine.step():
            by_id[completion.request_id].completion = completion


def finish(engine: TeacherEngine, asked: Sequence[Asked]) -> list[Asked]:
    """Step until all is done."""
    while engine.unfinished:
        step(engine, asked)
    return [one for one in asked if one.completion is not None]


def look(reference: ReferenceModel, asked: Asked) -> Seen:
    assert asked.completion is not None
    return reference.look(asked.prompt, asked.completion.token_ids.tolist())


def assert_states(reference: ReferenceModel, asked: Sequence[Asked]) -> None:
    """Layer 0, the last layer and the final norm are those of transformers, to the rounding of bfloat16."""
    for one in asked:
        assert one.completion is not None
        seen, states = look(reference, one), one.completion.hidden
        assert states is not None
        assert states.layers == (0, reference.layer_count - 1, "norm")
        expected = np.stack([seen.streams[1], seen.streams[-1], seen.normed])
        assert states.values.shape == expected.shape
        error = np.abs(states.to_float32() - expected)
        assert (error <= 2**-8 * np.abs(expected) + 2e-3).all()


def test_states_are_those_of_transformers_with_requests_of_many_lengths_in_flight(
    looking: TeacherEngine, reference: ReferenceModel
) -> None:
    asked = ask(looking, [3, 40, 1, 17, 29])
    step(looking, asked, 4)
    # These join while the first ones are on their way, and take the places of those that ended.
    asked += ask(looking, [2, 55, 8, 21, 1, 13], first=5)
    done = finish(looking, asked)
    assert len(done) == len(asked)
    lengths = {one.completion.token_ids.size for one in done if one.completion}
    assert len(lengths) > 2
    assert_states(reference, done)


@pytest.fixture
def chunked(looking: TeacherEngine) -> Iterator[Any]:
    """The scheduler, which now prefills prompts in chunks of what is left of 16 tokens a step."""
    scheduler: Any = looking._engine.engine_core.engine_core.scheduler
    before = scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.enable_chunked_prefill
    scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.enable_chunked_prefill = 16, True
    yield scheduler
    scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.enable_chunked_prefill = before


def test_a_prompt_in_chunks_gives_one_row_for_its_first_token(
    looking: TeacherEngine, chunked: Any, reference: ReferenceModel
) -> None:
    # Greedy: a seeded generator cannot be turned back after a chunk on a CPU.
    asked = ask(looking, [50, 3, 61, 20], first=20, temperature=0.0)
    held = looking._inside
    assert held is not None
    for _ in range(3):
        assert looking.step() == []
        # Of 50 tokens, 48 are computed: none is predicted yet.
        assert held.waiting_rows == 0
    done = finish(looking, asked)
    assert_states(reference, done)
    tokens = sum(one.completion.token_ids.size for one in done if one.completion)
    assert {layer.positions for layer in looking.take_statistics().values()} == {tokens}


def test_a_preempted_request_is_computed_anew_and_its_rows_are_not_doubled(
    looking: TeacherEngine, reference: ReferenceModel
) -> None:
    asked = ask(looking, [9, 30, 4], first=30, temperature=0.0)
    core: Any = looking._engine.engine_core.engine_core
    step(looking, asked, 2)
    held = looking._inside
    assert held is not None
    running = list(core.scheduler.running)
    assert len(running) > 1
    before = held.waiting_rows
    looking._engine.reset_prefix_cache(reset_running_requests=True)
    assert all(request.num_preemptions == 1 for request in running)
    step(looking, asked)
    # One row more for each, though the step computed all positions anew.
    assert held.waiting_rows <= before + len(running)
    done = finish(looking, asked)
    assert any(one.completion and one.completion.token_ids.size > 3 for one in done)
    assert_states(reference, done)
    tokens = sum(one.completion.token_ids.size for one in done if one.completion)
    assert {layer.positions for layer in looking.take_statistics().values()} == {tokens}


def test_an_aborted_request_leaves_nothing_behind(looking: TeacherEngine, reference: ReferenceModel) -> None:
    asked = ask(looking, [7, 31, 12, 5, 16, 22, 3, 9], first=40)
    step(looking, asked)
    held = looking._inside
    assert held is not None
    running = [one for one in asked if one.completion is None]
    assert held.waiting_rows == len(running) > 2
    looking.abort([running[0].request_id, running[1].request_id, "never heard of"])
    done = finish(looking, asked)
    assert done == [one for one in asked if one not in running[:2]]
    assert_states(reference, done)
    assert held.waiting_rows == 0
    assert held._internal_ids == {}
    # And a request of the same name begins anew.
    again = finish(looking, ask(looking, [7, 31], first=40))
    assert_states(reference, again)


def test_fp8_rows_are_within_their_type_of_those_of_transformers(
    engine: TeacherEngine, reference: ReferenceModel
) -> None:
    engine.look_inside(replace(CAPTURE, dtype="fp8"), None)
    done = finish(engine, ask(engine, [11, 26], first=50))
    engine.look_inside(None, None)
    for one in done:
        seen = look(reference, one)
        assert one.completion is not None
        states = one.completion.hidden
        assert states is not None
        assert states.scales is not None
        expected = np.stack([seen.streams[1], seen.streams[-1], seen.normed]).astype(np.float32)
        rounded = HiddenStates.from_float32(expected, states.layers, "fp8")
        # Where the last bits of a float32 decide, a number may be rounded to its other neighbour.
        assert (states.values == rounded.values).mean() > 0.99
        assert states.scales == pytest.approx(rounded.scales, rel=1e-4)


def test_what_layers_do_agrees_with_transformers(looking: TeacherEngine, reference: ReferenceModel) -> None:
    looking.take_statistics()
    done = finish(looking, ask(looking, [14, 2, 33, 6, 19, 27], first=60))
    seen = [look(reference, one) for one in done]
    found = looking.take_statistics()
    assert list(found) == list(range(reference.layer_count))
    streams = np.concatenate([one.streams for one in seen], axis=1)
    heads = np.linalg.norm(np.concatenate([one.heads for one in seen], axis=1), axis=3).mean(axis=1)
    added = np.linalg.norm(np.concatenate([one.added for one in seen], axis=1), axis=3).mean(axis=1)
    neurons = np.abs(np.concatenate([one.neurons for one in seen], axis=1)).mean(axis=1)
    for number, layer in found.items():
        assert layer.positions == streams.shape[1]
        expected = cosine_distances(streams[number], streams[number + 1]).mean()
        assert layer.influence == pytest.approx(expected, abs=1e-5)
        assert layer.head_norms == pytest.approx(heads[number], rel=1e-4)
        assert layer.head_contributions == pytest.approx(added[number], rel=1e-4)
        assert layer.neuron_activations == pytest.approx(neurons[number], rel=1e-4)
    # Taken once: what comes then is new.
    assert looking.take_statistics() == {}


def test_one_step_in_so_many_is_measured(engine: TeacherEngine) -> None:
    engine.look_inside(None, LayerStats(every=2))
    done = finish(engine, ask(engine, [5, 9, 13, 2, 7, 21, 4, 11, 3, 6], first=70))
    found = engine.take_statistics()
    engine.look_inside(None, None)
    assert all(one.completion and one.completion.hidden is None for one in done)
    tokens = sum(one.completion.token_ids.size for one in done if one.completion)
    assert 0 < found[0].positions < tokens


def test_who_looks_away_leaves_the_engine_as_it_was(engine: TeacherEngine) -> None:
    engine.look_inside(CAPTURE, LayerStats(1))
    runner = runner_of(engine)
    assert "execute_model" in vars(runner)
    engine.look_inside(None, None)
    assert "execute_model" not in vars(runner)
    hooked = [
        module for module in runner.model.modules() if module._forward_hooks or module._forward_pre_hooks
    ]
    assert hooked == []
    done = finish(engine, ask(engine, [5], first=80))
    assert done[0].completion is not None
    assert done[0].completion.hidden is None
    assert engine.take_statistics() == {}


def runner_of(engine: TeacherEngine) -> Any:
    return engine._engine.engine_core.engine_core.model_executor.driver_worker.model_runner


@pytest.mark.parametrize("layers", [(2,), (-3,), (0, -2), (1, -1), ("norm", "norm")])
def test_layers_that_the_model_has_not_or_twice_are_refused(engine: TeacherEngine, layers: Any) -> None:
    with pytest.raises(ConfigError, match="capture of layer"):
        engine.look_inside(HiddenCapture(layers), None)


def test_states_that_may_not_fit_into_a_block_are_refused_before_any_token(engine: TeacherEngine) -> None:
    before = engine._config
    engine._config = replace(before, max_tokens=128, completions=128, top_k=1)
    try:
        with pytest.raises(
            ConfigError, match=r"128 completions of 128 tokens with 384 bytes of hidden states"
        ):
            engine.look_inside(HiddenCapture((0, 1, "norm")), None)
    finally:
        engine._config = before
        engine.look_inside(None, None)


@pytest.fixture
def stream_spec(looking: TeacherEngine) -> StreamSpec:
    teacher, tokenizer = looking.describe()
    codec = CodecSpec("standard", 16, hidden=looking.hidden)
    return StreamSpec("lessons", teacher, tokenizer, codec, "Apache-2.0")


def run_worker(
    engine: TeacherEngine, service: Any, spec: StreamSpec, job: str, *, producer: str = "teacher-0"
) -> int:
    """A worker that answers a job of four prompts; the tokens that it generated."""
    with TraceClient(service.target) as client:
        client.open_stream(spec)
        prompts = [Prompt(f"{job}-{number}", f"What is {number}?") for number in range(4)]
        job_prompts = [encode_prompt(prompt) for prompt in prompts]
        client.jobs.create("lessons", job, job_prompts, samples_per_prompt=2)
    config = replace(
        engine._config, service=service.target, capture="hidden:layers=0,-1,norm", stats="layers"
    )
    worker = TeacherWorker(config, producer)
    worker._engine = engine
    worker.connect(spec, job)
    assert worker.run() == "done"
    worker.disconnect()
    with TraceClient(service.target) as client:
        traces = [
            trace
            for block in client.subscribe("lessons", follow=False)
            for trace in decode_block(block.block, dictionaries=client.dictionaries("lessons"))
        ]
    return sum(trace.completion_token_ids.size for trace in traces if trace.prompt_id.startswith(f"{job}-"))


def test_a_job_leaves_states_in_its_traces_and_a_profile_with_its_stream(
    looking: TeacherEngine, service: Any, stream_spec: StreamSpec, reference: ReferenceModel
) -> None:
    looking.take_statistics()
    tokens = run_worker(looking, service, stream_spec, "first")
    with TraceClient(service.target) as client:
        assert client.get_stream("lessons").spec.codec.hidden == HiddenStatesSpec((0, 1, "norm"), "bf16", 64)
        profile = read_profile(client, "lessons")
        blocks = list(client.subscribe("lessons", follow=False))
        dictionaries = client.dictionaries("lessons")
        traces = [trace for one in blocks for trace in decode_block(one.block, dictionaries=dictionaries)]
    assert len(traces) == 8
    for trace in traces:
        seen = reference.look(trace.prompt_token_ids.tolist(), trace.completion_token_ids.tolist())
        expected = np.stack([seen.streams[1], seen.streams[-1], seen.normed])
        assert trace.hidden is not None
        assert (np.abs(trace.hidden.to_float32() - expected) <= 2**-8 * np.abs(expected) + 2e-3).all()
    assert profile is not None
    assert (profile.model, profile.revision) == (stream_spec.teacher.model, stream_spec.teacher.revision)
    assert profile.positions == tokens
    # A successor of that name goes on with its sums; another worker has sums of its own, which add to them.
    tokens += run_worker(looking, service, stream_spec, "second")
    tokens += run_worker(looking, service, stream_spec, "third", producer="teacher-1")
    with TraceClient(service.target) as client:
        whole = read_profile(client, "lessons")
        assert len(client.attachments.list("lessons")) == 2
    assert whole is not None
    assert whole.positions == tokens
    assert all(layer.positions == tokens for layer in whole.layers.values())


# What is taken for granted about vLLM, and refused where it does not hold -----------------------------------


def test_another_version_of_vllm_is_not_looked_into(
    engine: TeacherEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(ConfigError, match=r"vllm 0\.33\.0: its internals are known in 0\.32 only"):
        engine.look_inside(CAPTURE, None)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("input_batch", SimpleNamespace(), "has no input_batch.req_ids, input_batch.num_reqs"),
        ("discard_request_mask", None, "has no discard_request_mask.np"),
        ("vllm_config.parallel_config.pipeline_parallel_size", 2, "split into a pipeline"),
        ("vllm_config.parallel_config.data_parallel_size", 2, "runs several times"),
        ("vllm_config.speculative_config", object(), "speculatively"),
        ("vllm_config.model_config.enforce_eager", False, "compiled"),
        ("model", SimpleNamespace(model=SimpleNamespace(h=[1], norm=1)), "no model.layers and model.norm"),
    ],
)
def test_an_engine_that_runs_otherwise_is_refused_with_the_reason(
    engine: TeacherEngine, monkeypatch: pytest.MonkeyPatch, path: str, value: object, problem: str
) -> None:
    owner: Any = runner_of(engine)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, name, value)
    assert problem in layout_problem(runner_of(engine))


def test_layers_that_take_and_return_something_else_are_refused(engine: TeacherEngine) -> None:
    import torch

    model = SimpleNamespace(model=SimpleNamespace(layers=[torch.nn.Linear(2, 2)], norm=torch.nn.Identity()))
    assert "takes no hidden_states" in model_layout._model_problem(model)
    rows = torch.zeros(1, dtype=torch.int64)
    for states in (torch.zeros(2, 3, 4), (None,), (torch.zeros(2, 2),) * 3, "states"):
        with pytest.raises(TeacherError, match="expected its hidden states and the residual"):
            take_rows(states, rows)


def test_a_stream_that_is_not_the_models_is_noticed_at_the_first_step() -> None:
    import torch

    norm = torch.nn.RMSNorm(8)
    layout = ModelLayout((), norm, 8, torch.float32, torch.device("cpu"))
    stream = torch.randn(4, 8)
    with torch.no_grad():
        check_stream(layout, stream, norm(stream))
        check_stream(layout, stream, norm(stream).to(torch.bfloat16))
        for wrong in (norm(stream + 1), norm(stream) * float("nan")):
            with pytest.raises(TeacherError, match="laid out in another way"):
                check_stream(layout, stream, wrong)


def test_a_step_that_fails_leaves_nothing_behind(
    looking: TeacherEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    worker: Any = looking._engine.engine_core.engine_core.model_executor.driver_worker.worker
    look_inside: Any = worker.lynearm_look
    rows = torch.zeros(1, dtype=torch.int64)

    def fail() -> None:
        # As far as the first layer's hook had come.
        look_inside._sampled = SampledRows(("a",), np.zeros(1, np.int32), rows)
        look_inside._states[0] = torch.zeros(1, 64)
        look_inside.meters.rows = rows
        raise RuntimeError("out of memory")

    monkeypatch.setattr(look_inside, "_execute", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        look_inside._execute_model()
    assert look_inside._states == {}
    assert look_inside._sampled is None
    assert look_inside.meters.rows is None
    assert look_inside.take_states() == []
    assert looking.take_statistics() == {}
