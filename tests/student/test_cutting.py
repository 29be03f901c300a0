"""A student cut out of its teacher: the right layers, and the right ones to leave out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models.tiny_llama import build_tiny_llama

from lynearm.student.cutting import CalibrationSequence, CutProgress, cut_student
from lynearm.student.model import load_student
from lynearm.wire.errors import CheckpointError, ConfigError

INPUT_IDS = torch.tensor([[7, 30, 31, 200, 5, 77]])


@pytest.fixture(scope="module")
def deep_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, of which the second and the fourth add next to nothing."""
    directory = build_tiny_llama(tmp_path_factory.mktemp("deep") / "teacher", seed=3, num_layers=5)
    model = load_student(directory, device="cpu").model
    with torch.no_grad():
        for layer, scale in ((1, 1e-4), (3, 1e-2)):
            model.model.layers[layer].self_attn.o_proj.weight *= scale
            model.model.layers[layer].mlp.down_proj.weight *= scale
    model.save_pretrained(directory)
    return directory


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_student(directory, device="cpu").model(INPUT_IDS, use_cache=True).logits
    return found


def test_named_layers_are_kept_in_their_order(tmp_path: Path, deep_dir: Path) -> None:
    report = cut_student(deep_dir, tmp_path / "student", layers=[0, 2, 4])
    assert (report.layers, report.dropped, report.kl) == ((0, 2, 4), (1, 3), None)
    teacher = load_student(deep_dir, device="cpu").model
    for layer in (1, 3):
        teacher.model.layers[layer].register_forward_hook(lambda _module, inputs, _output: inputs[0])
    with torch.no_grad():
        expected = teacher(INPUT_IDS, use_cache=False).logits
    torch.testing.assert_close(logits(tmp_path / "student"), expected)


def test_measurement_leaves_out_the_layers_that_do_least(tmp_path: Path, deep_dir: Path) -> None:
    events: list[CutProgress] = []
    report = cut_student(deep_dir, tmp_path / "student", num_layers=3, on_progress=events.append)
    assert report.dropped == (1, 3)
    assert report.kl is not None
    assert 0 < report.kl < 0.1
    assert events[-1].dropped == (1, 3)


def test_measurement_uses_the_sequences_that_it_is_given(tmp_path: Path, deep_dir: Path) -> None:
    sequences = [CalibrationSequence((7, 8, 9, 10, 11), 2), CalibrationSequence((20, 21, 22), 1)]
    report = cut_student(deep_dir, tmp_path / "student", num_layers=4, sequences=sequences)
    left, whole = torch.log_softmax(logits(tmp_path / "student"), -1), torch.log_softmax(logits(deep_dir), -1)
    assert report.layers == (0, 2, 3, 4)
    assert float((whole.exp() * (whole - left)).sum(-1).mean()) < 1e-3


def test_a_student_has_its_teachers_tokenizer_and_says_where_it_is_from(
    tmp_path: Path, deep_dir: Path
) -> None:
    cut_student(deep_dir, tmp_path / "student", layers=[0, 4])
    teacher, student = load_student(deep_dir, device="cpu"), load_student(tmp_path / "student", device="cpu")
    assert student.tokenizer.vocab_sha256 == teacher.tokenizer.vocab_sha256
    assert student.tokenizer.chat_template_sha256 == teacher.tokenizer.chat_template_sha256
    assert student.tokenizer.eos_token_ids == teacher.tokenizer.eos_token_ids
    lineage = json.loads((tmp_path / "student" / "lynearm.json").read_text())
    assert lineage["cut_from"]["layers"] == [0, 4]
    assert lineage["cut_from"]["revision"].startswith("sha256:")
    assert str(tmp_path) not in json.dumps(lineage)


@pytest.mark.parametrize(
    ("layers", "num_layers"), [([0, 5], None), ([0, 0], None), ([], None), (None, 6), (None, 0), (None, None)]
)
def test_impossible_cuts_are_refused(
    tmp_path: Path, deep_dir: Path, layers: list[int] | None, num_layers: int | None
) -> None:
    with pytest.raises(ConfigError):
        cut_student(deep_dir, tmp_path / "student", layers=layers, num_layers=num_layers)
    assert not (tmp_path / "student").exists()


def test_a_directory_in_use_is_left_alone(tmp_path: Path, deep_dir: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="in use"):
        cut_student(deep_dir, tmp_path, layers=[0])
    assert (tmp_path / "notes.txt").read_text() == "mine"
