"""`lynearm student cut` with profiles and traces out of the service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models.service_process import ServiceProcess
from models.tiny_llama import build_tiny_llama
from student.cutting_material import profile_of
from student.teaching_material import make_blocks, make_spec, offer
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.cli.options import SERVICE_VARIABLE
from lynearm.client import TraceClient
from lynearm.client.profiles import PROFILE_PREFIX
from lynearm.student.card import render_card
from lynearm.student.model import StudentModel
from lynearm.wire.profiles import encode_profile
from lynearm.wire.traces import Trace


@pytest.fixture(scope="module")
def stream(service: ServiceProcess, teacher: StudentModel, teacher_dir: Path, traces: list[Trace]) -> str:
    """A stream with a profile, by which the teacher's first layer does least."""
    profile = profile_of(teacher_dir, influence=[0.25, 0.75])
    with TraceClient(service.target) as client:
        client.create_stream(make_spec(teacher, "profiled"))
        with client.publisher("profiled", "teacher") as publisher:
            for block in make_blocks(teacher, traces[:20], 7):
                publisher.publish(block)
        for number, part in enumerate(encode_profile(profile)):
            client.attachments.put("profiled", f"{PROFILE_PREFIX}worker.{number}", part)
    return "profiled"


@pytest.fixture(autouse=True)
def address(monkeypatch: pytest.MonkeyPatch, service: ServiceProcess) -> None:
    monkeypatch.setenv(SERVICE_VARIABLE, service.target)


def cut(teacher_dir: Path, out: Path, *arguments: str) -> tuple[int, str]:
    made = CliRunner().invoke(
        app, ["student", "cut", "--teacher", str(teacher_dir), "--out", str(out), *arguments]
    )
    return made.exit_code, made.output


def test_a_streams_profile_chooses_and_is_shown(tmp_path: Path, teacher_dir: Path, stream: str) -> None:
    code, output = cut(teacher_dir, tmp_path / "s", "--layers", "1", "--profile", stream, "--neurons", "96")
    assert code == 0, output
    assert "measured on the teacher profile, 10 positions" in output
    rows = {line.split()[0]: line.split() for line in output.splitlines() if "0.25" in line or "0.75" in line}
    assert rows["0"][1] == "0.2500"
    assert rows["0"][-1] == "-"  # gone
    assert rows["1"][1] == "0.7500"
    assert rows["1"][3:5] == ["0", "0-1"]  # becomes layer 0, with both heads
    assert "kept: 1\nleft out: 0\n" in output
    assert "1 of 2 layers" in output
    manifest = json.loads((tmp_path / "s" / "lynearm.json").read_text())
    assert manifest["cut_from"]["chosen"] == "influence"
    assert ", 96 of 128 neurons" in render_card(manifest)
    shown = CliRunner().invoke(app, ["student", "lineage", str(tmp_path / "s")])
    assert "96 of 128" in shown.output


def test_a_saved_profile_decides_as_the_streams_own(tmp_path: Path, teacher_dir: Path, stream: str) -> None:
    saved = CliRunner().invoke(app, ["teacher", "profile", stream, "--json"])
    (tmp_path / "profile.json").write_text(saved.output)
    arguments = ["--layers", "1", "--heads", "1", "--neurons", "40", "--progress", "none"]
    assert cut(teacher_dir, tmp_path / "a", *arguments, "--profile", stream)[0] == 0
    assert cut(teacher_dir, tmp_path / "b", *arguments, "--profile", str(tmp_path / "profile.json"))[0] == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_streams_traces_are_measured_on(tmp_path: Path, teacher_dir: Path, stream: str) -> None:
    code, output = cut(teacher_dir, tmp_path / "s", "--layers", "1", "--traces", stream)
    assert code == 0, output
    manifest = json.loads((tmp_path / "s" / "lynearm.json").read_text())
    assert manifest["cut_from"]["chosen"] == "measured"
    assert manifest["cut_from"]["profile"]["positions"] > 60


def test_what_is_not_there_is_said(
    tmp_path: Path, teacher_dir: Path, stream: str, service: ServiceProcess, teacher: StudentModel
) -> None:
    offer(service.target, teacher, [], name="bare")
    code, output = cut(teacher_dir, tmp_path / "s", "--layers", "1", "--profile", "bare")
    assert (code, "has no teacher profile" in output) == (1, True)
    code, output = cut(teacher_dir, tmp_path / "s", "--layers", "1", "--traces", "bare")
    assert (code, "no trace to measure on" in output) == (1, True)
    code, output = cut(teacher_dir, tmp_path / "s", "--layers", "1", "--profile", "lost.json")
    assert (code, "lynearm teacher profile STREAM --json" in output) == (1, True)
    other = build_tiny_llama(tmp_path / "other", corpus=("Quite another text.",))
    code, output = cut(other, tmp_path / "s", "--layers", "1", "--traces", stream)
    assert (code, "another vocabulary" in output) == (1, True)
    assert not (tmp_path / "s").exists()
