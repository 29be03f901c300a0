"""`lynearm teach --teachers`: what the command makes of a job file, before any model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models.tiny_llama import build_tiny_llama
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.cli.teach_job import load_job
from lynearm.cli.teach_progress import describe
from lynearm.teacher.progress import TeacherStatus, TeachProgress, WorkerStatus
from lynearm.wire.errors import ConfigError


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Hi", "tags": {"topic": "maths"}}, {"prompt": "Ho"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    models = [build_tiny_llama(tmp_path / name, num_layers=1) for name in ("a", "b")]
    path = tmp_path / "job.toml"
    path.write_text(
        f'[teach]\nprompts = "{prompts}"\nstream = "lessons"\nlicense = "MIT"\nmax_tokens = 64\n'
        f'[[teacher]]\nname = "maths"\nwhen = {{ topic = "maths" }}\nmodel = "{models[0]}"\n'
        f'[[teacher]]\nname = "rest"\nmodel = "{models[1]}"\n'
    )
    return path


def test_flags_and_assignments_override_the_file_for_every_teacher(job_file: Path) -> None:
    configs = load_job(job_file, {"service": "a:1", "max_tokens": None, "teachers": job_file}, ["seed=7"])
    assert [(one.service, one.seed, one.max_tokens) for one in configs] == [("a:1", 7, 64)] * 2
    assert [Path(one.model).name for one in configs] == ["a", "b"]
    assert {"teacher.maths", "teacher.rest"} == set(configs[0].labels)


@pytest.mark.parametrize("flag", ["model", "stream", "license", "producer_id", "config"])
def test_a_flag_that_makes_all_teachers_the_same_is_refused(job_file: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} goes with one teacher"):
        load_job(job_file, {flag: "x"}, [])


def test_a_key_that_is_none_is_named_with_its_teacher(job_file: Path) -> None:
    job_file.write_text(job_file.read_text() + "max_tokns = 7\n")
    with pytest.raises(
        ConfigError, match=r"\[\[teacher\]\] 2 \(rest\): there is no key 'max_tokns'.*max_tokens"
    ):
        load_job(job_file, {}, [])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--teachers", "none.toml"], "cannot read job file none.toml"),
        (["--only", "maths"], "--only goes with --teachers"),
        (["--set", "route=1"], "there is no key 'route'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["teach", *arguments])
    assert result.exit_code == 2
    assert complaint in result.output
    assert "Traceback" not in result.output


def test_progress_counts_verdicts() -> None:
    status = describe(TeachProgress("generating", verdicts={"incorrect": 3, "correct": 12}))
    assert status is not None
    assert "12 correct, 3 incorrect" in status.text


def test_several_teachers_have_a_row_each_above_those_of_their_workers() -> None:
    teachers = (
        TeacherStatus("maths", "generating", prompts=10, done_prompts=5, tokens_per_second=42.0, workers=1),
        TeacherStatus("code", "waiting", "waiting for room for 1 CPUs and 3.0 GiB beside maths", prompts=4),
    )
    workers = (WorkerStatus("teacher-maths-0", "generating", running=3, max_batch=4),)
    status = describe(TeachProgress("generating", prompts=14, teachers=teachers, workers=workers))
    assert status is not None
    maths, code, worker = status.rows
    assert (maths.name, maths.share) == ("maths", 0.5)
    assert maths.cells == ("generating", "1 worker", "42 tokens/s", "5/10 prompts")
    assert code.note.startswith("waiting for room")
    assert worker.name == "teacher-maths-0"
    assert len({len(row.cells) for row in status.rows}) == 1
