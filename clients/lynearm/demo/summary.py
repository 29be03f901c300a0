"""The demo's table, as a person sees it in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lynearm.demo.report_data import DemoReport

_SHOWN_CHARACTERS = 600


def print_summary(report: DemoReport, console: Console, out: Path) -> None:
    """Print a sample of the student, the table, and where everything lies."""
    for sample in report.samples:
        text = Text.assemble(
            (f"{sample.prompt}\n\n", "bold"),
            ("student  ", "cyan"),
            f"{_shorten(sample.student_text)}\n",
            ("teacher  ", "cyan"),
            _shorten(sample.teacher_text),
        )
        console.print(Panel(text, title=f"the {report.sampled_from} speaks", title_align="left"))
    console.print(_figures(report))
    if report.exports:
        console.print(_exports(report))
    if any("not run on Apple" in row.checked_with for row in report.exports):
        console.print("Core ML: computed by an interpreter of the saved program, not on Apple hardware.\n")
    console.print(_stages(report))
    console.print(f"Everything is in {out}; the training curve in {out / 'report.html'}", soft_wrap=True)


def _figures(report: DemoReport) -> Table:
    table = Table(title="What was distilled", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "held-out KL before, nats per token": _kl(report.held_out_before),
        "held-out KL after": _kl(report.held_out_after),
        "teacher tokens used": f"{report.teacher_tokens:,}",
        f"bits per token on the wire, top {report.top_k}": f"{report.bits_per_token:.0f}",
        **{name[:1].lower() + name[1:]: fact for name, fact in report.facts.items()},
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _exports(report: DemoReport) -> Table:
    table = Table(title="Packages, compared with the trained student in float32", title_justify="left")
    for heading in ("package", "size", "mean KL", "max |Δlogit|", "greedy tokens equal"):
        table.add_column(heading, justify="left" if heading == "package" else "right")
    for row in report.exports:
        table.add_row(
            row.name,
            f"{row.size_bytes / 1e6:.0f} MB",
            f"{row.kl_mean:.2g}",
            f"{row.max_abs_logit_difference:.2g}",
            f"{row.greedy_matched}/{row.greedy_total}",
        )
    return table


def _stages(report: DemoReport) -> Table:
    table = Table(title=f"Where the time went: {report.seconds:.0f} s in all", title_justify="left")
    for heading in ("stage", "from, s", "to, s", "took, s"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in sorted(report.stages, key=lambda one: one.start_seconds):
        took = stage.end_seconds - stage.start_seconds
        table.add_row(stage.name, f"{stage.start_seconds:.0f}", f"{stage.end_seconds:.0f}", f"{took:.0f}")
    return table


def _kl(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _shorten(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
