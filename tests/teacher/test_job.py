"""The whole job: real Ray, real vLLM, a real service, and all of them killed."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from models.teaching import teach_config
from models.tiny_llama import build_tiny_llama
from models.trace_blocks import make_block, make_spec

from lynearm.client import JobPrompt, TraceClient
from lynearm.teacher import TeachProgress, job, run_teach
from lynearm.teacher.prompt_job import JobPrompts
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import JobCancelledError, PromptFileError, StreamSealedError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Ray leaves its child processes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PROMPT_COUNT = 120


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": f"p{n}", "prompt": f"What is {n} plus {n}?"}) for n in range(PROMPT_COUNT)]
    lines.insert(1, "{")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def wordy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("wordy") / "tiny")


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    from lynearm.teacher.ray_actor import teacher_session

    with teacher_session("local", 1):
        yield


def count_traces(target: str) -> Counter[str]:
    with TraceClient(target) as client, client.subscribe("lessons", follow=False) as blocks:
        dictionaries = client.dictionaries("lessons")
        decoded = (decode_block(block.block, dictionaries=dictionaries) for block in blocks)
        return Counter(trace.prompt_id for traces in decoded for trace in traces)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_an_interrupted_job_goes_on_and_survives_the_death_of_service_and_teacher(
    service: Any, prompts: Path, wordy_model: Path
) -> None:
    config = teach_config(
        wordy_model,
        service=service.target,
        prompts=prompts,
        completions=1,
        max_tokens=100,
        max_batch=4,
        block_bytes=2000,
    )
    interrupted: list[int] = []

    def interrupt_early(progress: TeachProgress) -> None:
        if progress.acked_blocks >= 2 and not interrupted:
            interrupted.append(progress.done_prompts)
            signal.raise_signal(signal.SIGINT)

    first = run_teach(config, interrupt_early)
    assert first.interrupted
    assert not first.sealed
    assert 0 < first.completed < PROMPT_COUNT
    assert count_traces(service.target).total() == first.completed

    killed: list[int] = []

    def kill_each_once(progress: TeachProgress) -> None:
        if progress.acked_blocks < 2 or progress.stage != "generating":
            return
        if not killed:
            killed.append(progress.workers[0].process_id)
            service.kill()
            threading.Timer(2.0, service.start).start()
        elif len(killed) == 1 and progress.acked_blocks >= 6:
            killed.append(progress.workers[0].process_id)
            os.kill(killed[-1], signal.SIGKILL)

    second = run_teach(config, kill_each_once)
    assert len(killed) == 2, "the job ended before everything was killed"
    assert second.restarts == 1
    assert second.sealed
    assert not second.interrupted
    assert (second.finished_before, second.completed) == (first.completed, PROMPT_COUNT - first.completed)
    assert count_traces(service.target) == Counter({f"p{n}": 1 for n in range(PROMPT_COUNT)})
    assert [line.line for line in second.skipped] == [2]

    again = run_teach(config)
    assert (again.finished_before, again.completed, again.sealed) == (PROMPT_COUNT, 0, True)
    with prompts.open("a") as file:
        file.write('\n{"prompt": "One more"}')
    with pytest.raises(StreamSealedError, match="1 prompts are not in it"):
        run_teach(config)


def test_no_channel_is_open_while_ray_forks_its_servers(
    service: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EnoughError(Exception):
        pass

    counts: list[int] = []

    def count_channels(*_: object) -> None:
        gc.collect()
        counts.append(sum(isinstance(thing, grpc.Channel) for thing in gc.get_objects()))
        if len(counts) == 2:
            raise EnoughError

    count_channels()
    monkeypatch.setattr(job, "teacher_session", count_channels)
    with pytest.raises(EnoughError):
        run_teach(teach_config(tmp_path, prompts=prompts, service=service.target))
    assert counts[1] == counts[0]


def test_a_job_that_was_cancelled_starts_nothing(service: Any, prompts: Path, tmp_path: Path) -> None:
    with TraceClient(service.target) as client:
        client.create_stream(make_spec("lessons"))
        client.jobs.create("lessons", "mine", [JobPrompt("p0", b"x")])
        client.jobs.cancel("lessons", "mine")
    config = teach_config(tmp_path, prompts=prompts, service=service.target, job="mine")
    with pytest.raises(JobCancelledError, match="'mine' of stream 'lessons' was cancelled"):
        run_teach(config)


def test_prompts_that_other_jobs_answered_are_counted_before_anything_starts(
    service: Any, prompts: Path, tmp_path: Path
) -> None:
    with TraceClient(service.target) as client:
        client.create_stream(make_spec("lessons"))
        with client.publisher("lessons", "other") as publisher:
            publisher.publish(make_block(0), [f"p{number}" for number in range(PROMPT_COUNT)])
    report = run_teach(teach_config(tmp_path, prompts=prompts, service=service.target, completions=1))
    assert (report.job, report.finished_before, report.completed) == ("", PROMPT_COUNT, 0)
    assert report.sealed


def test_a_prompt_that_the_queue_does_not_take_is_a_bad_line(service: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    long = json.dumps({"id": "long", "prompt": "x" * (1 << 20)})
    path.write_text(f'{{"id": "a", "prompt": "Hi"}}\n{long}\n{{"id": "a\\u0000", "prompt": "Hi"}}\n')
    found = JobPrompts(teach_config(tmp_path, prompts=path))
    assert [prompt.prompt_id for prompt in found] == ["a"]
    assert [line.line for line in found.bad_lines] == [2, 3]
    with pytest.raises(PromptFileError, match=r"prompts\.jsonl:2: prompt 'long' takes"):
        JobPrompts(teach_config(tmp_path, prompts=path, strict=True))


def test_the_same_prompts_are_the_same_job_wherever_they_lie(prompts: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(prompts.read_bytes() + b"\n\n")
    first = JobPrompts(teach_config(tmp_path, prompts=prompts))
    assert JobPrompts(teach_config(tmp_path, prompts=copy)).digest == first.digest
    copy.write_bytes(prompts.read_bytes() + b'\n{"prompt": "One more"}')
    assert JobPrompts(teach_config(tmp_path, prompts=copy)).digest != first.digest


def test_a_strict_job_starts_nothing_for_a_bad_line(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=r"prompts\.jsonl:2: not JSON"):
        run_teach(teach_config(tmp_path, prompts=prompts, strict=True, service="127.0.0.1:1"))


def test_a_job_waits_for_the_service_and_says_so(prompts: Path, tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    messages: list[str] = []

    def note(progress: TeachProgress) -> None:
        if progress.message:
            messages.append(progress.message)
            raise EnoughError

    with pytest.raises(EnoughError):
        run_teach(teach_config(tmp_path, prompts=prompts, service="127.0.0.1:1"), note)
    assert messages == ["waiting for the trace service at 127.0.0.1:1"]


def test_a_ray_that_is_not_there_is_named() -> None:
    # A process of its own: one that is connected to a Ray already goes on using that.
    opening = "with teacher_session('127.0.0.1:1', 1): pass"
    code = f"from lynearm.teacher.ray_actor import teacher_session\n{opening}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot reach Ray (127.0.0.1:1)" in done.stderr
