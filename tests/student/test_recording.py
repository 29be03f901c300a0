"""What a run records: metrics, the best checkpoint, its manifest and card."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from models.service_process import ServiceProcess
from student.run_material import short_run
from student.teaching_material import make_blocks, make_spec
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.client import TraceClient
from lynearm.report.training import load_training_report, render_training_report
from lynearm.student.checkpoint import latest_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.lineage import read_lineage
from lynearm.student.metrics import METRICS_FILE, MetricsLog, read_metrics
from lynearm.student.model import StudentModel
from lynearm.student.progress import EvaluationRecord, StepRecord, TrainProgress
from lynearm.student.recording import has_stalled
from lynearm.student.run_directory import (
    best_checkpoint,
    point_to_best,
    point_to_latest,
    remove_old,
    step_name,
)
from lynearm.student.trainer import run_train
from lynearm.wire.errors import (
    CheckpointError,
    ConfigError,
    DistillationForbiddenError,
    MissingDependencyError,
)
from lynearm.wire.traces import Trace

numbers = itertools.count()


@pytest.fixture
def configure(
    service: ServiceProcess, teacher: StudentModel, traces: list[Trace], student_dir: Path, tmp_path: Path
) -> Callable[..., TrainConfig]:
    def make(license_id: str = "Apache-2.0", **overrides: object) -> TrainConfig:
        name = f"records-{next(numbers)}"
        spec = replace(
            make_spec(teacher, name), license=license_id, labels={"prompts": "acme/questions", "team": "a|b"}
        )
        with TraceClient(service.target) as client:
            client.create_stream(spec)
            with client.publisher(name, "teacher") as publisher:
                for block in make_blocks(teacher, traces, 12):
                    publisher.publish(block)
            client.seal_stream(name)
        own: dict[str, object] = {"eval_every_steps": 2}
        return short_run(service, student_dir, (name,), tmp_path / "run", **(own | overrides))

    return make


def front_matter(card: str) -> dict[str, object]:
    """Every value is JSON, which is YAML."""
    _, front, _ = card.split("---\n", 2)
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in front.splitlines())}


def evaluation(step: int, kl: float) -> EvaluationRecord:
    return EvaluationRecord(step, 10 * step, kl, 2.0, 40)


def test_a_run_leaves_metrics_manifest_card_and_a_page(configure: Callable[..., TrainConfig]) -> None:
    config = configure(epochs=2, checkpoint_every_steps=10)
    events: list[TrainProgress] = []
    report = run_train(config, events.append)

    metrics = read_metrics(config.out)
    assert metrics.steps == report.curve
    assert metrics.evaluations == report.evaluations
    assert all(step.seconds > 0 for step in metrics.steps)
    assert all(0 <= one.agreement <= 1 for one in metrics.evaluations if one.agreement is not None)
    first, last = metrics.evaluations[0], metrics.evaluations[-1]
    assert last.agreement is not None
    assert last.calibration_error is not None
    lines = [json.loads(line) for line in (config.out / METRICS_FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines[:4]] == ["evaluation", "step", "step", "evaluation"]
    assert lines[0]["perplexity"] == pytest.approx(first.perplexity)
    assert 0 <= events[-1].waiting_share < 1

    manifest = json.loads((report.checkpoint / "lynearm.json").read_text())
    (stream,), (run,) = manifest["streams"], manifest["runs"]
    assert stream["prompts"] == "acme/questions"
    codec = {"mode": "exact", "top_k": 8, "min_probability": 0.0, "draws": 0, "tail_draws": 0}
    assert stream["codec"] == codec
    assert stream["loss"] == ["forward-kl:1", "cross-entropy:0.1"]
    assert "loss" not in run["settings"]
    assert stream["distillation"] == {"verdict": "allowed", "reason": ""}
    assert run["code"]["torch"] == torch.__version__
    assert run["code"]["transformers"] == transformers.__version__
    assert run["overrides"] == {}
    assert run["settings"]["learning_rate"] == 3e-3
    assert run["held_out"]["last"]["kl"] == last.kl
    assert str(config.out.parent) not in json.dumps(manifest)

    card = (report.checkpoint / "README.md").read_text()
    front = front_matter(card)
    assert (front["license"], front["datasets"]) == ("apache-2.0", ["acme/questions"])
    assert front["base_model"] == ["student"]
    assert "`tiny teacher`" in card

    assert report.best_checkpoint == best_checkpoint(config.out)
    assert report.best_checkpoint is not None
    page = render_training_report(load_training_report(config.out))
    assert page.count("<svg") == 8
    assert "<script" not in page
    assert "acme/questions" in page


def test_a_resumed_run_counts_no_step_twice(configure: Callable[..., TrainConfig]) -> None:
    config = configure(checkpoint_every_steps=4, max_steps=6)
    run_train(config)
    # What a killed run had written after its last checkpoint, the last line cut short.
    with (config.out / METRICS_FILE).open("a") as file:
        line = (config.out / METRICS_FILE).read_text().splitlines()[-2]
        file.write(line.replace('"step": 6', '"step": 7') + "\n" + line[:30])
    report = run_train(replace(config, max_steps=9, resume=True))
    metrics = read_metrics(config.out)
    assert [step.step for step in metrics.steps] == list(range(1, 10))
    assert metrics.evaluations == report.evaluations


def test_a_run_that_goes_on_with_other_settings_says_so_and_records_since_when(
    configure: Callable[..., TrainConfig], caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(learning_rate=3e-3, loss=("forward-kl",), max_steps=4)
    run_train(config)
    assert "from step" not in caplog.text
    # Resumed and stopped before a step: nothing was learnt at this rate.
    run_train(replace(config, learning_rate=0.5, resume=True))
    assert "learning_rate was 0.003 and is 0.5 from step 5 on" in caplog.text
    run_train(replace(config, learning_rate=1e-3, max_steps=7, resume=True))
    last = replace(config, learning_rate=1e-3, loss=(), max_steps=9, resume=True)
    report = run_train(last)
    assert "loss was ['forward-kl'] and is ()" in caplog.text
    (run,) = read_lineage(report.checkpoint)["runs"]
    assert (run["settings"]["learning_rate"], run["settings"]["max_steps"]) == (1e-3, 9)
    assert run["earlier"] == [
        {"until_step": 4, "settings": {"learning_rate": 3e-3, "max_steps": 4}},
        {"until_step": 7, "settings": {"loss": ["forward-kl"], "max_steps": 7}},
    ]
    assert "Until step 4: `learning_rate = 0.003, max_steps = 4`" in (
        report.checkpoint / "README.md"
    ).read_text(encoding="utf-8")
    page = render_training_report(load_training_report(config.out))
    assert "until step 4" in page
    shown = CliRunner().invoke(app, ["student", "lineage", str(config.out)], env={"COLUMNS": "200"})
    assert "until step 7" in shown.stdout


def test_the_best_checkpoint_stays_when_later_ones_are_worse(tmp_path: Path) -> None:
    evaluations = [evaluation(step, kl) for step, kl in ((0, 3.0), (1, 2.0), (2, 1.0), (3, 1.5), (4, 1.7))]
    for count in range(1, 5):
        (tmp_path / step_name(count)).mkdir()
        point_to_best(tmp_path, evaluations[: count + 1])
        remove_old(tmp_path, 1)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["BEST", step_name(2), step_name(4)]
    assert best_checkpoint(tmp_path) == tmp_path / step_name(2)


def test_a_run_that_was_led_back_keeps_what_it_saves(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        (tmp_path / step_name(step)).mkdir()
    # LATEST was set back to step 10, since the later ones are damaged, and the run went on to 12 and 14.
    for step in (12, 14):
        (tmp_path / step_name(step)).mkdir()
        point_to_latest(tmp_path, step_name(step))
        remove_old(tmp_path, 2)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["LATEST", *map(step_name, (12, 14, 20, 30))]
    assert latest_checkpoint(tmp_path) == tmp_path / step_name(14)


def test_a_kl_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    (tmp_path / step_name(1)).mkdir()
    point_to_best(tmp_path, [evaluation(1, float("nan"))])
    assert best_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("kls", "patience", "stalled"),
    [
        ([3.0, 3.0, 3.0], 0, False),
        ([3.0, 2.0, 1.0], 2, False),
        ([1.0, 2.0], 2, False),
        ([1.0, 2.0, 1.5], 2, True),
        ([2.0, 3.0, 1.9], 2, False),
        ([1.0, 1.0, 1.0], 2, True),
        ([1.0, float("nan"), float("nan")], 2, True),
    ],
)
def test_a_run_stalls_when_its_last_measurements_are_no_better(
    kls: list[float], patience: int, stalled: bool
) -> None:
    assert has_stalled([evaluation(step, kl) for step, kl in enumerate(kls)], patience) == stalled


def test_a_student_that_no_longer_improves_stops(configure: Callable[..., TrainConfig]) -> None:
    # A rate below the weights' precision changes nothing.
    config = configure(learning_rate=1e-12, eval_every_steps=1, early_stop_patience=2)
    report = run_train(config)
    assert (report.stop_reason, report.steps) == ("no_improvement", 2)
    assert report.how_to_go_on


def test_a_run_that_stops_early_keeps_its_lowest_measurement(configure: Callable[..., TrainConfig]) -> None:
    # So high a rate that the KL falls, and then rises.
    config = configure(
        learning_rate=0.5,
        warmup_steps=10,
        eval_every_steps=1,
        early_stop_patience=2,
        checkpoint_every_steps=0,
    )
    report = run_train(config)
    assert report.stop_reason == "no_improvement"
    lowest = min(report.evaluations, key=lambda record: record.kl)
    assert 0 < lowest.step < report.steps
    assert report.best_checkpoint is not None
    assert report.best_checkpoint.name == step_name(lowest.step)


def test_questions_are_asked_at_each_measurement(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "What is 2 + 2?", "answer": "#### 4"}\n' * 3, encoding="utf-8")
    config = configure(questions=questions, question_tokens=4, max_steps=2)
    report = run_train(config)
    assert [one.exact_match in (0.0, 1.0) for one in report.evaluations] == [True, True]
    assert read_metrics(config.out).evaluations == report.evaluations
    assert str(tmp_path) not in (report.checkpoint / "lynearm.json").read_text()


def test_early_stop_without_measurements_is_refused() -> None:
    with pytest.raises(ConfigError, match="early_stop_patience"):
        TrainConfig(early_stop_patience=3, held_out_traces=0)


def test_a_stream_that_forbids_distillation_is_refused_and_the_override_recorded(
    configure: Callable[..., TrainConfig],
) -> None:
    config = configure("llama2", max_steps=1)
    with pytest.raises(DistillationForbiddenError, match="llama2"):
        run_train(config)
    assert not config.out.exists()
    report = run_train(replace(config, allow_terms=True))
    manifest = json.loads((report.checkpoint / "lynearm.json").read_text())
    assert "llama2" in manifest["runs"][0]["overrides"]["allow_terms"]
    assert manifest["streams"][0]["distillation"]["verdict"] == "forbidden"
    card = (report.checkpoint / "README.md").read_text()
    assert "overridden by `allow_terms`" in card


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_said_before_training(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=name) as caught:
        run_train(configure(trackers=(name,)))
    assert f"pip install {name}" in caught.value.remedy


def test_figures_reach_tensorboard(configure: Callable[..., TrainConfig]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    config = configure(trackers=("tensorboard",), max_steps=3)
    run_train(config)
    assert list((config.out / "tensorboard").glob("events.*"))


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match="comet"):
        TrainConfig(trackers=("comet",))


def test_figures_that_are_not_finite_are_null_in_the_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.add(StepRecord(1, 0, float("inf"), 0.3, 0.4, 99, 1e-3, float("nan")))
    log.close()
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line)["loss"] is None
    (step,) = read_metrics(tmp_path).steps
    assert step.kl == 0.3


def test_a_metrics_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable metrics"):
        read_metrics(tmp_path)
    (tmp_path / METRICS_FILE).write_text("[]\n{}\n")
    with pytest.raises(CheckpointError, match="line 1"):
        read_metrics(tmp_path)


def test_commands_show_lineage_and_report(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = configure("unknown", max_steps=2)
    run_train(config)
    runner = CliRunner()
    shown = runner.invoke(app, ["student", "lineage", str(config.out)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "tiny teacher" in shown.output
    assert "unknown" in shown.output
    as_json = runner.invoke(app, ["student", "lineage", "--json", str(config.out)])
    checkpoint = latest_checkpoint(config.out)
    assert checkpoint is not None
    assert json.loads(as_json.stdout) == json.loads((checkpoint / "lynearm.json").read_text())
    drawn = runner.invoke(app, ["student", "report", str(config.out)])
    assert drawn.exit_code == 0, drawn.output
    assert (config.out / "report.html").read_text().startswith("<!doctype html>")
    wrong = runner.invoke(app, ["student", "lineage", str(tmp_path / "nothing")])
    assert wrong.exit_code == 1


def test_the_cut_command_says_what_was_kept(teacher_dir: Path, tmp_path: Path) -> None:
    made = CliRunner().invoke(
        app, ["student", "cut", "--teacher", str(teacher_dir), "--out", str(tmp_path / "s"), "--keep", "1"]
    )
    assert made.exit_code == 0, made.output
    assert "1 of 2 layers" in made.stdout
    assert "kept: 1" in made.stdout
    manifest = json.loads((tmp_path / "s" / "lynearm.json").read_text())
    assert manifest["cut_from"]["layers"] == [1]
