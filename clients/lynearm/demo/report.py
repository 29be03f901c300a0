"""The demo's report: one HTML page; see `lynearm.report.page` for its frame and what it promises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path

from lynearm.demo.report_data import (
    DemoReport,
    ExportRow,
    HeldOutPoint,
    StageTiming,
    TextSample,
    TrainPoint,
)
from lynearm.report.charts import Chart, Series, linear_ticks, smooth
from lynearm.report.page import chart_cards, facts_card, render_page, tiles, write_page

__all__ = [
    "DemoReport",
    "ExportRow",
    "HeldOutPoint",
    "StageTiming",
    "TextSample",
    "TrainPoint",
    "format_bytes",
    "format_seconds",
    "format_small",
    "render_report",
    "write_report",
]

MAX_TEXT_CHARACTERS = 1500
"""Of one text in a sample; the rest is cut off."""

MAX_SAMPLES = 6

MAX_MEASUREMENTS = 100
"""Shown as numbers: the latest."""

_TOKENS_LABEL = "completion tokens trained on"
_TIMES, _MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def write_report(path: Path, report: DemoReport) -> None:
    """Writes the report; a reader sees the old file or the new one, never a part.

    Args:
        path: The HTML file; its folder is made if absent.
        report: What to tell.

    Raises:
        StorageError: if the file cannot be written.
    """
    write_page(path, render_report(report))


def render_report(report: DemoReport) -> str:
    """The whole page: about 20 KB for a demo, and bounded for any run."""
    sections = [
        _header(report),
        _tiles(report),
        _charts(report),
        _stages(report),
        _exports(report),
        _samples(report),
        _facts(report),
    ]
    return render_page(report.title, sections)


def format_seconds(seconds: float) -> str:
    """For example "0.8 s", "42 s" or "6 min 12 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def format_bytes(size_bytes: int) -> str:
    """In decimal units, for example "76.3 MB"."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size_bytes >= factor:
            return (
                f"{size_bytes / factor:.3g} {unit}"
                if size_bytes < 999.5 * factor
                else f"{size_bytes / factor:.0f} {unit}"
            )
    return f"{size_bytes} B"


def format_small(value: float) -> str:
    """Three digits, as a power of ten below a thousandth: "0.512", "3.1 × 10⁻⁵"."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} {_TIMES} 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def _header(report: DemoReport) -> str:
    told = [f"{report.teacher} taught {report.student}"]
    before, after = report.held_out_before, report.held_out_after
    if before is not None and after is not None and before > 0 and len(report.held_out) > 1:
        change = 100 * (after / before - 1)
        told.append(
            f"On prompts that it never trained on, the student's distance to the teacher went from "
            f"{before:.3f} to {after:.3f} nats per token ({change:+.0f} %)".replace("-", _MINUS)
        )
    return f'<h1>{escape(report.title)}</h1>\n<p class="lead">{escape(". ".join(told))}.</p>'


def _tiles(report: DemoReport) -> str:
    before, after = report.held_out_before, report.held_out_after
    kl = "not measured" if before is None or after is None else f"{before:.3f} → {after:.3f}"
    wire = f"{report.bits_per_token:,.0f}" if report.teacher_tokens else "not measured"
    ends = {
        "Held-out KL": (kl, "nats per token, before → after"),
        "Teacher tokens": (f"{report.teacher_tokens:,}", "written and sent by the teacher"),
        "Bits per token": (wire, f"on the wire, top {report.top_k} and tail included"),
        "Total time": (
            format_seconds(report.seconds) if report.stages else "not measured",
            "set-up not included",
        ),
    }
    return tiles(ends)


