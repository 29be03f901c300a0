"""A real rollout process: a student in vLLM, a served teacher, a real trace service."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models.service_process import ServiceProcess
from models.teacher_thread import TeacherThread, wait_until
from models.tiny_llama import build_tiny_llama

from lynearm.client import TeacherClient, TraceClient
from lynearm.rollouts import RolloutConfig, RolloutProcess
from lynearm.rollouts.handover import HandedWeights, keep_only, write_handover
from lynearm.rollouts.messages import Taken, Weights
from lynearm.rollouts.probe import Probe, probe_token_ids
from lynearm.rollouts.waves import student_step
from lynearm.teacher.engine import TeacherEngine
from lynearm.wire.codec import decode_block
from lynearm.wire.specs import CodecSpec, StreamSpec
from lynearm.wire.traces import Trace

# torch and vLLM warn about each other's old names while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PATIENCE_SECONDS = 240.0


def load(directory: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logprobs_of(model: torch.nn.Module, trace: Trace) -> torch.Tensor:
    """A model's logprobs at the positions of a completion, [T, V]."""
    ids = np.concatenate((trace.prompt_token_ids, trace.completion_token_ids))[None]
    with torch.no_grad():
        logits = model(torch.as_tensor(ids.astype(np.int64))).logits[0].double()
    return torch.log_softmax(logits, -1)[len(trace.prompt_token_ids) - 1 : -1]


def hand_over(model_dir: Path, directory: Path, step: int) -> Weights:
    """A student's weights as a trainer hands them over."""
    model = load(model_dir)
    token_ids = probe_token_ids(384)
    with torch.no_grad():
        logits = model(torch.as_tensor(token_ids.astype(np.int64))).logits[:, -1]
    probe = Probe(token_ids, torch.log_softmax(logits, -1).numpy())

    def save(target: Path) -> None:
        shutil.copytree(model_dir, target, dirs_exist_ok=True)

    return Weights(str(write_handover(directory, HandedWeights(step, save, probe))), step)


def read_stream(target: str, stream: str) -> list[Trace]:
    with TraceClient(target) as client, client.subscribe(stream, follow=False) as blocks:
        return [trace for one in blocks for trace in decode_block(one.block)]


@pytest.fixture
def students(tiny_model: Path, tmp_path: Path) -> list[Path]:
    """The same student at two steps of its training."""
    made = [build_tiny_llama(tmp_path / f"student-{seed}", seed=seed) for seed in (11, 12)]
    for directory in made:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (directory / name).write_bytes((tiny_model / name).read_bytes())
    return made


@pytest.fixture
def teacher(shared_engine: TeacherEngine) -> Iterator[TeacherThread]:
    with TeacherThread(shared_engine, max_model_len=128) as thread:
        yield thread


def make_stream(service: ServiceProcess, teacher: TeacherThread, name: str) -> None:
    with TeacherClient(teacher.target) as client:
        info = client.describe()
    spec = StreamSpec(name, info.spec, info.tokenizer, CodecSpec("exact", 16), "Apache-2.0")
    with TraceClient(service.target) as client:
        client.create_stream(spec)


def make_prompts(path: Path, count: int) -> Path:
    rows: list[dict[str, object]] = [
        {"id": f"p{number}", "prompt": f"What is {number} plus four?"} for number in range(count)
    ]
    rows[1] |= {"tags": {"split": "held_out"}}
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_a_student_is_refreshed_scored_published_and_outlives_a_kill(
    service: ServiceProcess, teacher: TeacherThread, students: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    make_stream(service, teacher, "rollouts")
    config = RolloutConfig(
        service=service.target,
        teacher=teacher.target,
        stream="rollouts",
        directory=tmp_path / "run",
        prompts=str(make_prompts(tmp_path / "prompts.jsonl", 9)),
        max_tokens=12,
        max_model_len=128,
        top_k=8,
        support="student",
        max_staleness=4,
        per_step=2.0,
        ahead=8,
        wave=4,
        threads=1,
        kv_cache_mib=64,
    )
    weights_dir = tmp_path / "weights"
    process = RolloutProcess(tmp_path / "run")
    log = tmp_path / "run" / "rollouts.log"

    def published(count: int) -> Callable[[], bool]:
        return lambda: process.status.rollouts >= count or not process.is_running

    try:
        process.keep_running(lambda: config, hand_over(students[0], weights_dir, 0))
        wait_until(published(8), PATIENCE_SECONDS)
        assert process.is_running, log.read_text()[-3000:]
        # Eight wait: no more are written until some are used.
        time.sleep(1.0)
        assert process.status.rollouts == 8
        assert "use what there is" in process.status.activity

        # Newer weights, and room again.
        process.tell(hand_over(students[1], weights_dir, 3))
        wait_until(lambda: process.loaded_step == 3, PATIENCE_SECONDS)
        keep_only(weights_dir, 3)
        process.tell(Taken(step=3, traces=6))
        wait_until(published(12), PATIENCE_SECONDS)
        assert process.is_running, log.read_text()[-3000:]

        # Killed at once: another one goes on, with the same prompts and other numbers.
        process.tell(Taken(step=3, traces=10))
        assert process.process_id is not None
        os.kill(process.process_id, signal.SIGKILL)
        wait_until(lambda: not process.is_running, 60)
        again = replace(config, step=3)
        latest = Weights(str(weights_dir / "step-00000003"), 3)
        wait_until(lambda: process.keep_running(lambda: again, latest), 60)
        process.tell(Taken(step=3, traces=8))
        wait_until(published(16), PATIENCE_SECONDS)
        assert process.is_running, log.read_text()[-3000:]
    finally:
        process.stop()
    traces = read_stream(service.target, "rollouts")
    numbers = [trace.sample_index for trace in traces]
    assert numbers == sorted(set(numbers))
    asked = ["p0", *(f"p{number}" for number in range(2, 9))]
    assert [trace.prompt_id for trace in traces[:12]] == [*asked, *asked[:4]]
    steps = [student_step(trace) for trace in traces]
    assert steps == sorted(steps)
    assert set(steps) == {0, 3}
    models = {0: load(students[0]), 3: load(students[1])}
    judge = load(tiny_model)
    for trace, step in zip(traces, steps, strict=True):
        wrote, judged = logprobs_of(models[step], trace), logprobs_of(judge, trace)
        sampled = torch.as_tensor(trace.completion_token_ids.astype(np.int64))[:, None]
        assert float(trace.tags["student_logprob"]) == pytest.approx(
            float(wrote.gather(1, sampled).mean()), abs=1e-3
        )
        np.testing.assert_allclose(trace.sampled_logprobs, judged.gather(1, sampled)[:, 0], atol=1e-3)
        # Rows hold the student's likeliest tokens, with the teacher's probabilities.
        assert [set(row) for row in trace.top_k.token_ids.tolist()] == [
            set(row) for row in wrote.topk(8).indices.tolist()
        ]
        ids = torch.as_tensor(trace.top_k.token_ids.astype(np.int64))
        np.testing.assert_allclose(trace.top_k.logprobs, judged.gather(1, ids), atol=1e-3)
        np.testing.assert_allclose(trace.top_k.tail_mass, 1 - judged.gather(1, ids).exp().sum(1), atol=1e-4)
        assert trace.tags["source"] == "student"
    assert process.status.scored_tokens == sum(len(trace.completion_token_ids) for trace in traces)
    assert process.status.divergence is not None
