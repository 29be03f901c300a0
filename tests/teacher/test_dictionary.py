"""A worker's codec dictionary: learnt from the stream's first blocks, kept with it, taken over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from models.teaching import teach_config

from lynearm.client import TraceClient
from lynearm.teacher import dictionary
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.prompt_content import encode_prompt
from lynearm.teacher.prompts import Prompt
from lynearm.teacher.worker import TeacherWorker
from lynearm.wire.blocks import split_block
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import DictionaryLimitError
from lynearm.wire.specs import CodecSpec, StreamSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPTS = [Prompt(f"p{n}", f"What is {n} plus {n}?") for n in range(48)]


def answer(
    engine: TeacherEngine, model: Path, target: str, prompts: Sequence[Prompt], **settings: Any
) -> None:
    """Let a worker answer prompts, as a job of their own."""
    spec, job = make_spec(engine), f"job-{len(prompts)}"
    with TraceClient(target) as client:
        client.open_stream(spec)
        client.jobs.create("lessons", job, list(map(encode_prompt, prompts)), samples_per_prompt=2)
    worker = TeacherWorker(teach_config(model, service=target, block_bytes=2000, **settings))
    # One engine serves the whole session: loading another takes seconds.
    worker._engine = engine
    worker.connect(spec, job)
    assert worker.run() == "done"
    worker.disconnect()


def make_spec(engine: TeacherEngine) -> StreamSpec:
    teacher, tokenizer = engine.describe()
    return StreamSpec("lessons", teacher, tokenizer, CodecSpec("standard", 16), "Apache-2.0")


def digests_and_prompts(target: str) -> tuple[list[bytes], set[str]]:
    with TraceClient(target) as client, client.subscribe("lessons", follow=False) as blocks:
        reader = client.dictionaries("lessons")
        digests: list[bytes] = []
        prompts: set[str] = set()
        for received in blocks:
            digests.append(split_block(received.block)[0].dictionary_digest)
            prompts |= {trace.prompt_id for trace in decode_block(received.block, dictionaries=reader)}
        return digests, prompts


def test_a_stream_learns_a_dictionary_that_the_next_worker_takes_over(
    engine: TeacherEngine, tiny_model: Path, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary, "TRAINING_POSITIONS", (60,))
    answer(engine, tiny_model, service.target, PROMPTS[:40])
    digests, prompts = digests_and_prompts(service.target)
    assert prompts == {prompt.prompt_id for prompt in PROMPTS[:40]}
    assert digests[0] == b""
    assert digests[-1]
    answer(engine, tiny_model, service.target, PROMPTS)
    later, prompts = digests_and_prompts(service.target)
    assert prompts == {prompt.prompt_id for prompt in PROMPTS}
    assert set(later[len(digests) :]) == {digests[-1]}
    with TraceClient(service.target) as client:
        assert client.get_stream("lessons").dictionary_count == 1


def test_a_better_dictionary_follows_when_there_is_more_to_learn_from(
    engine: TeacherEngine, tiny_model: Path, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary, "TRAINING_POSITIONS", (60, 300))
    answer(engine, tiny_model, service.target, PROMPTS)
    digests, prompts = digests_and_prompts(service.target)
    assert prompts == {prompt.prompt_id for prompt in PROMPTS}
    first, second = (digest for digest in dict.fromkeys(digests) if digest)
    assert digests == sorted(digests, key=[b"", first, second].index)
    with TraceClient(service.target) as client:
        assert client.get_stream("lessons").dictionary_count == 2


def test_a_dictionary_that_is_not_taken_costs_nothing_but_bits(
    engine: TeacherEngine, tiny_model: Path, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise DictionaryLimitError("the stream holds 64")

    monkeypatch.setattr(dictionary, "TRAINING_POSITIONS", (60,))
    monkeypatch.setattr(TraceClient, "put_dictionary", refuse)
    answer(engine, tiny_model, service.target, PROMPTS[:20])
    digests, prompts = digests_and_prompts(service.target)
    assert prompts == {prompt.prompt_id for prompt in PROMPTS[:20]}
    assert set(digests) == {b""}


def test_without_the_setting_nothing_is_learnt(
    engine: TeacherEngine, tiny_model: Path, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary, "TRAINING_POSITIONS", (1,))
    answer(engine, tiny_model, service.target, PROMPTS[:8], dictionary=False)
    assert set(digests_and_prompts(service.target)[0]) == {b""}
