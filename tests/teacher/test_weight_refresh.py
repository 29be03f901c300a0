"""Weights that change in a loaded engine, against transformers; and what notices that they did not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from models.tiny_llama import build_tiny_llama

from lynearm.rollouts.config import RolloutConfig
from lynearm.rollouts.engine import StudentEngine
from lynearm.rollouts.handover import HandedWeights, write_handover
from lynearm.rollouts.probe import Probe, probe_token_ids, tolerance_after
from lynearm.teacher import weight_refresh
from lynearm.teacher.engine import TeacherEngine
from lynearm.wire.errors import CheckpointError, PreconditionError, TeacherError
from lynearm.wire.traces import SamplingParams

# torch and vLLM warn about each other's old names while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def logprobs(model_dir: Path) -> Probe:
    """What transformers makes of the probe."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    token_ids = probe_token_ids(384)
    with torch.no_grad():
        logits = model(torch.as_tensor(token_ids.astype(np.int64))).logits[:, -1]
    return Probe(token_ids, torch.log_softmax(logits, -1).numpy())


def hand_over(model_dir: Path, directory: Path, step: int, probe: Probe) -> Path:
    def save(target: Path) -> None:
        shutil.copytree(model_dir, target, dirs_exist_ok=True)

    return write_handover(directory, HandedWeights(step, save, probe))


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    return build_tiny_llama(tmp_path / "other", seed=7)


@pytest.fixture
def student(engine: TeacherEngine, tiny_model: Path, tmp_path: Path) -> Iterator[StudentEngine]:
    """The tests' one engine as a student; it gets its own weights back."""
    config = RolloutConfig("service", "teacher", "stream", tmp_path, prompts="none")
    first = hand_over(tiny_model, tmp_path / "weights", 0, logprobs(tiny_model))
    yield StudentEngine(config, first, lambda _config: engine)
    engine.refresh(tiny_model)


def test_refreshed_weights_compute_what_transformers_computes(
    student: StudentEngine, engine: TeacherEngine, other_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert student.error < 1e-3
    probes = {1: logprobs(other_model), 2: logprobs(tiny_model)}
    for step, model in ((1, other_model), (2, tiny_model)):
        student.refresh(hand_over(model, tmp_path / "weights", step, probes[step]))
        assert student.error < 1e-3
    assert engine.unfinished == 0


def test_a_head_that_stays_behind_is_noticed(
    student: StudentEngine, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM's own reload, which leaves a tied head at the weights that it was packed from.
    monkeypatch.setattr(weight_refresh, "retie_heads", lambda _model: None)
    newer = hand_over(other_model, tmp_path / "weights", 1, logprobs(other_model))
    with pytest.raises(TeacherError, match="does not compute what the trainer does"):
        student.refresh(newer)


def test_weights_of_another_step_are_noticed(
    student: StudentEngine, other_model: Path, tmp_path: Path
) -> None:
    probe = logprobs(other_model)
    wrong = Probe(probe.token_ids, probe.logprobs + np.float32(0.01))
    with pytest.raises(TeacherError, match=r"logprobs differ by 0\.01"):
        student.refresh(hand_over(other_model, tmp_path / "weights", 1, wrong))


def test_weights_do_not_change_under_a_request(
    student: StudentEngine, engine: TeacherEngine, other_model: Path, tmp_path: Path
) -> None:
    newer = hand_over(other_model, tmp_path / "weights", 1, logprobs(other_model))
    engine.add("under-way", [5, 6, 7], SamplingParams(max_tokens=4))
    try:
        with pytest.raises(PreconditionError, match="unfinished requests"):
            student.refresh(newer)
    finally:
        engine.abort(["under-way"])
    student.refresh(newer)


def test_weights_that_are_damaged_or_not_there_are_refused(
    student: StudentEngine, other_model: Path, tmp_path: Path
) -> None:
    broken = hand_over(other_model, tmp_path / "weights", 1, logprobs(other_model))
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(TeacherError, match="cannot take the weights"):
        student.refresh(broken)
    (broken / "probe.npz").unlink()
    shutil.copy(other_model / "model.safetensors", broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"probe\.npz"):
        student.refresh(broken)


def test_the_tolerance_follows_what_the_engine_rounds() -> None:
    assert tolerance_after(4e-5) == 1e-3
    assert tolerance_after(0.05) == pytest.approx(0.2)
