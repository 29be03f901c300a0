"""The worker against a real service, with the shared engine and without Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.teaching import teach_config

from lynearm.client import TraceClient
from lynearm.client.job_calls import JobInfo
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.prompt_content import encode_prompt
from lynearm.teacher.prompts import ChatMessage, Prompt
from lynearm.teacher.worker import EngineFailedError, TeacherWorker
from lynearm.teacher.worker_progress import LeasedWork
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import StreamExistsError
from lynearm.wire.specs import CodecSpec, StreamSpec
from lynearm.wire.traces import Trace

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def make_spec(engine: TeacherEngine) -> StreamSpec:
    teacher, tokenizer = engine.describe()
    return StreamSpec("lessons", teacher, tokenizer, CodecSpec("standard", 16), "Apache-2.0")


def read_all(target: str) -> list[Trace]:
    with TraceClient(target) as client, client.subscribe("lessons", follow=False) as blocks:
        dictionaries = client.dictionaries("lessons")
        return [trace for block in blocks for trace in decode_block(block.block, dictionaries=dictionaries)]


MakeWorker = Callable[..., TeacherWorker]


@pytest.fixture
def make_worker(engine: TeacherEngine, tiny_model: Path, service: Any) -> Iterator[MakeWorker]:
    """Workers of a job of some prompts; they are called one after the other."""
    made: list[TeacherWorker] = []

    def make(
        prompts: Sequence[Prompt], job: str = "job", name: str = "teacher-0", **codec: Any
    ) -> TeacherWorker:
        spec = make_spec(engine)
        spec = replace(spec, codec=replace(spec.codec, **codec))
        with TraceClient(service.target) as client:
            client.open_stream(spec)
            job_prompts = [encode_prompt(prompt) for prompt in prompts]
            client.jobs.create("lessons", job, job_prompts, samples_per_prompt=2)
        config = teach_config(tiny_model, service=service.target, block_bytes=4000, max_batch=8)
        made.append(TeacherWorker(config, name))
        # One engine serves the whole session: loading another takes half a minute.
        made[-1]._engine = engine
        made[-1].connect(spec, job)
        return made[-1]

    yield make
    for worker in made:
        worker.disconnect()


def job_of(service: Any, name: str = "job") -> JobInfo:
    with TraceClient(service.target) as client:
        return client.jobs.get("lessons", name)


def samples_of(prompts: Iterable[Prompt]) -> Counter[tuple[str, int]]:
    return Counter((prompt.prompt_id, sample) for prompt in prompts for sample in (0, 1))


def numbered(count: int) -> list[Prompt]:
    return [Prompt(f"p{n}", f"What is {n} plus {n}?", tags={"n": str(n)}) for n in range(count)]


def test_every_sample_is_published_once_and_what_cannot_be_answered_is_given_up(
    make_worker: MakeWorker, service: Any
) -> None:
    prompts = [*numbered(30), Prompt("chat", messages=(ChatMessage("user", "Write a function."),))]
    worker = make_worker([*prompts, Prompt("long", "number " * 200)])
    assert worker.run() == "done"
    traces = read_all(service.target)
    assert Counter((trace.prompt_id, trace.sample_index) for trace in traces) == samples_of(prompts)
    progress = worker.progress()
    assert (progress.generated_prompts, progress.failed_prompts) == (31, 1)
    assert progress.acked_blocks > 1
    job = job_of(service)
    assert (job.state, job.done_units, job.failed_units) == ("done", 64, 2)
    with TraceClient(service.target) as client:
        assert client.finished_prompts("lessons") == {prompt.prompt_id for prompt in prompts}
        ((failed,)) = client.jobs.failures("lessons", "job")
        assert (failed.prompt_id, failed.sample_indices) == ("long", (0, 1))
        assert "tokens, and the context of 128 must also hold a completion" in failed.reason


@pytest.mark.parametrize("min_probability", [0.0, 4e-3])
def test_draws_from_the_tail_are_published_with_their_rows(
    make_worker: MakeWorker,
    engine: TeacherEngine,
    service: Any,
    monkeypatch: pytest.MonkeyPatch,
    min_probability: float,
) -> None:
    monkeypatch.setattr(engine, "_config", replace(engine._config, tail_draws=2))
    monkeypatch.setattr(engine, "_logprob_count", engine.top_k + 2)
    monkeypatch.setattr(engine._engine.model_config, "max_logprobs", engine.vocab_size)
    assert engine._start_capture(fast=True)
    try:
        make_worker(numbered(30), tail_draws=2, min_probability=min_probability).run()
    finally:
        monkeypatch.undo()
        engine._start_capture(fast=True)
    seen, rows, dropped = set[int](), 0, 0
    for trace in read_all(service.target):
        drawn, is_kept = trace.top_k.tail_draws, trace.top_k.logprobs > -np.inf
        assert drawn is not None
        assert drawn.shape == (trace.completion_token_ids.size, 2)
        assert ((drawn >= 0) & (drawn < engine.vocab_size)).all()
        is_same = drawn[:, :, None] == trace.top_k.token_ids[:, None]
        assert not (is_same & is_kept[:, None]).any()
        seen |= set(drawn.ravel().tolist())
        rows, dropped = rows + drawn.shape[0], dropped + int((~is_kept).sum())
    assert rows > 200
    # Of 384 tokens that are nearly alike, 400 draws show at least half.
    assert len(seen) > 190
    assert (dropped > 0) == (min_probability > 0)


def test_the_samples_of_a_prompt_share_a_block(make_worker: MakeWorker, service: Any) -> None:
    make_worker(numbered(12)).run()
    with TraceClient(service.target) as client, client.subscribe("lessons", follow=False) as blocks:
        dictionaries = client.dictionaries("lessons")
        block_of: dict[str, set[int]] = {}
        for block in blocks:
            for trace in decode_block(block.block, dictionaries=dictionaries):
                block_of.setdefault(trace.prompt_id, set()).add(block.offset)
    assert len(block_of) == 12
    assert all(len(offsets) == 1 for offsets in block_of.values())


def test_an_empty_completion_is_recorded_and_counted(make_worker: MakeWorker, service: Any) -> None:
    worker = make_worker(numbered(30))
    worker.run()
    traces = read_all(service.target)
    empty = [
        trace for trace in traces if trace.completion_token_ids.size == 1 and trace.finish_reason == "stop"
    ]
    assert 0 < len(empty) <= worker.progress().empty_completions < len(traces)
    assert all(trace.completion_text == "" and trace.top_k.positions == 1 for trace in empty)


def test_a_job_leaves_out_what_another_has_finished(make_worker: MakeWorker, service: Any) -> None:
    prompts = numbered(6)
    make_worker(prompts[:4], "first").run()
    later = make_worker(prompts, "second", "teacher-1")
    assert later.run() == "done"
    assert later.progress().generated_prompts == 2
    assert Counter(trace.prompt_id for trace in read_all(service.target)) == dict.fromkeys(
        [prompt.prompt_id for prompt in prompts], 2
    )


def test_the_traces_say_how_they_were_made(
    make_worker: MakeWorker, engine: TeacherEngine, service: Any
) -> None:
    make_worker([Prompt("a", "Hi", tags={"topic": "greeting"})]).run()
    for trace in read_all(service.target):
        prompt_ids = engine.tokenizer.encode(Prompt("a", "Hi"))
        assert trace.prompt_token_ids.tolist() == prompt_ids.tolist()
        assert trace.tags == {"topic": "greeting"}
        assert trace.sampling == engine.sampling("a", trace.sample_index, prompt_ids.size)
        assert trace.completion_text == engine.tokenizer.decode(
            trace.completion_token_ids.tolist(), engine.eos_token_ids
        )


def test_a_stopped_worker_publishes_nothing_more_and_gives_back_its_work(
    make_worker: MakeWorker, engine: TeacherEngine, service: Any
) -> None:
    worker = make_worker(numbered(4))
    worker.stop()
    assert worker.run() == "stopped"
    assert worker.progress().generated_prompts == 0
    assert engine.unfinished == 0
    worker.disconnect()
    assert (job_of(service).leased_units, job_of(service).done_units) == (0, 0)


def test_a_worker_whose_node_is_to_go_finishes_what_it_began(
    make_worker: MakeWorker, engine: TeacherEngine, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(numbered(60))
    step = engine.step

    def drain_when_full() -> Any:
        if engine.unfinished >= 8:
            worker.drain()
        return step()

    monkeypatch.setattr(engine, "step", drain_when_full)
    assert worker.run() == "drained"
    job = job_of(service)
    assert 8 <= job.done_units < 120
    assert job.leased_units == 0
    assert len(read_all(service.target)) == job.done_units


def test_what_was_in_a_failed_engine_stays_leased_and_what_was_finished_is_durable(
    make_worker: MakeWorker, engine: TeacherEngine, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(numbered(40))
    step = engine.step

    def fail_later() -> Any:
        if worker.progress().generated_prompts >= 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return step()

    monkeypatch.setattr(engine, "step", fail_later)
    with pytest.raises(EngineFailedError, match="RuntimeError: CUDA error"):
        worker.run()
    job = job_of(service)
    assert job.done_units == len(read_all(service.target)) >= 10
    assert job.leased_units > 0
    monkeypatch.undo()
    worker._abort_all()


def test_suspects_are_answered_for_whoever_holds_them(make_worker: MakeWorker, service: Any) -> None:
    worker = make_worker(numbered(4))
    with TraceClient(service.target) as client, client.prompt_worker("lessons", "job", worker="boss") as boss:
        lease = boss.take()
        assert lease is not None
        for group in (lease.prompts[:1], lease.prompts[1:3]):
            worker.attempt([LeasedWork(lease.key, group)])
    assert Counter(trace.prompt_id for trace in read_all(service.target)) == {"p0": 2, "p1": 2, "p2": 2}
    assert worker.run() == "done"
    assert len(read_all(service.target)) == 8


def test_a_worker_that_was_overtaken_goes_on_with_other_work(
    make_worker: MakeWorker, engine: TeacherEngine, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = numbered(12)
    worker = make_worker(prompts)
    step = engine.step
    stolen: list[Any] = []

    def steal_first() -> Any:
        if not stolen:
            with TraceClient(service.target) as client:
                thief = client.prompt_worker("lessons", "job", worker="thief", predecessor="teacher-0")
                with thief:
                    stolen.append(thief.take())
        return step()

    monkeypatch.setattr(engine, "step", steal_first)
    assert worker.run() == "done"
    assert stolen[0] is not None
    assert Counter((t.prompt_id, t.sample_index) for t in read_all(service.target)) == samples_of(prompts)


def test_a_stream_of_another_teacher_is_refused_with_the_difference(
    engine: TeacherEngine, service: Any
) -> None:
    spec = make_spec(engine)
    other = replace(spec, teacher=replace(spec.teacher, model="other"), license="MIT")
    with TraceClient(service.target) as client:
        client.open_stream(spec)
        assert client.open_stream(spec).spec == spec
        with pytest.raises(
            StreamExistsError, match=r"license .*'MIT'; teacher\.model is 'tiny', wanted 'other'"
        ):
            client.open_stream(other)
