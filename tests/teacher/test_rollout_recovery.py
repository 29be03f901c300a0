"""What a rollout process that was killed had written: scored once, published once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from models.service_process import ServiceProcess, unused_target
from models.teacher_thread import TeacherThread, wait_until

from lynearm.client import TeacherClient, TraceClient
from lynearm.rollouts.config import RolloutConfig
from lynearm.rollouts.messages import Failed, Loaded, Message, Status, Stop, Taken, Weights
from lynearm.rollouts.scoring import score_request, score_settings
from lynearm.rollouts.spool import Spool, SpoolPosition
from lynearm.rollouts.waves import Wave, rollout_tags
from lynearm.rollouts.worker import RolloutWorker
from lynearm.teacher.engine import TeacherEngine
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.errors import LynearmError, MisalignmentError
from lynearm.wire.specs import CodecSpec, StreamSpec
from lynearm.wire.traces import TopK, Trace

# torch and vLLM warn about each other's old names while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

VOCAB = 384
PATIENCE_SECONDS = 240.0


class SilentStudent:
    """Stands in for a student that has nothing to write in these tests: the trainer has enough waiting."""

    vocab_size = VOCAB
    error = 0.0
    base = SimpleNamespace(max_model_len=128)

    def generate(self, *_: Any) -> Iterator[Any]:
        raise AssertionError("nothing is to be written")

    def close(self) -> None:
        pass


def make_wave(first: int, count: int, step: int) -> Wave:
    rng = np.random.default_rng(first)
    rollouts = []
    for number in range(first, first + count):
        ids = np.stack([rng.permutation(np.arange(5, 300))[:4] for _ in range(6)]).astype(np.int32)
        rows = np.sort(np.log(rng.dirichlet(np.ones(5), 6)[:, :4]).astype(np.float32), 1)[:, ::-1].copy()
        rollouts.append(
            Trace(
                prompt_id=f"p{number % 3}",
                prompt_token_ids=rng.integers(5, 300, 4).astype(np.int32),
                completion_token_ids=rng.integers(5, 300, 6).astype(np.int32),
                sampled_logprobs=np.full(6, -2.0, np.float32),
                top_k=TopK(ids, rows, (1 - np.exp(rows).sum(1)).clip(0, 1).astype(np.float32)),
                finish_reason="length",
                sample_index=number,
                tags=rollout_tags({}, step, -2.0),
            )
        )
    return Wave(tuple(rollouts))


class Run:
    """A worker on a thread, as its process would run it."""

    def __init__(self, config: RolloutConfig) -> None:
        self.messages: list[Message] = []
        self.error: LynearmError | None = None
        self.worker = RolloutWorker(config, self.messages.append, lambda *_: SilentStudent())  # type: ignore[arg-type,return-value]  # the stand-in
        self.worker.receive(Weights("nowhere", config.step))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def status(self) -> Status:
        return next((one for one in reversed(self.messages) if isinstance(one, Status)), Status())

    def stop(self) -> None:
        self.worker.receive(Stop())
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.worker.run()
        except LynearmError as error:
            self.error = error


@pytest.fixture
def teacher(shared_engine: TeacherEngine) -> Iterator[TeacherThread]:
    with TeacherThread(shared_engine, max_model_len=128) as thread:
        yield thread


def make_stream(target: str, teacher: str, **changes: Any) -> None:
    with TeacherClient(teacher) as client:
        info = client.describe()
    spec = StreamSpec(
        "rollouts", replace(info.spec, **changes), info.tokenizer, CodecSpec("exact", 4), "Apache-2.0"
    )
    with TraceClient(target) as client:
        client.create_stream(spec)


def publish(target: str, traces: Sequence[Trace]) -> None:
    with TraceClient(target) as client, client.publisher("rollouts", "student") as publisher:
        publisher.publish(encode_block(traces, codec="exact", vocab_size=VOCAB))


def read_stream(target: str) -> list[Trace]:
    with TraceClient(target) as client, client.subscribe("rollouts", follow=False) as blocks:
        return [trace for one in blocks for trace in decode_block(one.block)]


@pytest.fixture
def config(service: ServiceProcess, teacher: TeacherThread, tmp_path: Path) -> RolloutConfig:
    return RolloutConfig(
        service=service.target,
        teacher=teacher.target,
        stream="rollouts",
        directory=tmp_path,
        prompt_stream="lessons",
        step=10,
        max_staleness=4,
        top_k=4,
        support="student",
        ahead=4,
        wave=4,
    )


def test_what_was_left_unfinished_is_scored_once_and_published_once(
    service: ServiceProcess, teacher: TeacherThread, config: RolloutConfig
) -> None:
    make_stream(service.target, teacher.target)
    spool = Spool(config.directory / "spool")
    too_old, in_stream, scored, written = (
        make_wave(first, 4, step) for first, step in ((0, 2), (4, 8), (8, 9), (12, 9))
    )
    publish(service.target, in_stream.rollouts)
    for wave in (too_old, in_stream, scored, written):
        name = spool.keep_rollouts(wave, offset=0, vocab_size=VOCAB)
        if wave in (in_stream, scored):
            halves = (wave.rollouts[:2], wave.rollouts[2:])
            spool.keep_scored(name, [encode_block(one, codec="exact", vocab_size=VOCAB) for one in halves])
    spool.move_to(SpoolPosition(16, 1))

    run = Run(config)
    wait_until(lambda: len(read_stream(service.target)) >= 12, PATIENCE_SECONDS)
    run.stop()
    assert run.error is None
    traces = read_stream(service.target)
    assert [trace.sample_index for trace in traces] == list(range(4, 16))
    assert teacher.begun == 4
    assert not list(Spool(config.directory / "spool").unfinished())
    # What was scored before is as it was; the rest has the teacher's opinion at the student's tokens.
    assert np.array_equal(traces[4].top_k.logprobs, scored.rollouts[0].top_k.logprobs)
    for trace, rollout in zip(traces[8:], written.rollouts, strict=True):
        assert [set(row) for row in trace.top_k.token_ids] == [set(row) for row in rollout.top_k.token_ids]
        assert not np.allclose(trace.sampled_logprobs, rollout.sampled_logprobs)


def test_a_teacher_that_answered_before_a_kill_is_not_paid_twice(
    service: ServiceProcess, teacher: TeacherThread, config: RolloutConfig
) -> None:
    make_stream(service.target, teacher.target)
    wave = make_wave(0, 4, 9)
    Spool(config.directory / "spool").keep_rollouts(wave, offset=0, vocab_size=VOCAB)
    # As by a process that was killed when the scores had come, and before anything was kept of them.
    with TraceClient(service.target) as client, TeacherClient(teacher.target) as served:
        created = client.get_stream("rollouts").created_unix_nano
        requests = [score_request(rollout, config.support) for rollout in wave.rollouts]
        list(served.score(requests, score_settings(config, f"rollouts-{created}")))
    assert teacher.begun == 4
    run = Run(config)
    wait_until(lambda: len(read_stream(service.target)) == 4, PATIENCE_SECONDS)
    run.worker.receive(Taken(10, 4))
    run.stop()
    assert run.error is None
    assert teacher.begun == 4


def test_a_teacher_that_is_away_is_waited_for(
    service: ServiceProcess, shared_engine: TeacherEngine, teacher: TeacherThread, config: RolloutConfig
) -> None:
    make_stream(service.target, teacher.target)
    teacher.stop()
    target = unused_target()
    spool = Spool(config.directory / "spool")
    spool.keep_rollouts(make_wave(0, 4, 9), offset=0, vocab_size=VOCAB)
    spool.keep_rollouts(make_wave(4, 4, 9), offset=0, vocab_size=VOCAB)
    spool.keep_rollouts(make_wave(8, 4, 9), offset=0, vocab_size=VOCAB)
    run = Run(replace(config, teacher=target))
    wait_until(lambda: f"waiting for the teacher at {target}" in run.status.activity, PATIENCE_SECONDS)
    with TeacherThread(shared_engine, max_model_len=128, bind=target):
        wait_until(lambda: len(read_stream(service.target)) == 12, PATIENCE_SECONDS)
        run.stop()
    assert run.error is None


def test_another_teacher_than_the_streams_is_refused(
    service: ServiceProcess, teacher: TeacherThread, config: RolloutConfig
) -> None:
    make_stream(service.target, teacher.target, revision="sha256:another")
    Spool(config.directory / "spool").keep_rollouts(make_wave(0, 4, 9), offset=0, vocab_size=VOCAB)
    run = Run(config)
    wait_until(lambda: run.error is not None, PATIENCE_SECONDS)
    run.stop()
    assert isinstance(run.error, MisalignmentError)
    assert not read_stream(service.target)
    assert any(isinstance(message, Loaded) for message in run.messages)
    assert not any(isinstance(message, Failed) for message in run.messages)