def _charts(report: DemoReport) -> str:
    held_out = tuple((float(point.tokens), point.kl) for point in report.held_out)
    raw = tuple((float(point.tokens), point.loss) for point in report.curve)
    window = max(3, len(raw) // 15)
    before = report.held_out_before
    kl_chart = Chart(
        "Held-out KL to the teacher",
        _TOKENS_LABEL,
        "nats per token",
        (Series("held-out KL", held_out, "dotted_line"),),
        (before / 2, "half of the start") if before else None,
    )
    loss_chart = Chart(
        "Training loss",
        _TOKENS_LABEL,
        "nats per token",
        (Series("each step", raw, "faint"), Series(f"mean of {window} steps", smooth(raw, window))),
    )
    return f"<h2>Training</h2>\n{chart_cards((kl_chart, loss_chart))}\n{_measurements(report)}"


def _measurements(report: DemoReport) -> str:
    if not report.held_out:
        return ""
    rows = "".join(
        f'<tr><td class="number">{point.step}</td><td class="number">{point.tokens:,}</td>'
        f'<td class="number">{format_small(point.kl)}</td></tr>'
        for point in report.held_out[-MAX_MEASUREMENTS:]
    )
    head = "".join(f'<th class="number">{one}</th>' for one in ("step", "tokens", "held-out KL"))
    table = f"<table><tr>{head}</tr>{rows}</table>"
    return f"<details><summary>Held-out measurements as numbers</summary>{table}</details>"


def _stages(report: DemoReport) -> str:
    if not report.stages:
        return ""
    begin, total = min(one.start_seconds for one in report.stages), report.seconds or 1.0
    rows: list[str] = []
    for stage in report.stages:
        left = 100 * (stage.start_seconds - begin) / total
        width = 100 * (stage.end_seconds - stage.start_seconds) / total
        bar = f'<span class="bar" style="left:{left:.2f}%;width:{width:.2f}%"></span>'
        took = format_seconds(stage.end_seconds - stage.start_seconds)
        rows.append(
            f'<div class="stage"><span>{escape(stage.name)}</span><span class="track">{bar}</span>'
            f'<span class="time">{took}</span></div>'
        )
    ticks = "".join(
        f'<span style="left:{100 * tick / total:.2f}%">{escape(_clock(tick))}</span>'
        for tick in _time_ticks(total)
    )
    note = '<p class="note">Bars that overlap ran at the same time.</p>'
    grid = (
        f'<div class="card"><div class="stages">{"".join(rows)}<div class="scale">{ticks}</div></div></div>'
    )
    return f"<h2>Stages</h2>\n{grid}{note}"


def _time_ticks(total_seconds: float) -> list[float]:
    if total_seconds < 90:
        return linear_ticks(0.0, total_seconds, 4)
    return [60 * minute for minute in linear_ticks(0.0, total_seconds / 60, 6)]


def _clock(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"


def _exports(report: DemoReport) -> str:
    if not report.exports:
        return ""
    columns = ("Package", "Size", "Mean KL", "Max logit difference", "Greedy tokens equal")
    head = "".join(
        f'<th class="number">{one}</th>' if index else f"<th>{one}</th>" for index, one in enumerate(columns)
    )
    rows = "".join(_export_row(columns, one) for one in report.exports)
    note = (
        '<p class="note">Each package was loaded again after it was written and compared with the trained '
        "student in float32 on held-out text. KL in nats per position.</p>"
    )
    table = f'<table class="cards"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<h2>Exports</h2>\n<div class="card">{table}</div>{note}'


def _export_row(columns: tuple[str, ...], one: ExportRow) -> str:
    below = "".join(f"<small>{escape(text)}</small>" for text in (one.path, one.checked_with) if text)
    values = (
        format_bytes(one.size_bytes),
        format_small(one.kl_mean),
        format_small(one.max_abs_logit_difference),
        f"{one.greedy_matched} of {one.greedy_total}",
    )
    cells = "".join(
        f'<td class="number" data-label="{column}">{escape(value)}</td>'
        for column, value in zip(columns[1:], values, strict=True)
    )
    return f"<tr><td>{escape(one.name)}{below}</td>{cells}</tr>"


def _samples(report: DemoReport) -> str:
    if not report.samples:
        return ""
    cards = "".join(_sample(report, one) for one in report.samples[:MAX_SAMPLES])
    return f"<h2>What they write</h2>\n{cards}"


def _sample(report: DemoReport, one: TextSample) -> str:
    teacher = _quote("teacher", "Teacher", one.teacher_text) if one.teacher_text else ""
    student = _quote("student", report.sampled_from[:1].upper() + report.sampled_from[1:], one.student_text)
    return f'<div class="card sample"><h3>{_cut(one.prompt)}</h3>{teacher}{student}</div>'


def _quote(kind: str, who: str, text: str) -> str:
    shown = _cut(text.strip()) or "(nothing)"
    return (
        f'<figure class="{kind}"><figcaption>{escape(who)}</figcaption><pre dir="auto">{shown}</pre></figure>'
    )


def _cut(text: str) -> str:
    return escape(text if len(text) <= MAX_TEXT_CHARACTERS else text[:MAX_TEXT_CHARACTERS] + " …")


def _facts(report: DemoReport) -> str:
    machine = {"Machine": report.machine} if report.machine else {}
    everything: Mapping[str, str] = {**report.facts, **machine, **report.versions}
    if not everything:
        return ""
    return f"<h2>Run, machine and versions</h2>\n{facts_card(everything)}"
