"""A training run as a page: loss and held-out figures by teacher tokens, waiting, throughput, lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, cast

from lynearm.report.charts import Chart, Point, Series, smooth
from lynearm.report.page import chart_cards, facts_card, render_page, tiles
from lynearm.student.lineage import list_changes, read_lineage
from lynearm.student.metrics import Metrics, read_metrics
from lynearm.student.progress import EvaluationRecord, StepRecord
from lynearm.student.run_directory import best_checkpoint, latest_checkpoint

__all__ = ["TrainingReport", "load_training_report", "render_training_report"]

_TOKENS_LABEL = "completion tokens of the teacher"
_LEGEND_WIDTH = 356
"""Of a chart's 420, what lies between its margins."""

WANTED_WAITING = 0.02
"""Part of the time that a run may spend without traces while its stream has some."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a run's directory says of it."""

    title: str
    metrics: Metrics
    lineage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Manifest of the newest checkpoint; empty before the first."""
    best: str = ""
    """Name of the best checkpoint; empty where none was measured."""


def load_training_report(out: Path) -> TrainingReport:
    """What there is to tell of a run, also of one that is still going on.

    Args:
        out: Directory of the run.

    Raises:
        CheckpointError: if it holds no metrics, or what it holds cannot be read.
    """
    latest, best = latest_checkpoint(out), best_checkpoint(out)
    return TrainingReport(
        out.resolve().name,
        read_metrics(out),
        read_lineage(latest) if latest is not None else {},
        best.name if best is not None else "",
    )


def render_training_report(report: TrainingReport) -> str:
    """The whole page; its size does not grow with the run."""
    return render_page(
        report.title,
        [
            _header(report),
            _tiles(report),
            "<h2>What it learnt</h2>",
            chart_cards(
                [
                    _loss_chart(report.metrics.steps),
                    *_held_out_charts(report.metrics.evaluations),
                    *_share_chart(report.metrics.steps),
                    _gradient_chart(report.metrics.steps),
                ]
            ),
            "<h2>How the time was spent</h2>",
            chart_cards([_waiting_chart(report.metrics.steps), _throughput_chart(report.metrics.steps)]),
            _streams(report.lineage),
            _runs(report.lineage),
        ],
    )


def waiting_share(steps: Sequence[StepRecord]) -> float | None:
    """Part of the steps' time without traces at hand, the first step's wait for the teacher left out."""
    waiting = sum(step.waiting_seconds for step in steps[1:])
    seconds = sum(step.seconds for step in steps) + waiting
    return waiting / seconds if seconds > 0 else None


def _header(report: TrainingReport) -> str:
    told = f"{_teachers(report.lineage)} taught {report.lineage.get('name', 'a student')}"
    if len(report.metrics.evaluations) > 1:
        before, after = report.metrics.evaluations[0].kl, report.metrics.evaluations[-1].kl
        told += (
            f". On prompts that it never trained on, its distance to the teacher went from {before:.3f} to "
            f"{after:.3f} nats per token"
        )
    return f'<h1>{escape(report.title)}</h1>\n<p class="lead">{escape(told)}.</p>'


def _tiles(report: TrainingReport) -> str:
    steps, evaluations = report.metrics.steps, report.metrics.evaluations
    first, last = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
    share = waiting_share(steps)
    agreement = last.agreement if last is not None else None
    return tiles(
        {
            "Held-out KL": (
                f"{first.kl:.3f} → {last.kl:.3f}"
                if first is not None and last is not None
                else "not measured",
                f"nats per token; best: {report.best}" if report.best else "nats per token",
            ),
            "Agreement": (
                f"{agreement:.1%}" if agreement is not None else "not measured",
                "same most likely token as the teacher",
            ),
            "Teacher tokens": (f"{steps[-1].tokens:,}" if steps else "0", f"in {len(steps):,} steps"),
            "Waiting for data": (
                f"{share:.1%}" if share is not None else "not measured",
                "of the time since the first step",
            ),
        }
    )


def _loss_chart(steps: Sequence[StepRecord]) -> Chart:
    losses = [(float(step.tokens), step.loss) for step in steps]
    return _step_chart("Training loss", "nats per token", losses)


def _gradient_chart(steps: Sequence[StepRecord]) -> Chart:
    norms = [(float(step.tokens), step.gradient_norm) for step in steps]
    return _step_chart("Gradient norm before clipping", "norm", norms)


def _held_out_charts(evaluations: Sequence[EvaluationRecord]) -> list[Chart]:
    def points(name: str) -> tuple[Point, ...]:
        found = [(one.tokens, cast("float | None", getattr(one, name))) for one in evaluations]
        return tuple((float(tokens), value) for tokens, value in found if value is not None)

    answered = points("exact_match")
    exact_match = [
        Chart("Questions answered exactly", _TOKENS_LABEL, "part of the questions",
              (Series("exact match", answered, "dotted_line"),)),
    ] if answered else []  # fmt: skip
    tasks = dict.fromkeys(name for one in evaluations for name in one.tasks)
    return [
        Chart("Held-out KL to the teacher", _TOKENS_LABEL, "nats per token",
              (Series("held-out KL", points("kl"), "dotted_line"),)),
        *_stream_charts(evaluations),
        Chart("Agreement with the teacher", _TOKENS_LABEL, "part of the held-out tokens",
              (Series("same most likely token", points("agreement"), "dotted_line"),)),
        Chart("Perplexity on the teacher's tokens", _TOKENS_LABEL, "perplexity",
              (Series("perplexity", points("perplexity"), "dotted_line"),)),
        *exact_match,
        *(_task_chart(name, evaluations) for name in tasks),
        Chart("Calibration", _TOKENS_LABEL, "expected calibration error",
              (Series("calibration error", points("calibration_error"), "dotted_line"),)),
    ]  # fmt: skip


def _task_chart(name: str, evaluations: Sequence[EvaluationRecord]) -> Chart:
    points = tuple((float(one.tokens), one.tasks[name]) for one in evaluations if name in one.tasks)
    return Chart(name, _TOKENS_LABEL, "lm-eval's figure", (Series(name, points, "dotted_line"),))


def _stream_charts(evaluations: Sequence[EvaluationRecord]) -> list[Chart]:
    """The held-out KL of each stream, where there are several."""
    names = list(dict.fromkeys(name for one in evaluations for name in one.streams))
    series = tuple(
        Series(
            _legend(name, len(names)),
            tuple((float(one.tokens), one.streams[name].kl) for one in evaluations if name in one.streams),
            "dotted_line",
        )
        for name in names
    )
    return [Chart("Held-out KL by stream", _TOKENS_LABEL, "nats per token", series)] if names else []


def _share_chart(steps: Sequence[StepRecord]) -> list[Chart]:
    """What each stream contributed, where there are several."""
    names = list(dict.fromkeys(name for step in steps for name in step.stream_tokens))
    window = max(3, len(steps) // 15)
    series = tuple(
        Series(_legend(name, len(names)), smooth([_share(step, name) for step in steps], window))
        for name in names
    )
    label = f"% of the tokens, mean of {window} steps"
    return [Chart("Shares of the streams", _TOKENS_LABEL, label, series)] if names else []


def _share(step: StepRecord, name: str) -> Point:
    total = sum(step.stream_tokens.values()) or 1
    return float(step.tokens), 100 * step.stream_tokens.get(name, 0) / total


def _legend(name: str, count: int) -> str:
    """A stream's name, cut so that `count` of them stand side by side above a chart."""
    letters = max(4, int((_LEGEND_WIDTH / count - 34) / 6.2))
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _waiting_chart(steps: Sequence[StepRecord]) -> Chart:
    shares = [
        (float(step.tokens), 100 * step.waiting_seconds / (step.seconds + step.waiting_seconds))
        for step in steps[1:]
        if step.seconds + step.waiting_seconds > 0
    ]
    guide = (100 * WANTED_WAITING, f"{WANTED_WAITING:.0%}")
    return _step_chart("Waiting for data", "% of a step's time", shares, guide)


