"""Whole on-policy runs: a real trainer, its student in a vLLM process, a served teacher, a trace service."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.service_process import ServiceProcess, unused_target
from models.teacher_thread import TeacherThread
from models.tiny_llama import build_tiny_llama
from safetensors.torch import load_file
from student.run_material import short_run

from lynearm.client import TeacherClient, TraceClient
from lynearm.student.config import TrainConfig
from lynearm.student.on_policy_plan import open_rollout_stream
from lynearm.student.progress import TrainProgress
from lynearm.student.trainer import run_train
from lynearm.teacher.engine import TeacherEngine
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.errors import (
    ConfigError,
    ServiceUnavailableError,
    StreamExistsError,
    StreamNotFoundError,
)
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.scoring import ScoreSettings, StudentCompletion
from lynearm.wire.specs import CodecSpec, StreamSpec
from lynearm.wire.traces import Trace

# torch and vLLM warn about each other's old names while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def teacher(shared_engine: TeacherEngine) -> Iterator[TeacherThread]:
    with TeacherThread(shared_engine, max_model_len=128) as thread:
        yield thread


@pytest.fixture
def student_dir(tiny_model: Path, tmp_path: Path) -> Path:
    directory = build_tiny_llama(tmp_path / "student", seed=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_bytes((tiny_model / name).read_bytes())
    return directory


@pytest.fixture
def stream(service: ServiceProcess, teacher: TeacherThread) -> str:
    """A sealed stream: the teacher's opinion of 60 random completions."""
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> StudentCompletion:
        prompt = torch.randint(5, 300, (4,), generator=generator).int().numpy()
        completion = torch.randint(5, 300, (10,), generator=generator).int().numpy()
        return StudentCompletion(f"p{number}", prompt, completion)

    with TeacherClient(teacher.target) as client, TraceClient(service.target) as traces:
        info = client.describe()
        scored = [
            one.trace for one in client.score(map(draw, range(60)), ScoreSettings(top_k=8, codec="exact"))
        ]
        scored.sort(key=lambda trace: int(trace.prompt_id[1:]))
        traces.create_stream(
            StreamSpec("lessons", info.spec, info.tokenizer, CodecSpec("exact", 8), "Apache-2.0")
        )
        with traces.publisher("lessons", "teacher") as publisher:
            for start in range(0, 60, 10):
                publisher.publish(
                    encode_block(scored[start : start + 10], codec="exact", vocab_size=info.spec.vocab_size)
                )
        traces.seal_stream("lessons")
    return "lessons"


def read_stream(target: str, stream: str) -> list[Trace]:
    with TraceClient(target) as client, client.subscribe(stream, follow=False) as blocks:
        return [trace for one in blocks for trace in decode_block(one.block)]


@pytest.mark.slow
def test_a_student_learns_from_its_own_text_through_kill_and_resume(
    service: ServiceProcess, teacher: TeacherThread, stream: str, student_dir: Path, tmp_path: Path
) -> None:
    config = short_run(
        service,
        student_dir,
        (stream,),
        tmp_path / "run",
        teacher=teacher.target,
        on_policy=True,
        on_policy_share="0.5",
        max_staleness=4,
        refresh_every_steps=2,
        rollout_loss=("reverse-kl", "tail-cross-entropy:0.5"),
        rollout_tokens=12,
        rollout_top_k=8,
        rollout_tail_draws=1,
        rollout_threads=1,
        rollout_kv_cache_mib=64,
        max_sequence_tokens=64,
        held_out_traces=4,
        checkpoint_every_steps=2,
        keep_checkpoints=20,
        max_steps=10,
    )
    events: list[TrainProgress] = []
    killed: list[int] = []

    def watch(event: TrainProgress) -> None:
        events.append(event)
        # The process that writes dies once in the midst of it.
        if event.record is not None and event.record.step == 3 and not killed:
            (child,) = children()
            killed.append(child)
            os.kill(child, signal.SIGKILL)

    report = run_train(config, watch)
    assert (report.stop_reason, report.steps) == ("max_steps", 10)
    assert killed
    final = events[-1].rollouts
    assert final is not None
    assert final.restarts == 1
    assert not children()
    rollouts = read_stream(service.target, "lessons.run.rollouts")
    numbers = [trace.sample_index for trace in rollouts]
    assert numbers == sorted(set(numbers))
    assert {trace.prompt_id for trace in rollouts} <= {f"p{number}" for number in range(60)}
    drawn = [trace.top_k.tail_draws for trace in rollouts]
    assert all(one is not None and one.shape[1] == 1 and bool((one >= 0).all()) for one in drawn)
    steps = {int(trace.tags["student_step"]) for trace in rollouts}
    assert len(steps) >= 3
    assert final.scored_tokens <= sum(len(trace.completion_token_ids) for trace in rollouts)
    mixed = [record for record in report.curve if record.staleness is not None]
    assert mixed
    assert all(0 <= record.staleness <= 4 for record in mixed if record.staleness is not None)
    lineage = json.loads((report.checkpoint / "lynearm.json").read_text())
    assert lineage["runs"][-1]["on_policy"]["share_of_tokens"] == pytest.approx(0.5, abs=0.15)
    assert [use["stream"] for use in lineage["streams"]] == ["lessons", "lessons.run.rollouts"]

    # What is in the streams decides what is learnt: the same steps once more, from an earlier checkpoint.
    before = load_file(report.checkpoint / "model.safetensors")
    for directory in (tmp_path / "run").glob("step-*"):
        if directory.name > "step-00000004":
            for path in sorted(directory.iterdir()):
                path.unlink()
            directory.rmdir()
    (tmp_path / "run" / "LATEST").write_text("step-00000004\n")
    resumed = run_train(replace(config, resume=True))
    assert resumed.curve == report.curve
    after = load_file(resumed.checkpoint / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def children() -> list[int]:
    """Rollout processes of this one."""
    found: list[int] = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
                command = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if parent == os.getpid() and b"lynearm.rollouts" in command:
                found.append(int(path.name))
    return found


def test_a_stream_of_rollouts_belongs_to_one_run(
    service: ServiceProcess, teacher: TeacherThread, student_dir: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        student=student_dir,
        streams=("lessons",),
        teacher=teacher.target,
        out=tmp_path / "run",
        on_policy=True,
        rollout_top_k=8,
    )
    with TraceClient(service.target) as client, TeacherClient(teacher.target) as served:
        others = [StreamInfo(spec_of(served), False, 1, 0)]
        with pytest.raises(StreamNotFoundError):
            open_rollout_stream(client, replace(config, resume=True), others)
        made = open_rollout_stream(client, config, others)
        # A run that was killed before its first checkpoint, and is begun again.
        assert open_rollout_stream(client, replace(config, threads=2), others) == made
        assert open_rollout_stream(client, replace(config, resume=True, seed=3), others) == made
        with pytest.raises(StreamExistsError, match="labels is"):
            open_rollout_stream(client, replace(config, learning_rate=1e-5), others)
        elsewhere = replace(config, rollout_stream="another", rollout_top_k=64)
        with pytest.raises(ConfigError, match=r"rollout_top_k is 64, and the teacher .* scores 16"):
            open_rollout_stream(client, elsewhere, others)
        with pytest.raises(ServiceUnavailableError):
            open_rollout_stream(client, replace(elsewhere, teacher=unused_target()), others)


def spec_of(served: TeacherClient) -> StreamSpec:
    """A stream of the same teacher."""
    info = served.describe()
    return StreamSpec("lessons", info.spec, info.tokenizer, CodecSpec("exact", 8), "Apache-2.0")
