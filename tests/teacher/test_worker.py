"""The worker against a real service, with the shared engine and without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models.teaching import teach_config

from lynearm.client import TraceClient
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.prompts import ChatMessage, Prompt
from lynearm.teacher.worker import TeacherWorker
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


@pytest.fixture
def worker(engine: TeacherEngine, tiny_model: Path, service: Any) -> TeacherWorker:
    made = TeacherWorker(teach_config(tiny_model, service=service.target, block_bytes=4000))
    # One engine serves the whole session: loading another takes half a minute.
    made._engine = engine
    return made


def test_every_prompt_is_published_once_with_all_its_completions(
    worker: TeacherWorker, engine: TeacherEngine, service: Any
) -> None:
    prompts = [Prompt(f"p{n}", f"What is {n} plus {n}?", tags={"n": str(n)}) for n in range(30)]
    prompts.append(Prompt("chat", messages=(ChatMessage("user", "Write a function."),)))
    prompts.append(Prompt("long", "number " * 200, file="f.jsonl", line=7))
    progress = worker.run(make_spec(engine), prompts)
    traces = read_all(service.target)
    expected = {(prompt.prompt_id, sample) for prompt in prompts[:-1] for sample in (0, 1)}
    assert len(traces) == len(expected)
    assert {(trace.prompt_id, trace.sample_index) for trace in traces} == expected
    assert [str(line).partition(" tokens")[0] for line in progress.skipped] == [
        "f.jsonl:7: prompt 'long': the prompt is " + progress.skipped[0].reason.split()[5]
    ]
    assert progress.generated_prompts == 31
    assert progress.acked_blocks > 1
    with TraceClient(service.target) as client:
        assert client.finished_prompts("lessons") == {prompt.prompt_id for prompt in prompts[:-1]}


def test_an_empty_completion_is_recorded_and_counted(
    worker: TeacherWorker, engine: TeacherEngine, service: Any
) -> None:
    progress = worker.run(make_spec(engine), [Prompt(f"p{n}", f"Number {n}") for n in range(30)])
    traces = read_all(service.target)
    empty = [
        trace for trace in traces if trace.completion_token_ids.size == 1 and trace.finish_reason == "stop"
    ]
    assert 0 < len(empty) <= progress.empty_completions < len(traces)
    assert all(trace.completion_text == "" and trace.top_k.positions == 1 for trace in empty)


def test_a_second_worker_leaves_out_what_is_finished(
    worker: TeacherWorker, engine: TeacherEngine, service: Any
) -> None:
    prompts = [Prompt(f"p{n}", f"Number {n}") for n in range(6)]
    worker.run(make_spec(engine), prompts[:4])
    assert worker.progress().generated_prompts == 4
    worker.run(make_spec(engine), prompts)
    assert worker.progress().generated_prompts == 6
    assert len(read_all(service.target)) == 12


def test_the_traces_say_how_they_were_made(
    worker: TeacherWorker, engine: TeacherEngine, service: Any
) -> None:
    worker.run(make_spec(engine), [Prompt("a", "Hi", tags={"topic": "greeting"})])
    for trace in read_all(service.target):
        prompt_ids = engine.tokenizer.encode(Prompt("a", "Hi"))
        assert trace.prompt_token_ids.tolist() == prompt_ids.tolist()
        assert trace.tags == {"topic": "greeting"}
        assert trace.sampling == engine.sampling("a", trace.sample_index, prompt_ids.size)
        assert trace.completion_text == engine.tokenizer.decode(
            trace.completion_token_ids.tolist(), engine.eos_token_ids
        )


def test_a_stopped_worker_publishes_nothing_more(worker: TeacherWorker, engine: TeacherEngine) -> None:
    worker.stop()
    progress = worker.run(make_spec(engine), [Prompt("a", "Hi")])
    assert progress.stopped
    assert progress.generated_prompts == 0
    assert engine.unfinished == 0


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
