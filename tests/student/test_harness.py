"""Benchmarks by name: a tiny task of lm-eval's, run while a student is trained."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models.service_process import ServiceProcess
from student.teaching_material import offer

from lynearm.report.training import load_training_report, render_training_report
from lynearm.student.config import TrainConfig
from lynearm.student.harness import Harness, read_figures
from lynearm.student.metrics import read_metrics
from lynearm.student.model import StudentModel, load_student
from lynearm.student.trainer import run_train
from lynearm.wire.errors import ConfigError, MissingDependencyError, TrainingError
from lynearm.wire.traces import Trace

QUESTIONS: list[dict[str, Any]] = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0},
    {"question": "The capital of Italy is", "choices": ["Paris", "Rome"], "answer": 1},
    {"question": "Two and two are", "choices": ["four", "five"], "answer": 0},
]


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    """A folder with one task, whose data lie beside it, and one whose data are nowhere."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "tiny_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    # JSON is YAML.
    (folder / "tiny.yaml").write_text(json.dumps(task))
    nowhere = {"data_files": {"test": str(folder / "absent.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    (folder / "broken.yaml").write_text(json.dumps({**task, "task": "no_data", "dataset_kwargs": nowhere}))
    return folder


def accuracy(student: StudentModel, tokenizer: Any) -> float:
    """What the task should find, worked out without lm-eval."""
    correct = 0
    for question in QUESTIONS:
        logprobs: list[float] = []
        for choice in question["choices"]:
            context = tokenizer.encode(question["question"])
            whole = tokenizer.encode(f"{question['question']} {choice}")
            with torch.no_grad():
                logprobs_TV = student.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            rows = range(len(context), len(whole))
            logprobs.append(sum(float(logprobs_TV[row - 1, whole[row]]) for row in rows))
        correct += logprobs.index(max(logprobs)) == question["answer"]
    return correct / len(QUESTIONS)


def test_a_task_is_run_at_each_measurement_and_recorded(
    service: ServiceProcess,
    teacher: StudentModel,
    traces: list[Trace],
    student_dir: Path,
    task_dir: Path,
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    offer(service.target, teacher, traces, name="harness")
    config = TrainConfig(
        student=student_dir,
        streams=("harness",),
        service=service.target,
        out=tmp_path / "run",
        max_steps=2,
        held_out_traces=4,
        lm_eval=("tiny_choices",),
        lm_eval_path=task_dir,
        device="cpu",
        threads=1,
    )
    report = run_train(config)
    assert [record.step for record in report.evaluations] == [0, 2]
    loader: Any = AutoTokenizer  # half typed
    tokenizer = loader.from_pretrained(report.checkpoint)
    wanted = accuracy(load_student(report.checkpoint, device="cpu"), tokenizer)
    assert dict(report.evaluations[-1].tasks) == {"tiny_choices/acc": pytest.approx(wanted)}
    assert read_metrics(config.out).evaluations == report.evaluations
    assert "tiny_choices/acc" in render_training_report(load_training_report(config.out))
    manifest = json.loads((report.checkpoint / "lynearm.json").read_text())
    assert manifest["runs"][0]["held_out"]["last"]["tasks"] == dict(report.evaluations[-1].tasks)
    assert str(tmp_path) not in json.dumps(manifest)
    assert "tiny_choices/acc" in (report.checkpoint / "README.md").read_text()


def test_a_measurement_leaves_the_training_as_it_was(student_dir: Path, task_dir: Path) -> None:
    student = load_student(student_dir, device="cpu")
    harness = Harness(TrainConfig(lm_eval=("tiny_choices",), lm_eval_path=task_dir), student)
    student.train(True)
    torch.manual_seed(5)
    before, weights = torch.get_rng_state(), [one.clone() for _, one in student.named_parameters()]
    draws = random.getstate()
    assert harness.measure(student).keys() == {"tiny_choices/acc"}
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == draws
    assert student.model.training
    pairs = zip(weights, student.named_parameters(), strict=True)
    assert all(torch.equal(mine, one) for mine, (_, one) in pairs)


def test_tasks_that_are_not_there_or_cannot_run_are_named(student_dir: Path, task_dir: Path) -> None:
    student = load_student(student_dir, device="cpu")
    with pytest.raises(ConfigError, match="no task tiny_choises") as unknown:
        Harness(TrainConfig(lm_eval=("tiny_choises",), lm_eval_path=task_dir), student)
    assert "--lm-eval-path" in unknown.value.remedy
    harness = Harness(TrainConfig(lm_eval=("no_data",), lm_eval_path=task_dir), student)
    with pytest.raises(TrainingError, match="could not run no_data"):
        harness.measure(student)
    assert student.model.training
    with pytest.raises(ConfigError, match="held_out_traces is 0"):
        TrainConfig(lm_eval=("tiny_choices",), held_out_traces=0)


def test_lm_eval_that_is_not_installed_is_said(student_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    student = load_student(student_dir, device="cpu")
    with pytest.raises(MissingDependencyError, match="lm-eval") as missing:
        Harness(TrainConfig(lm_eval=("gsm8k",)), student)
    assert "lynearm[lm-eval]" in missing.value.remedy


def test_figures_are_read_without_errors_and_texts() -> None:
    results: dict[str, dict[str, object]] = {
        "gsm8k": {
            "alias": "gsm8k",
            "sample_len": 100,
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": "N/A",
            "exact_match,flexible-extract": 0.5,
        },
        "arc": {"acc,none": 1, "acc_stderr,none": 0.1, "acc_norm,none": float("nan")},
    }
    assert read_figures(results) == {
        "gsm8k/exact_match,strict-match": 0.25,
        "gsm8k/exact_match,flexible-extract": 0.5,
        "arc/acc": 1.0,
    }
