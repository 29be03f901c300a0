"""A served teacher, real vLLM behind a real socket: results, names, cancellation, limits, draining."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from models.reference import reference_distributions
from models.teacher_thread import TeacherThread, wait_until

from lynearm.client import (
    AsyncTeacherClient,
    GenerateOptions,
    ScoredCompletion,
    ScoreSettings,
    StudentCompletion,
    TeacherClient,
)
from lynearm.teacher.engine import Completion, TeacherEngine
from lynearm.teacher.prompts import Prompt
from lynearm.teacher.scoring import ScoreTask
from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.v1.trace_pb2 import CODEC_MODE_EXACT
from lynearm.wire.errors import (
    DeadlineError,
    InvalidInputError,
    LimitError,
    LynearmError,
    PromptTooLongError,
    RequestConflictError,
    ServiceUnavailableError,
)
from lynearm.wire.specs import CodecMode
from lynearm.wire.traces import Int32Array, SamplingParams

# torch and vLLM warn about each other's old names while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

VOCAB = 384
EXACT = ScoreSettings(top_k=8, codec="exact")

LONG_PROMPT = [42, 77, 107]
LONG_TOKENS = 16
LONG = GenerateOptions(SamplingParams(temperature=0.0, max_tokens=110))
"""Together they give one of the longest completions that this model writes by itself."""


def some_ids(seed: int, *shape: int) -> Int32Array:
    return np.random.default_rng(seed).integers(5, VOCAB, shape).astype(np.int32)


def make_completion(name: str, prompt: int = 12, completion: int = 20, chosen: int = 4) -> StudentCompletion:
    seed = sum(name.encode())
    return StudentCompletion(
        name,
        some_ids(seed, prompt),
        some_ids(seed + 1, completion),
        some_ids(seed + 2, completion, chosen) if chosen else None,
    )


def make_completions(count: int, **shape: int) -> list[StudentCompletion]:
    return [make_completion(f"c-{number}", **shape) for number in range(count)]


@pytest.fixture
def teacher(shared_engine: TeacherEngine) -> Iterator[TeacherThread]:
    with TeacherThread(shared_engine) as serving:
        yield serving


@pytest.fixture
def client(teacher: TeacherThread) -> Iterator[TeacherClient]:
    with TeacherClient(teacher.target, patience_seconds=0.5) as made:
        yield made


def check(scored: ScoredCompletion, sent: StudentCompletion, model: Path, temperature: float = 1.0) -> None:
    task = ScoreTask(
        sent.request_id, sent.prompt_token_ids, sent.completion_token_ids, temperature=temperature
    )
    expected = reference_distributions(model, task)
    trace = scored.trace
    np.testing.assert_array_equal(trace.prompt_token_ids, sent.prompt_token_ids)
    rows = np.arange(sent.completion_token_ids.size)
    assert np.abs(trace.sampled_logprobs - expected[rows, sent.completion_token_ids]).max() < 1e-3
    best = np.sort(expected, axis=1)[:, ::-1][:, : trace.top_k.k]
    assert np.abs(trace.top_k.logprobs - best).max() < 1e-3
    assert np.abs(trace.top_k.tail_mass - (1 - np.exp(best).sum(axis=1))).max() < 1e-3
    assert sent.chosen_ids is not None
    chosen = np.take_along_axis(expected, sent.chosen_ids.astype(np.int64), axis=1)
    assert np.abs(scored.chosen_logprobs - chosen).max() < 1e-3


def test_scores_come_back_by_name_and_are_those_of_transformers(
    client: TeacherClient, tiny_model: Path
) -> None:
    lengths = [(1, 1), (20, 60), (3, 5), (70, 58), (12, 2), (1, 127)]
    sent = {f"r{p}-{t}": make_completion(f"r{p}-{t}", p, t) for p, t in lengths}
    received = list(client.score(sent.values(), EXACT))
    assert sorted(scored.request_id for scored in received) == sorted(sent)
    for scored in received:
        check(scored, sent[scored.request_id], tiny_model)


def test_a_temperature_reaches_scores_and_chosen_ids(client: TeacherClient, tiny_model: Path) -> None:
    sent = make_completion("warm")
    (scored,) = client.score([sent], replace(EXACT, temperature=2.0))
    check(scored, sent, tiny_model, temperature=2.0)


@pytest.mark.parametrize("codec", ["exact", "fine"])
def test_draws_from_the_tail_come_with_scores(client: TeacherClient, codec: CodecMode) -> None:
    sent = [make_completion("drawn", 20, 60), StudentCompletion("empty", some_ids(1, 5), some_ids(2, 0))]
    settings = ScoreSettings(top_k=8, codec=codec, tail_draws=3)
    drawn, empty = sorted(client.score(sent, settings), key=lambda scored: scored.request_id)
    (plain,) = client.score(sent[:1], replace(settings, tail_draws=0))
    found = drawn.trace.top_k.tail_draws
    assert found is not None
    assert found.shape == (60, 3)
    assert ((found >= 0) & (found < VOCAB)).all()
    assert not (found[:, :, None] == drawn.trace.top_k.token_ids[:, None]).any()
    assert len(set(found.ravel().tolist())) > 60
    assert empty.trace.top_k.tail_draw_count in (0, 3)
    assert plain.trace.top_k.tail_draws is None
    assert np.abs(plain.trace.top_k.logprobs - drawn.trace.top_k.logprobs).max() < 5e-3


def test_chosen_logprobs_of_other_codecs_are_right_to_half_a_thousandth(client: TeacherClient) -> None:
    sent = make_completion("coarse", chosen=9)
    (exact,) = client.score([sent], EXACT)
    (coarse,) = client.score([sent], replace(EXACT, codec="compact"))
    assert coarse.chosen_logprobs.shape == (20, 9)
    assert 0 < np.abs(exact.chosen_logprobs - coarse.chosen_logprobs).max() <= 0.5 / 1024 + 1e-6


def test_the_teacher_says_who_it_is(client: TeacherClient) -> None:
    info = client.describe()
    assert (info.spec.vocab_size, info.spec.max_model_len) == (VOCAB, 128)
    assert (info.max_top_k, info.max_chosen_ids) == (16, 256)
    assert info.spec.revision.startswith("sha256:")
    assert client.is_serving()


def test_an_empty_completion_and_no_entries_are_answered(client: TeacherClient) -> None:
    sent = [make_completion("empty", completion=0), make_completion("bare", chosen=0)]
    received = {one.request_id: one for one in client.score(sent, replace(EXACT, top_k=0))}
    assert received["empty"].trace.completion_token_ids.size == 0
    assert received["empty"].chosen_logprobs.shape == (0, 4)
    assert received["bare"].trace.top_k.k == 0
    assert received["bare"].chosen_logprobs.shape == (20, 0)
    assert list(client.score([], EXACT)) == []


@pytest.mark.parametrize(
    ("completion", "error", "words"),
    [
        (make_completion("long", 100, 29), PromptTooLongError, "100 prompt tokens and 29"),
        (replace(make_completion("alien"), prompt_token_ids=some_ids(1, 3) + 384), InvalidInputError, "384"),
        (
            replace(make_completion("choice"), chosen_ids=np.full((20, 1), 70_000, np.int32)),
            InvalidInputError,
            "70000",
        ),
        (
            replace(make_completion("start"), prompt_token_ids=some_ids(1, 0)),
            InvalidInputError,
            "empty prompt",
        ),
        (make_completion("many", chosen=257), InvalidInputError, "257 chosen ids"),
    ],
)
def test_what_is_wrong_with_one_completion_is_said_of_it_alone(
    client: TeacherClient, completion: StudentCompletion, error: type[LynearmError], words: str
) -> None:
    sent = [make_completion("before"), completion, make_completion("after")]
    failures: dict[str, LynearmError] = {}
    received = [one.request_id for one in client.score(sent, EXACT, on_failure=failures.__setitem__)]
    assert sorted(received) == ["after", "before"]
    assert type(failures[completion.request_id]) is error
    assert words in failures[completion.request_id].message
    with pytest.raises(error, match=words):
        list(client.score([completion], EXACT))


def test_what_this_teacher_does_not_give_ends_the_call(client: TeacherClient) -> None:
    with pytest.raises(InvalidInputError, match="top_k 17 is above the 16"):
        list(client.score(make_completions(3), ScoreSettings(top_k=17)))


def test_a_result_that_no_message_can_hold_is_refused(client: TeacherClient, teacher: TeacherThread) -> None:
    service = teacher.server._service
    service._teacher = replace(service._teacher, spec=replace(service._teacher.spec, max_model_len=10**6))
    huge = StudentCompletion("huge", some_ids(1, 1), some_ids(2, 200_000))
    with pytest.raises(LimitError, match="a message holds"):
        list(client.score([huge], EXACT))


def test_the_same_request_again_is_not_computed_twice(client: TeacherClient, teacher: TeacherThread) -> None:
    settings = replace(EXACT, session="twice")
    sent = make_completions(5)
    first = {one.request_id: one for one in client.score(sent, settings)}
    assert teacher.begun == 5
    again = {one.request_id: one for one in client.score(sent, settings)}
    assert teacher.begun == 5
    for name, one in first.items():
        np.testing.assert_array_equal(one.chosen_logprobs, again[name].chosen_logprobs)
        np.testing.assert_array_equal(one.trace.top_k.logprobs, again[name].trace.top_k.logprobs)


def test_a_name_that_stands_for_something_else_is_refused(client: TeacherClient) -> None:
    settings = replace(EXACT, session="names")
    sent = make_completion("one")
    list(client.score([sent], settings))
    others = [
        replace(sent, completion_token_ids=sent.completion_token_ids[::-1]),
        replace(sent, chosen_ids=None),
    ]
    for other in others:
        with pytest.raises(RequestConflictError, match="'one' of session 'names'"):
            list(client.score([other], settings))
    with pytest.raises(RequestConflictError):
        list(client.score([sent], replace(settings, top_k=3)))
    assert list(client.score([others[0]], replace(settings, session="other-names")))


def test_one_that_is_in_flight_twice_is_computed_once(client: TeacherClient, teacher: TeacherThread) -> None:
    settings = replace(EXACT, session="at-once")
    sent = make_completions(30, completion=100)
    received: list[int] = []

    def score() -> None:
        received.append(len(list(client.score(sent, settings))))

    threads = [threading.Thread(target=score) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert received == [30, 30, 30]
    assert teacher.begun == 30


def test_results_are_forgotten_oldest_first(shared_engine: TeacherEngine) -> None:
    with (
        TeacherThread(shared_engine, recent_mib=0) as teacher,
        TeacherClient(teacher.target) as client,
    ):
        settings = replace(EXACT, session="forgetful")
        list(client.score(make_completions(2), settings))
        list(client.score(make_completions(2), settings))
        assert teacher.begun == 4


class Gate:
    """Lets the engine step as often as a test allows."""

    def __init__(self, teacher: TeacherThread, patch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        self._permits = threading.Semaphore(0)
        self._step = teacher.engine.step
        self._is_open = False
        patch.setattr(teacher.engine, "step", self._gated)

    def allow(self, steps: int) -> None:
        for _ in range(steps):
            self._permits.release()

    def open(self) -> None:
        self._is_open = True
        self._permits.release()

    def _gated(self) -> list[Completion]:
        if not self._is_open:
            self._permits.acquire(timeout=30)
        self.steps += 1
        return self._step()


def test_an_answer_that_nobody_reads_on_ends_in_the_engine_within_two_steps(
    client: TeacherClient, teacher: TeacherThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(teacher, monkeypatch)
    gate.allow(4)
    with client.generate(LONG_PROMPT, LONG) as generation:
        next(generation)
        assert teacher.engine.unfinished == 1
    wait_until(lambda: not teacher.server._table._requests)
    gate.open()
    wait_until(lambda: not teacher.server._engine.unfinished)
    assert teacher.engine.unfinished == 0
    assert gate.steps <= 6 < LONG_TOKENS


def test_an_iteration_that_is_left_ends_its_requests_in_the_engine(
    client: TeacherClient, teacher: TeacherThread
) -> None:
    iteration = client.score(endless(), EXACT, max_in_flight=64)
    next(iteration)
    iteration.close()
    wait_until(lambda: not teacher.server._service._scoring)
    wait_until(lambda: not teacher.server._engine.unfinished)
    assert teacher.engine.unfinished == 0
    assert all(one.result.done() for one in teacher.server._table._requests.values())


def endless() -> Iterator[StudentCompletion]:
    for number in itertools.count():
        yield make_completion(f"endless-{number}", completion=100)


def test_a_deadline_ends_what_it_waits_for_in_the_engine(
    client: TeacherClient, teacher: TeacherThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(teacher, monkeypatch)
    with pytest.raises(DeadlineError):
        list(client.score(make_completions(100, completion=100), EXACT, timeout_seconds=0.3))
    wait_until(lambda: not teacher.server._service._scoring)
    gate.open()
    wait_until(lambda: not teacher.server._engine.unfinished)
    assert teacher.engine.unfinished == 0
    assert gate.steps <= 2  # all of them would have taken at least three
    assert len(list(client.score(make_completions(8), EXACT))) == 8


def test_a_client_that_reads_slowly_is_read_slowly(shared_engine: TeacherEngine) -> None:
    taken: list[str] = []

    def noted() -> Iterator[StudentCompletion]:
        for number in range(400):
            completion = make_completion(f"slow-{number}", 4, 120, chosen=200)
            taken.append(completion.request_id)
            yield completion

    with (
        TeacherThread(shared_engine, call_buffer_mib=1) as teacher,
        TeacherClient(teacher.target) as client,
    ):
        iteration = client.score(noted(), EXACT, max_in_flight=10_000)
        next(iteration)
        before = 0
        while teacher.begun > before:
            before = teacher.begun
            time.sleep(0.3)
        # 200 KB of results each, of which 1 MiB may wait, and a few may be on the way.
        assert teacher.begun < 200
        assert 1 + sum(1 for _ in iteration) == 400


def test_few_requests_are_in_the_engine_at_a_time(shared_engine: TeacherEngine) -> None:
    with (
        TeacherThread(shared_engine, max_in_flight=4) as teacher,
        TeacherClient(teacher.target) as client,
    ):
        most: list[int] = []
        for _ in client.score(make_completions(40, completion=60), EXACT):
            most.append(teacher.server._engine.unfinished)
        assert len(most) == 40
        assert max(most) <= 4


def test_generating_gives_text_and_a_trace_that_scoring_confirms(
    client: TeacherClient, teacher: TeacherThread
) -> None:
    options = replace(LONG, trace_top_k=8, codec="exact")
    generation = client.generate(LONG_PROMPT, options)
    pieces = list(generation)
    answer = generation.answer
    assert answer.trace is not None
    tokenizer, eos = teacher.engine.tokenizer, teacher.engine.eos_token_ids
    assert "".join(pieces) == answer.text == tokenizer.decode(answer.trace.completion_token_ids, eos)
    assert answer.completion_tokens == answer.trace.completion_token_ids.size == LONG_TOKENS
    assert len(pieces) > 1
    assert answer.prompt_tokens == answer.trace.prompt_token_ids.size
    written = StudentCompletion("own", answer.trace.prompt_token_ids, answer.trace.completion_token_ids)
    (scored,) = client.score([written], EXACT)
    assert np.abs(scored.trace.top_k.logprobs - answer.trace.top_k.logprobs).max() < 1e-4
    assert np.abs(scored.trace.sampled_logprobs - answer.trace.sampled_logprobs).max() < 1e-4
    assert scored.trace.finish_reason == answer.finish_reason


def test_a_chat_a_text_and_its_tokens_are_the_same_prompt(
    client: TeacherClient, teacher: TeacherThread
) -> None:
    text = "What is three plus four?"
    greedy = GenerateOptions(SamplingParams(temperature=0.0, max_tokens=12), session="same", trace_top_k=0)
    tokens = teacher.engine.tokenizer.encode(Prompt("p", text)).tolist()
    chat = [{"role": "user", "content": text}]
    answers = [client.generate(prompt, greedy).answer for prompt in (text, chat, tokens, np.asarray(tokens))]
    assert len({answer.text for answer in answers}) == 1
    assert teacher.begun == 1  # the same name and content
    assert answers[0].trace is not None
    assert answers[0].trace.top_k.k == 0


def test_a_generation_is_joined_by_who_asks_again(client: TeacherClient, teacher: TeacherThread) -> None:
    options = replace(LONG, session="joined")
    first = client.generate(LONG_PROMPT, options)
    begun = next(first)
    second = client.generate(LONG_PROMPT, options).answer
    assert first.answer == second
    assert second.text.startswith(begun)
    assert teacher.begun == 1
    with pytest.raises(RequestConflictError):
        next(client.generate("The capital of Spain is", options))


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("x " * 300, GenerateOptions(), "context of 128"),
        ([500], GenerateOptions(), "token id 500"),
        ("Hi", GenerateOptions(trace_top_k=17), "top_k 17"),
        ("Hi", GenerateOptions(SamplingParams(top_p=1.5)), "top_p 1.5"),
        ("Hi", GenerateOptions(SamplingParams(temperature=-1.0)), "temperature -1.0"),
        ("Hi", GenerateOptions(SamplingParams(repetition_penalty=-1.0)), "repetition_penalty -1.0"),
        ("Hi", GenerateOptions(SamplingParams(stop=("",))), "a stop string is empty"),
        ("Hi", GenerateOptions(SamplingParams(stop_token_ids=(384,))), "stop token 384 is outside"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
    client: TeacherClient, teacher: TeacherThread, prompt: Any, options: GenerateOptions, words: str
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        next(client.generate(prompt, options))
    assert teacher.begun == 0


def test_an_answer_ends_with_its_stop_string(client: TeacherClient) -> None:
    whole = client.generate(LONG_PROMPT, LONG).answer.text
    # Some of what this model writes is half a character.
    stop = next(whole[at : at + 2] for at in range(8, len(whole)) if whole[at : at + 2].isascii())
    sampling = replace(LONG.sampling, stop=("never to be seen", stop))
    generation = client.generate(LONG_PROMPT, GenerateOptions(sampling, trace_top_k=4))
    answer = generation.answer
    assert (answer.finish_reason, answer.stop_string) == ("stop", stop)
    assert whole.startswith(answer.text)
    assert stop in answer.text
    assert answer.trace is not None
    assert (answer.trace.sampling, answer.trace.stop_string) == (sampling, stop)


def test_a_server_that_drains_answers_what_it_has_read(shared_engine: TeacherEngine) -> None:
    with (
        TeacherThread(shared_engine) as teacher,
        TeacherClient(teacher.target, patience_seconds=0.2) as client,
    ):
        generation = client.generate(LONG_PROMPT, replace(LONG, trace_top_k=4))
        next(generation)
        iteration = client.score(itertools.chain(make_completions(20), endless()), EXACT, max_in_flight=30)
        next(iteration)
        teacher.stop()
        answered: list[str] = []
        with pytest.raises(ServiceUnavailableError):
            answered.extend(scored.request_id for scored in iteration)
        assert generation.answer.trace is not None  # it was under way, and came to its end
        assert 1 + len(answered) + 1 == teacher.begun, "something was begun and not answered"
        assert not client.is_serving()


def test_a_score_call_is_taken_over_by_another_teacher(shared_engine: TeacherEngine) -> None:
    with TeacherThread(shared_engine) as first:
        client = TeacherClient([first.target, "127.0.0.1:1"])
        iteration = client.score(endless(), EXACT, max_in_flight=8)
        received = [next(iteration).request_id]
    with TeacherThread(shared_engine) as second, client:
        client._endpoints.targets = (first.target, second.target)
        received += [next(iteration).request_id for _ in range(40)]
        iteration.close()
    assert len(set(received)) == 41


def test_an_engine_that_fails_is_told_to_all_and_to_the_server(
    shared_engine: TeacherEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with TeacherThread(shared_engine) as teacher, TeacherClient(teacher.target, patience_seconds=0) as client:
        monkeypatch.setattr(shared_engine, "step", fail)
        with pytest.raises(ServiceUnavailableError, match="engine failed: out of memory"):
            list(client.score(make_completions(3), EXACT))
        wait_until(teacher.server._failed.is_set)
        with pytest.raises(ServiceUnavailableError, match="out of memory"):
            next(client.generate("Hi"))
    monkeypatch.undo()
    shared_engine.abort([f"r{number}" for number in range(4)])
    assert shared_engine.unfinished == 0


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([pb.ScoreRequest(completions=pb.CompletionBatch())], grpc.StatusCode.INVALID_ARGUMENT),
        ([pb.ScoreRequest()], grpc.StatusCode.INVALID_ARGUMENT),
        ([], grpc.StatusCode.INVALID_ARGUMENT),
        (
            [
                pb.ScoreRequest(open=pb.ScoreOpen(session="s", codec_mode=CODEC_MODE_EXACT)),
                pb.ScoreRequest(open=pb.ScoreOpen(session="s")),
            ],
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        ([b"\xff\xff"], grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_messages_that_are_out_of_place_are_refused(
    teacher: TeacherThread, messages: list[Any], code: grpc.StatusCode
) -> None:
    with grpc.insecure_channel(teacher.target) as channel:
        score = channel.stream_stream("/lynearm.v1.TeacherService/Score")
        data = [one if isinstance(one, bytes) else one.SerializeToString() for one in messages]
        with pytest.raises(grpc.RpcError) as failure:
            list(score(iter(data)))
    assert failure.value.code() is code
    assert "grpc-status-details-bin" in dict(failure.value.trailing_metadata())


def test_an_event_loop_scores_and_asks_as_a_thread_does(
    client: TeacherClient, teacher: TeacherThread, tiny_model: Path
) -> None:
    sent = {one.request_id: one for one in make_completions(12, completion=30)}
    expected = client.generate(LONG_PROMPT, LONG).answer

    async def work() -> None:
        async with AsyncTeacherClient(teacher.target, patience_seconds=0.5) as aio:
            assert (await aio.describe()).spec.vocab_size == VOCAB
            received = [scored async for scored in aio.score(sent.values(), EXACT, max_in_flight=4)]
            assert sorted(scored.request_id for scored in received) == sorted(sent)
            for scored in received:
                check(scored, sent[scored.request_id], tiny_model)
            generation = aio.generate(LONG_PROMPT, LONG)
            assert "".join([piece async for piece in generation]) == expected.text
            assert await generation.answer() == expected
            named = replace(EXACT, session="aio")
            _ = [one async for one in aio.score(make_completions(1), named)]
            with pytest.raises(RequestConflictError):
                _ = [one async for one in aio.score(make_completions(1), replace(named, top_k=3))]
            with pytest.raises(DeadlineError):
                _ = [one async for one in aio.score(endless(), EXACT, timeout_seconds=0.3)]
            iteration = aio.score(endless(), EXACT, max_in_flight=64)
            await anext(iteration)
            await iteration.aclose()

    asyncio.run(work())
    wait_until(lambda: not teacher.server._service._scoring)
    wait_until(lambda: not teacher.server._engine.unfinished)
    assert teacher.engine.unfinished == 0


def test_an_event_loop_is_told_when_nobody_answers(teacher: TeacherThread) -> None:
    async def work() -> None:
        async with AsyncTeacherClient("127.0.0.1:1", patience_seconds=0) as aio:
            with pytest.raises(ServiceUnavailableError, match="no teacher answers"):
                await anext(aio.score(make_completions(1), EXACT))
            with pytest.raises(ServiceUnavailableError, match="no teacher answers"):
                await aio.generate("Hi").answer()

    asyncio.run(work())


def test_the_examples_of_the_documentation_run(teacher: TeacherThread) -> None:
    text = (Path(__file__).parents[2] / "docs" / "teacher-service.md").read_text()
    cells = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell.replace("127.0.0.1:7412", teacher.target), names)
    assert len(cells) == 2
    assert names["scored"].chosen_logprobs.shape == (30, 8)
    names["client"].close()
