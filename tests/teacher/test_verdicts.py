"""Verdicts, what is kept, and two teachers in one stream: a real engine and a real service."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models.teaching import teach_config
from models.tiny_llama import build_tiny_llama

from lynearm.client import TraceClient
from lynearm.teacher.config import Keep, TeachConfig
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.prompt_content import encode_prompt
from lynearm.teacher.prompts import Prompt
from lynearm.teacher.routing import PromptRoute, RouteRule, RoutingTable, original_prompt_id
from lynearm.teacher.run_several import run_several
from lynearm.teacher.several import assign_teachers, prepare_teachers
from lynearm.teacher.shared_streams import join_stream
from lynearm.teacher.worker import TeacherWorker
from lynearm.teacher.worker_progress import WorkerProgress
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import MisalignmentError
from lynearm.wire.labels import TraceFilter
from lynearm.wire.specs import CodecSpec, StreamSpec
from lynearm.wire.traces import Trace

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Ray leaves its child processes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PROMPTS = [Prompt(f"p{n}", f"What is {n} plus {n}?", tags={"topic": "sums"}) for n in range(24)]


def starts_with_a_vowel(answer: str, trace: Trace) -> bool | None:
    """Some of the random answers, none of the empty ones, and an error now and then."""
    if answer.startswith("q"):
        raise ValueError("no q, please")
    return answer.lower().startswith(("a", "e", "i", "o", "u")) if answer else None


def expected_verdict(trace: Trace, engine: TeacherEngine) -> str:
    answer = engine.tokenizer.spans.answer_text(
        trace.completion_token_ids.tolist(), trace.spans, trace.finish_reason
    )
    try:
        said = starts_with_a_vowel(answer, trace)
    except ValueError:
        said = None
    return "unverifiable" if said is None else "correct" if said else "incorrect"


def make_spec(engine: TeacherEngine, **changes: Any) -> StreamSpec:
    teacher, tokenizer = engine.describe()
    spec = StreamSpec("lessons", teacher, tokenizer, CodecSpec("standard", 16), "Apache-2.0")
    return replace(spec, **changes)


def work(
    engine: TeacherEngine, config: TeachConfig, spec: StreamSpec, prompts: list[Prompt] | None = None
) -> WorkerProgress:
    prompts = PROMPTS if prompts is None else prompts
    job = f"job-{config.producer_id}"
    with TraceClient(config.service) as client:
        client.open_stream(join_stream(client, spec, config.route))
        job_prompts = [encode_prompt(prompt) for prompt in prompts]
        client.jobs.create(spec.name, job, job_prompts, samples_per_prompt=config.completions)
    worker = TeacherWorker(config)
    # One engine serves the whole session: loading another takes half a minute.
    worker._engine = engine
    worker.connect(spec, job)
    try:
        assert worker.run() == "done"
    finally:
        worker.disconnect()
    return worker.progress()


def read_all(target: str, stream: str = "lessons", wanted: TraceFilter | None = None) -> list[Trace]:
    with (
        TraceClient(target) as client,
        client.subscribe(stream, follow=False, wanted=wanted or TraceFilter()) as blocks,
    ):
        dictionaries = client.dictionaries(stream)
        return [trace for block in blocks for trace in decode_block(block.block, dictionaries=dictionaries)]


def test_every_trace_carries_its_verdict(engine: TeacherEngine, tiny_model: Path, service: Any) -> None:
    verify = f"python:{__name__}:starts_with_a_vowel"
    config = teach_config(tiny_model, service=service.target, verify=verify)
    progress = work(engine, config, make_spec(engine))
    traces = read_all(service.target)
    assert len(traces) == 2 * len(PROMPTS)
    verdicts = Counter(trace.tags["verdict"] for trace in traces)
    assert progress.verdicts == verdicts
    assert set(verdicts) == {"correct", "incorrect", "unverifiable"}
    assert progress.left_out == 0
    for trace in traces:
        assert trace.tags["verdict"] == expected_verdict(trace, engine)
        assert trace.tags["topic"] == "sums"
    assert any("no q, please" in trace.tags.get("verdict_reason", "") for trace in traces) == any(
        trace.completion_text.strip().startswith("q") for trace in traces
    )


@pytest.mark.parametrize("keep", ["correct", "shortest-correct"])
def test_only_correct_completions_are_published_and_every_prompt_is_finished(
    engine: TeacherEngine, tiny_model: Path, service: Any, keep: Keep
) -> None:
    verify = f"python:{__name__}:starts_with_a_vowel"
    config = teach_config(tiny_model, service=service.target, verify=verify)
    work(engine, config, make_spec(engine))
    everything = read_all(service.target)
    config = replace(config, stream="kept", keep=keep, block_bytes=1000)
    progress = work(engine, config, make_spec(engine, name="kept"))
    published = read_all(service.target, "kept")
    correct = Counter(trace.prompt_id for trace in everything if trace.tags["verdict"] == "correct")
    lessons = [trace for trace in published if trace.completion_token_ids.size]
    assert Counter(trace.prompt_id for trace in lessons) == (
        correct if keep == "correct" else Counter(set(correct))
    )
    by_sample = {(trace.prompt_id, trace.sample_index): trace for trace in everything}
    for trace in lessons:
        same = by_sample[trace.prompt_id, trace.sample_index]
        assert trace.completion_token_ids.tolist() == same.completion_token_ids.tolist()
        if keep == "shortest-correct":
            others = [one for one in everything if one.prompt_id == trace.prompt_id]
            assert trace.completion_token_ids.size == min(
                one.completion_token_ids.size for one in others if one.tags["verdict"] == "correct"
            )
    records = {trace.prompt_id for trace in published if not trace.completion_token_ids.size}
    assert records == {prompt.prompt_id for prompt in PROMPTS} - set(correct)
    assert records
    assert progress.left_out == len(everything) - len(lessons)
    with TraceClient(service.target) as client:
        assert client.finished_prompts("kept") == {prompt.prompt_id for prompt in PROMPTS}


def test_a_filter_passes_over_blocks_without_a_correct_answer(
    engine: TeacherEngine, tiny_model: Path, service: Any
) -> None:
    config = teach_config(tiny_model, service=service.target, verify="regex:(?!)", keep="correct")
    work(engine, config, make_spec(engine))
    assert {trace.tags["kept"] for trace in read_all(service.target)} == {"0"}
    assert read_all(service.target, wanted=TraceFilter(tags={"verdict": frozenset({"correct"})})) == []


def test_two_teachers_write_to_one_stream(engine: TeacherEngine, tiny_model: Path, service: Any) -> None:
    """The engine answers for both: what the service and the stream see of the second is another spec."""
    table = RoutingTable((RouteRule("first"), RouteRule("second")), everyone=True)
    labels = {f"teacher.{rule.teacher}": "tiny@0, MIT" for rule in table.rules}
    own = make_spec(engine, labels=labels)
    specs = {"first": own, "second": replace(own, teacher=replace(own.teacher, model="second"))}
    for name, spec in specs.items():
        route = PromptRoute(name, table, names_ids=True, vocab_size=own.teacher.vocab_size + 8)
        config = teach_config(
            tiny_model, service=service.target, producer_id=f"teacher-{name}", route=route, labels=labels
        )
        for _ in range(2):  # the second time, all is finished
            work(engine, config, spec, list(route.apply(PROMPTS[:4])))
    traces = read_all(service.target)
    wrote = Counter(
        (original_prompt_id(trace.prompt_id, trace.tags), trace.tags["teacher"]) for trace in traces
    )
    assert wrote == {(prompt.prompt_id, name): 2 for prompt in PROMPTS[:4] for name in specs}
    narrow = replace(own, teacher=replace(own.teacher, vocab_size=own.teacher.vocab_size + 9))
    with pytest.raises(MisalignmentError, match="wide, those of stream 'lessons'"):
        work(engine, config, narrow, PROMPTS[:1])


@pytest.mark.slow
def test_a_job_of_two_teachers_runs_to_its_end_and_goes_on(
    engine: TeacherEngine, tiny_model: Path, service: Any, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"id": f"p{n}", "prompt": f"What is {n}?", "tags": {"topic": "maths" if n % 2 else "art"}}
        for n in range(12)
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    second_model = build_tiny_llama(tmp_path / "second", seed=1)
    # The end tokens are part of what both must share.
    generation = (tiny_model / "generation_config.json").read_text()
    (second_model / "generation_config.json").write_text(generation)
    table = RoutingTable((RouteRule("maths", {"topic": frozenset({"maths"})}), RouteRule("rest")))
    common: dict[str, Any] = {"prompts": prompts, "service": service.target, "verify": "regex:e"}
    configs = prepare_teachers(
        assign_teachers(
            table,
            [teach_config(tiny_model, **common), teach_config(second_model, license="MIT", **common)],
        )
    )
    teachers: set[str] = set()
    first = run_several(configs, only="maths")
    assert not first["maths"].sealed
    reports = run_several(configs, lambda progress: teachers.update(one.name for one in progress.teachers))
    assert (reports["maths"].finished_before, reports["maths"].completed) == (6, 0)
    assert reports["rest"].completed == 6
    assert [reports[name].sealed for name in ("maths", "rest")] == [True, True]
    assert sum(reports["rest"].verdicts.values()) == 12
    assert teachers == {"maths", "rest"}
    traces = read_all(service.target)
    assert Counter((trace.prompt_id, trace.tags["teacher"]) for trace in traces) == {
        (f"p{n}", "maths" if n % 2 else "rest"): 2 for n in range(12)
    }
    with TraceClient(service.target) as client:
        spec = client.get_stream("lessons").spec
    assert spec.license == "Apache-2.0 AND MIT"
    assert set(spec.labels) == {"teacher.maths", "teacher.rest"}
