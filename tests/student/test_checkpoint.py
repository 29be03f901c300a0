"""Checkpoints: complete or absent, loadable by transformers, and refused when something is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models.limits import files_up_to
from student.teaching_material import make_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

from lynearm.student.checkpoint import (
    Checkpoint,
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    refresh_checkpoint,
    save_checkpoint,
    step_name,
)
from lynearm.student.config import TrainConfig
from lynearm.student.evaluation import load_held_out, save_held_out, write_parity_tokens
from lynearm.student.lineage import StreamUse, extend_lineage, read_lineage
from lynearm.student.mixing import StreamState, finish_pass
from lynearm.student.model import StudentModel, load_student
from lynearm.student.optimization import Optimization
from lynearm.student.progress import EvaluationRecord, StepRecord
from lynearm.wire.errors import CheckpointError, ConfigError
from lynearm.wire.traces import Cursor, TopK, Trace

RECORD = StepRecord(3, 0, 0.1 + 0.2, 0.3, 0.4, 99, 1e-3, 2.5)
STATE = TrainState(
    (
        StreamState(
            "lessons",
            17,
            cursor=Cursor(2, 5),
            furthest=Cursor(2, 5),
            traces=12,
            tokens=99,
            credit=-0.1,
        ),
    ),
    step=3,
    held_out_traces=(8,),
    curve=(RECORD,),
    evaluations=(EvaluationRecord(0, 0, 1.5, 2.5, 40),),
)


def save(
    out: Path, student: StudentModel, traces: list[Trace], state: TrainState = STATE, keep: int = 2
) -> Path:
    config = TrainConfig(out=out, keep_checkpoints=keep)
    base = read_lineage(student.directory)
    checkpoint = Checkpoint(
        out / step_name(state.step), state, Optimization(student, config).state(), tuple(traces[:8]), base
    )
    (mine,) = state.streams
    use = StreamUse(make_spec(student), mine.furthest, mine.epoch, mine.traces, mine.tokens)
    save_checkpoint(student, checkpoint, config=config, lineage=extend_lineage(base, [use]))
    return checkpoint.directory


def assert_same_traces(found: tuple[Trace, ...], expected: list[Trace]) -> None:
    assert [trace.prompt_id for trace in found] == [trace.prompt_id for trace in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.completion_token_ids, theirs.completion_token_ids)
        np.testing.assert_array_equal(ours.top_k.logprobs, theirs.top_k.logprobs)
        np.testing.assert_array_equal(ours.top_k.tail_mass, theirs.top_k.tail_mass)


def test_what_was_saved_is_loaded(tmp_path: Path, student_dir: Path, traces: list[Trace]) -> None:
    student = load_student(student_dir, device="cpu")
    directory = save(tmp_path / "run", student, traces)
    assert latest_checkpoint(tmp_path / "run") == directory
    loaded = load_checkpoint(directory)
    assert loaded.state == STATE
    assert loaded.written_by["patience_seconds"] == "inf"
    assert_same_traces(loaded.held_out, traces[:8])
    again = load_student(directory, device="cpu")
    assert again.tokenizer == replace(student.tokenizer, name=directory.name)
    for (name, ours), (_, theirs) in zip(again.named_parameters(), student.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_transformers_loads_a_checkpoint_as_any_model(
    tmp_path: Path, student_dir: Path, traces: list[Trace]
) -> None:
    student = load_student(student_dir, device="cpu")
    directory = save(tmp_path / "run", student, traces)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    input_ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, student.model(input_ids).logits)
    config = json.loads((directory / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert not [path for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_lineage_names_stream_licence_and_teacher_but_no_path(
    tmp_path: Path, student_dir: Path, traces: list[Trace]
) -> None:
    directory = save(tmp_path / "run", load_student(student_dir, device="cpu"), traces)
    lineage = json.loads((directory / "lynearm.json").read_text())
    (stream,) = lineage["streams"]
    assert (stream["stream"], stream["license"]) == ("lessons", "Apache-2.0")
    assert (stream["teacher"]["model"], stream["teacher"]["revision"]) == ("tiny teacher", "sha256:00")
    assert stream["end"] == {"offset": 2, "trace_index": 5}
    assert str(tmp_path) not in (directory / "lynearm.json").read_text()


def test_only_the_newest_checkpoints_stay(tmp_path: Path, student_dir: Path, traces: list[Trace]) -> None:
    student = load_student(student_dir, device="cpu")
    for step in (1, 2, 3):
        save(tmp_path / "run", student, traces, replace(STATE, step=step))
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert found == ["LATEST", step_name(2), step_name(3)]


def test_a_disk_without_room_is_said_and_leaves_earlier_checkpoints(
    tmp_path: Path, student_dir: Path, traces: list[Trace]
) -> None:
    student = load_student(student_dir, device="cpu")
    first = save(tmp_path, student, traces)
    with files_up_to(100_000), pytest.raises(CheckpointError, match=r"could not be written.*make room"):
        save(tmp_path, student, traces, replace(STATE, step=9))
    assert latest_checkpoint(tmp_path) == first
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".unfinished")]


def test_records_can_be_brought_up_to_date(tmp_path: Path, student_dir: Path, traces: list[Trace]) -> None:
    directory = save(tmp_path / "run", load_student(student_dir, device="cpu"), traces)
    loaded = load_checkpoint(directory)
    newer = replace(loaded, state=replace(loaded.state, streams=finish_pass(loaded.state.streams, 0)))
    refresh_checkpoint(newer, config=TrainConfig(out=tmp_path / "run"), lineage=read_lineage(directory))
    assert load_checkpoint(directory).state == newer.state
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["LATEST", step_name(3)]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("trainer.json", None, "has no trainer.json"),
        ("optimizer.safetensors", None, "has no optimizer.safetensors"),
        ("trainer.json", b"{", "not readable JSON"),
        ("trainer.json", b'{"format": 9}', "format 9"),
        ("trainer.json", b'{"format": 2, "state": {}}', "lacks or misstates"),
        ("trainer.json", b'{"format": 1, "state": {}}', "begin a new run"),
        ("optimizer.safetensors", b"\x00" * 64, "cannot be read"),
        ("held_out.block", b"nonsense", "held_out.block"),
        ("lynearm.json", b"[]", "not a lineage manifest"),
    ],
)
def test_a_broken_checkpoint_is_refused_with_its_file(
    tmp_path: Path, student_dir: Path, traces: list[Trace], name: str, content: bytes | None, match: str
) -> None:
    directory = save(tmp_path / "run", load_student(student_dir, device="cpu"), traces)
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(directory)


def test_a_pointer_to_nowhere_is_refused(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "LATEST").write_text("../elsewhere\n")
    with pytest.raises(CheckpointError, match="elsewhere"):
        latest_checkpoint(tmp_path)


def test_a_model_that_cannot_be_loaded_is_refused(tmp_path: Path, student_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_student(tmp_path)
    for path in student_dir.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_student(tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_torch_does_not_have_is_refused(student_dir: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}', which torch cannot use here"):
        load_student(student_dir, device=device)


def test_many_held_out_traces_span_several_blocks(tmp_path: Path, traces: list[Trace]) -> None:
    generator = np.random.default_rng(0)
    every_id = np.tile(np.arange(384, dtype=np.int32), (8000, 1))
    long = [
        replace(
            trace,
            completion_token_ids=np.resize(trace.completion_token_ids, 8000),
            sampled_logprobs=np.resize(trace.sampled_logprobs, 8000),
            top_k=TopK(
                token_ids=generator.permuted(every_id, axis=1)[:, :96],
                logprobs=np.sort(generator.normal(-9, 1, (8000, 96)).astype(np.float32))[:, ::-1].copy(),
                tail_mass=np.zeros(8000, np.float32),
            ),
        )
        for trace in traces[:3]
    ]
    save_held_out(tmp_path, long, 384)
    assert len(list(tmp_path.glob("held_out*.block"))) == 3
    assert_same_traces(load_held_out(tmp_path), long)


def test_held_out_traces_of_streams_with_and_without_draws_are_kept_together(
    tmp_path: Path, traces: list[Trace]
) -> None:
    plain, rows = traces[0], traces[1].top_k
    drawn = replace(rows, tail_draws=np.full((rows.positions, 1), -1, np.int32))
    save_held_out(tmp_path, [plain, replace(traces[1], top_k=drawn)], 384)
    assert_same_traces(load_held_out(tmp_path), [plain, traces[1]])


def test_held_out_traces_may_keep_tokens_of_a_wider_teachers_padding(
    tmp_path: Path, traces: list[Trace]
) -> None:
    token_ids = traces[0].top_k.token_ids.copy()
    token_ids[:, -1] = 400
    padded = replace(traces[0], top_k=replace(traces[0].top_k, token_ids=token_ids))
    save_held_out(tmp_path, [padded, traces[1]], 384)
    found = load_held_out(tmp_path)
    assert_same_traces(found, [padded, traces[1]])
    np.testing.assert_array_equal(found[0].top_k.token_ids, token_ids)


def test_parity_tokens_are_the_held_out_traces(tmp_path: Path, traces: list[Trace]) -> None:
    with pytest.raises(CheckpointError, match="no held-out traces"):
        write_parity_tokens(tmp_path, tmp_path / "parity.json")
    save_held_out(tmp_path, traces[:3], 384)
    assert write_parity_tokens(tmp_path, tmp_path / "parity.json") == 3
    sequences = json.loads((tmp_path / "parity.json").read_text())
    for sequence, trace in zip(sequences, traces[:3], strict=True):
        start = sequence["completion_start"]
        assert sequence["token_ids"][:start] == trace.prompt_token_ids.tolist()
        assert sequence["token_ids"][start:] == trace.completion_token_ids.tolist()
