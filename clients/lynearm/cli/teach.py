"""`lynearm teach`: a teacher answers a file of prompts into a stream."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import Interrupted, reported, this_command
from lynearm.cli.options import Assignments, ConfigFile, Debug, Progress, ProgressMode, Service, flags

if TYPE_CHECKING:
    from lynearm.cli.progress import Status
    from lynearm.teacher.job import TeachProgress, TeachReport

_SHOWN_BAD_LINES = 10

_STAGES = {"starting": "Ray", "loading": "the model into vLLM", "sealing": "the stream"}
"""What a stage without a message of its own is about."""


@reported("the same command goes on: prompts that the stream has are not asked again")
def teach(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Teacher: a directory in the transformers layout, or a name for vLLM.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines with `prompt` or `messages`, and optional `id` and `tags`."),
    ] = None,
    stream: Annotated[str | None, typer.Option(help="Stream that receives the traces.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Terms under which the teacher may be distilled, SPDX or URL.")
    ] = None,
    service: Service = None,
    top_k: Annotated[
        int | None, typer.Option(help="Entries kept for each position.", show_default="64")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Bound on a completion, tokens.", show_default="256")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Bound on prompt plus completion, tokens.", show_default="2048")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Completions written at once.", show_default="64")
    ] = None,
    completions: Annotated[
        int | None, typer.Option(help="Completions for each prompt.", show_default="1")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the likeliest token.", show_default="1.0")
    ] = None,
    capture: Annotated[
        str | None,
        typer.Option(
            metavar="hidden:layers=…[,dtype=bf16|fp8]",
            help="Hidden states that traces carry, such as hidden:layers=4,8,-1,norm.",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[
        str | None,
        typer.Option(
            metavar="layers[:every=8]",
            help="Measure each layer, for `lynearm teacher profile`.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the engine; 0 for all.", show_default="0")
    ] = None,
    producer_id: Annotated[
        str | None, typer.Option(help="Stable name of this producer.", show_default="teacher")
    ] = None,
    seal: Annotated[
        bool | None, typer.Option("--seal/--no-seal", help="Seal the stream at the end.", show_default="seal")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Refuse a prompt file with a bad line.")
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Let a teacher answer prompts into a stream.

    What it writes, and its distribution at each token, goes to the trace service, which it waits for. A
    run that was stopped goes on when the command is repeated.
    """
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.teacher.config import TeachConfig

    settings = load_settings(
        TeachConfig, "teach", file=config, flags=flags(context), assignments=assignments or ()
    )
    from lynearm.teacher.job import run_teach

    # Ray prints complaints of its daemons to its driver's standard output, which is for results.
    with Reporter("teach", progress, describe) as report, redirect_stdout(sys.stderr):
        outcome = run_teach(settings, report)
        report.conclude(outcome)
    for line in _skipped(outcome):
        typer.echo(line, err=True)
    if report.for_people:
        typer.echo(_summary(outcome))
    if outcome.interrupted:
        raise Interrupted(f"go on with `{this_command()}`")


def describe(event: TeachProgress) -> Status | None:
    """What a moment of a teaching job means to a person."""
    from lynearm.cli.progress import Status, count

    if event.stage == "done":
        return None
    if event.stage != "generating":
        text = event.message or _STAGES.get(event.stage, "")
        return Status(event.stage, text, event.done_prompts, event.prompts or None)
    facts = [
        f"{event.done_prompts}/{event.prompts} prompts",
        f"{count(event.tokens_per_second)} tokens/s",
        f"{count(event.generated_tokens)} tokens",
        f"{event.acked_blocks} blocks durable",
    ]
    if event.skipped_prompts:
        facts.append(f"{event.skipped_prompts} skipped")
    if event.restarts:
        facts.append(f"{event.restarts} restarts")
    if event.message:
        facts.insert(0, event.message)
    return Status(event.stage, ", ".join(facts), event.done_prompts, event.prompts or None)


def _skipped(report: TeachReport) -> list[str]:
    lines = [f"skipped {bad.file}:{bad.line}: {bad.reason}" for bad in report.skipped[:_SHOWN_BAD_LINES]]
    rest = len(report.skipped) - len(lines)
    return [*lines, f"skipped {rest} more"] if rest else lines


def _summary(report: TeachReport) -> str:
    from lynearm.cli.progress import duration, size

    generating = report.stage_seconds.get("generating", 0.0)
    rate = f", {report.completion_tokens / generating:.0f} tokens/s" if generating else ""
    bits = (
        f", {report.size_bytes * 8 / report.completion_tokens:.0f} bits/token"
        if report.completion_tokens
        else ""
    )
    already = f" ({report.finished_before} were there before)" if report.finished_before else ""
    return (
        f"stream {report.stream}: {report.completed} of {report.prompts} prompts finished{already}, "
        f"{report.completion_tokens:,} tokens in {duration(report.seconds)}{rate}; "
        f"{report.blocks} blocks, {size(report.size_bytes)}{bits}; {'sealed' if report.sealed else 'open'}"
    )