def _throughput_chart(steps: Sequence[StepRecord]) -> Chart:
    rates: list[Point] = []
    before = 0
    for step in steps:
        if step.seconds > 0:
            rates.append((float(step.tokens), (step.tokens - before) / step.seconds))
        before = step.tokens
    return _step_chart("Throughput while training", "tokens per second", rates)


def _step_chart(
    title: str, y_label: str, points: Sequence[Point], guide: tuple[float, str] | None = None
) -> Chart:
    window = max(3, len(points) // 15)
    return Chart(
        title,
        _TOKENS_LABEL,
        y_label,
        (
            Series("each step", tuple(points), "faint"),
            Series(f"mean of {window} steps", smooth(points, window)),
        ),
        guide,
    )


def _teachers(lineage: Mapping[str, Any]) -> str:
    names = [str(_part(stream, "teacher").get("model", "")) for stream in _listed(lineage, "streams")]
    return ", ".join(dict.fromkeys(names)) or "A teacher"


def _streams(lineage: Mapping[str, Any]) -> str:
    streams = _listed(lineage, "streams")
    if not streams:
        return ""
    columns = ("Stream", "Teacher", "Licence", "Prompts", "Codec", "Tokens")
    head = "".join(f"<th>{one}</th>" for one in columns)
    rows = "".join(_stream_row(columns, stream) for stream in streams)
    table = f'<table class="cards"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<h2>What went into it</h2>\n<div class="card">{table}</div>'


def _stream_row(columns: Sequence[str], stream: Mapping[str, Any]) -> str:
    teacher, codec = _part(stream, "teacher"), _part(stream, "codec")
    terms = _part(stream, "distillation")
    values = (
        (teacher.get("model", ""), teacher.get("revision", "")),
        (stream.get("license", ""), terms.get("reason", "")),
        (stream.get("prompts", "unknown"), ""),
        (f"{codec.get('mode', '')}, k={codec.get('top_k', '')}", ""),
        (f"{int(stream.get('completion_tokens', 0)):,}", f"in {int(stream.get('traces', 0)):,} traces"),
    )
    cells = "".join(
        f'<td data-label="{column}"><span>{escape(str(value))}'
        + (f"<small>{escape(str(below))}</small>" if below else "")
        + "</span></td>"
        for column, (value, below) in zip(columns[1:], values, strict=True)
    )
    return f"<tr><td>{escape(str(stream.get('stream', '')))}</td>{cells}</tr>"


def _runs(lineage: Mapping[str, Any]) -> str:
    sections: list[str] = []
    for number, run in enumerate(_listed(lineage, "runs"), 1):
        settings = {name: str(value) for name, value in _part(run, "settings").items()}
        overrides = {f"overridden: {name}": str(value) for name, value in _part(run, "overrides").items()}
        versions = {name: str(value) for name, value in _part(run, "code").items()}
        earlier = {f"until step {until:,}": values for until, values in list_changes(run)}
        sections.append(
            f"<details><summary>Settings and versions of run {number}</summary>"
            f"{facts_card({**overrides, **versions, **settings, **earlier})}</details>"
        )
    return "\n".join(sections)


def _listed(fields: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    return cast("Sequence[Mapping[str, Any]]", fields.get(name, []))


def _part(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = fields.get(name)
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}
