"""Frozen parameters: bit-identical afterwards, and without optimizer state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.service_process import ServiceProcess
from models.tiny_llama import build_tiny_llama
from student.run_material import Configure, configure_runs, weights
from student.teaching_material import offer

from lynearm.student.checkpoint import load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.freezing import freeze, parse_patterns
from lynearm.student.model import StudentModel, load_student
from lynearm.student.trainer import run_train
from lynearm.wire.errors import ConfigError
from lynearm.wire.traces import Trace

NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")


@pytest.fixture(scope="module")
def configure(
    service: ServiceProcess,
    teacher: StudentModel,
    student_dir: Path,
    traces: list[Trace],
    tmp_path_factory: pytest.TempPathFactory,
) -> Configure:
    offer(service.target, teacher, traces, name="freezing")
    return configure_runs(service, student_dir, "freezing", tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (("embeddings",), ("embed_tokens", "lm_head")),  # tied
        (("layers.0",), ("layers.0.",)),
        (("layers.0-1", "norms"), ("layers.", "norm")),
        (("norms,embeddings",), (*NORMS, "embed_tokens", "lm_head")),
        (("*.mlp.*", "head"), (".mlp.", "embed_tokens", "lm_head")),
    ],
)
def test_what_is_frozen_stays_and_the_rest_learns(
    configure: Configure, student_dir: Path, patterns: tuple[str, ...], frozen: tuple[str, ...]
) -> None:
    report = run_train(configure("-".join(patterns).replace("*", "x"), freeze=patterns, max_steps=2))
    before, after = weights(student_dir), weights(report.checkpoint)
    for name, value in after.items():
        stays = any(part in name for part in frozen)
        assert torch.equal(before[name], value) is stays, name
    moments = load_checkpoint(report.checkpoint).optimizer
    assert moments
    assert not [name for name in moments if any(part in name for part in frozen)]


def test_a_run_goes_on_only_with_what_was_frozen(configure: Configure) -> None:
    whole = run_train(configure("whole", freeze=("layers.0",), max_steps=6))
    run_train(configure("parts", freeze=("layers.0",), max_steps=3))
    with pytest.raises(ConfigError, match=r"freeze was \['layers.0'\] and is \('layers.1',\)"):
        run_train(configure("parts", freeze=("layers.1",), max_steps=6, resume=True))
    resumed = run_train(configure("parts", freeze=("layers.0",), max_steps=6, resume=True))
    ours, theirs = weights(resumed.checkpoint), weights(whole.checkpoint)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_head_alone_can_be_trained(tmp_path: Path) -> None:
    student = load_student(build_tiny_llama(tmp_path / "student"), device="cpu")
    freeze(student, ["norms", "layers.0-1"])
    assert list(student.trainable_parameters()) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("layers.2", "layers 0 to 1"),
        ("layers.0-7", "layers 0 to 1"),
        ("*.bias", "no such parameters"),
        ("*", "nothing to train"),
        ("layers.0-1,embeddings,norms", "nothing to train"),
    ],
)
def test_what_the_student_has_not_is_refused(student_dir: Path, pattern: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        freeze(load_student(student_dir, device="cpu"), [pattern])


@pytest.mark.parametrize("pattern", ["", "embedding", "layers", "layers.3-1", "layers.-1", "norms,"])
def test_a_slip_of_the_pen_is_said_before_anything_is_loaded(pattern: str) -> None:
    with pytest.raises(ConfigError, match="is nothing that a student has"):
        TrainConfig(freeze=(pattern,))


def test_patterns_may_share_a_text() -> None:
    assert parse_patterns(["norms, layers.0-3", "head"]) == ("norms", "layers.0-3", "head")
