"""A student cut out of its teacher: the right layers, and the right ones to leave out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models.tiny_llama import build_tiny_llama
from student.cutting_material import INPUT_IDS, logits, profile_of

from lynearm.student.cutting.config import CutConfig
from lynearm.student.cutting.cut import Evidence, cut_student
from lynearm.student.cutting.layers import drop_evenly, drop_least_influential
from lynearm.student.cutting.measuring import measure_profile
from lynearm.student.cutting.profile_files import read_profile_file
from lynearm.student.cutting.progress import CutProgress
from lynearm.student.cutting.sequences import CalibrationSequence, default_sequences, sequences_from_traces
from lynearm.student.model import load_student
from lynearm.wire.errors import CheckpointError, ConfigError, InvalidInputError, MisalignmentError
from lynearm.wire.traces import Trace


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


def test_named_layers_are_kept_in_their_order(tmp_path: Path, deep_dir: Path) -> None:
    report = cut_student(deep_dir, tmp_path / "student", CutConfig(keep=(0, 2, 4)))
    assert (report.layers, report.dropped) == ((0, 2, 4), (1, 3))
    teacher = load_student(deep_dir, device="cpu").model
    for layer in (1, 3):
        teacher.model.layers[layer].register_forward_hook(lambda _module, inputs, _output: inputs[0])
    with torch.no_grad():
        expected = teacher(INPUT_IDS, use_cache=False).logits
    torch.testing.assert_close(logits(tmp_path / "student"), expected)


def test_a_cut_that_keeps_every_layer_is_the_teacher_bit_for_bit(tmp_path: Path, deep_dir: Path) -> None:
    report = cut_student(deep_dir, tmp_path / "student", CutConfig(layers=5))
    teacher, student = (load_student(each, device="cpu") for each in (deep_dir, tmp_path / "student"))
    for (name, ours), (_, theirs) in zip(
        student.model.state_dict().items(), teacher.model.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert report.kl == 0
    assert report.parameters == report.teacher_parameters


def test_measurement_leaves_out_the_layers_that_do_least(tmp_path: Path, deep_dir: Path) -> None:
    events: list[CutProgress] = []
    report = cut_student(deep_dir, tmp_path / "student", CutConfig(layers=3), on_progress=events.append)
    assert report.dropped == (1, 3)
    assert 0 < report.kl < 0.1
    assert events[-1].dropped == (1, 3)


def test_measurement_uses_the_sequences_that_it_is_given(tmp_path: Path, deep_dir: Path) -> None:
    sequences = [CalibrationSequence((7, 8, 9, 10, 11), 2), CalibrationSequence((20, 21, 22), 1)]
    report = cut_student(
        deep_dir, tmp_path / "student", CutConfig(layers=4), evidence=Evidence(sequences=sequences)
    )
    left, whole = torch.log_softmax(logits(tmp_path / "student"), -1), torch.log_softmax(logits(deep_dir), -1)
    assert report.layers == (0, 2, 3, 4)
    assert report.measured_on == "calibration text, 5 positions"
    assert float((whole.exp() * (whole - left)).sum(-1).mean()) < 1e-3


def test_a_profile_decides_by_influence(tmp_path: Path, deep_dir: Path) -> None:
    profile = profile_of(deep_dir, influence=[0.5, 0.1, 0.02, 0.3, 0.04])
    report = cut_student(
        deep_dir,
        tmp_path / "student",
        CutConfig(layers=3, choose="influence"),
        evidence=Evidence(profile=profile),
    )
    assert report.dropped == (2, 4)
    assert [row.influence for row in report.rows] == pytest.approx([0.5, 0.1, 0.02, 0.3, 0.04])
    assert [row.layer for row in report.rows if row.kept] == [0, 1, 3]
    account = json.loads((tmp_path / "student" / "lynearm.json").read_text())["cut_from"]
    assert account["chosen"] == "influence"
    assert account["profile"] == {"model": "teacher", "revision": "sha256:00", "positions": 10}


def test_measured_influence_is_that_of_the_layers_states(deep_dir: Path) -> None:
    model = load_student(deep_dir, device="cpu").model.eval()
    sequence = CalibrationSequence((7, 30, 31, 200, 5, 77), 3)
    profile = measure_profile(model, [sequence, sequence], name="teacher", revision="")
    with torch.no_grad():
        states = model(INPUT_IDS, output_hidden_states=True).hidden_states
    for layer in range(4):
        before, after = (states[layer + offset][0, 2:5].double() for offset in (0, 1))
        expected = float((1 - torch.cosine_similarity(before, after, dim=-1)).mean())
        assert profile.layers[layer].influence == pytest.approx(expected, rel=1e-6)
        assert profile.layers[layer].positions == 6
    assert profile.layers[1].influence < profile.layers[3].influence < profile.layers[2].influence


def test_of_equal_influence_the_deeper_layer_goes_first() -> None:
    assert drop_least_influential([0.2, 0.1, 0.1, 0.3], 2) == (2, 1)
    assert drop_least_influential([0.2, 0.1], 2) == ()


@pytest.mark.parametrize(
    ("layers", "keep", "kept"),
    [(30, 10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]), (5, 2, [0, 4]), (5, 1, [0]), (3, 3, [0, 1, 2])],
)
def test_layers_are_kept_evenly_from_the_first_to_the_last(layers: int, keep: int, kept: list[int]) -> None:
    dropped = drop_evenly(layers, keep)
    assert [layer for layer in range(layers) if layer not in dropped] == kept


def test_any_number_of_layers_is_kept_evenly() -> None:
    for layers in range(1, 40):
        for keep in range(1, layers + 1):
            assert len(drop_evenly(layers, keep)) == layers - keep


def test_a_student_has_its_teachers_tokenizer_and_says_where_it_is_from(
    tmp_path: Path, deep_dir: Path
) -> None:
    cut_student(deep_dir, tmp_path / "student", CutConfig(keep=(0, 4)))
    teacher, student = load_student(deep_dir, device="cpu"), load_student(tmp_path / "student", device="cpu")
    assert student.tokenizer.vocab_sha256 == teacher.tokenizer.vocab_sha256
    assert student.tokenizer.chat_template_sha256 == teacher.tokenizer.chat_template_sha256
    assert student.tokenizer.eos_token_ids == teacher.tokenizer.eos_token_ids
    lineage = json.loads((tmp_path / "student" / "lynearm.json").read_text())
    assert lineage["cut_from"]["layers"] == [0, 4]
    assert lineage["cut_from"]["chosen"] == "named"
    assert lineage["cut_from"]["revision"].startswith("sha256:")
    assert str(tmp_path) not in json.dumps(lineage)


@pytest.mark.parametrize(
    "wanted",
    [{"keep": (0, 5)}, {"keep": (0, 0)}, {"layers": 6}, {"layers": -1}, {}, {"keep": (0,), "layers": 1}]
    + [{"layers": 6, "choose": choose} for choose in ("influence", "evenly")]
    + [{"layers": 1, "choose": "somehow"}],
)
def test_impossible_cuts_are_refused(tmp_path: Path, deep_dir: Path, wanted: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        cut_student(deep_dir, tmp_path / "student", CutConfig(**wanted))  # type: ignore[arg-type]  # by name
    assert not (tmp_path / "student").exists()


def test_a_directory_in_use_is_left_alone(tmp_path: Path, deep_dir: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="in use"):
        cut_student(deep_dir, tmp_path, CutConfig(keep=(0,)))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_profile_of_another_teacher_is_refused(tmp_path: Path, deep_dir: Path) -> None:
    few = profile_of(deep_dir, influence=[0.5, 0.1])
    with pytest.raises(MisalignmentError, match="has 2 layers, the teacher 5"):
        cut_student(deep_dir, tmp_path / "student", CutConfig(layers=2), evidence=Evidence(profile=few))
    blind = profile_of(deep_dir, influence=[0.1] * 5, neurons=np.zeros(0))
    with pytest.raises(MisalignmentError, match="0 neurons, the teacher 128"):
        cut_student(deep_dir, tmp_path / "student", CutConfig(neurons=2), evidence=Evidence(profile=blind))


def test_a_profile_that_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for text in ("", "[]", '{"model": "m"}', '{"model": "m", "revision": "r", "layers": [{"layer": 0}]}'):
        path.write_text(text)
        with pytest.raises(InvalidInputError, match=r"profile\.json"):
            read_profile_file(path)


def test_sequences_are_the_first_traces_up_to_the_bound(traces: list[Trace]) -> None:
    sequences = sequences_from_traces(traces, max_tokens=1)
    assert len(sequences) == 1
    assert sequences[0].completion_start == len(traces[0].prompt_token_ids)
    assert len(sequences_from_traces(traces[:5], max_tokens=10_000)) == 5
    with pytest.raises(InvalidInputError, match="no trace"):
        sequences_from_traces([], max_tokens=10)


def test_a_teacher_without_a_tokenizer_is_refused_and_a_template_that_refuses_is_not_used(
    deep_dir: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(deep_dir, tmp_path / "teacher")
    (teacher / "chat_template.jinja").write_text("{{ raise_exception('nobody may ask') }}")
    plain = default_sequences(teacher)
    assert all(one.completion_start > 1 for one in plain)
    (teacher / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer that can be loaded"):
        default_sequences(teacher)
