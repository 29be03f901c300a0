"""`lynearm teach`: a teacher answers prompts into a stream."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import Interrupted, reported, this_command
from lynearm.cli.options import Assignments, ConfigFile, Debug, Progress, ProgressMode, Service, flags

if TYPE_CHECKING:
    from lynearm.teacher.progress import TeachReport

_SHOWN_LINES = 10
"""Of what was left out, before the rest is only counted."""


@reported("the same command goes on: prompts that the stream has are not asked again")
def teach(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="Teacher: a directory in the transformers layout, a model of the hub, a GGUF file."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of a model of the hub; else its main branch.")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            help="Terms under which the teacher may be distilled, SPDX or URL; else what its card says."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="JSON lines or Parquet: a file, a pattern or a directory; or hf:NAME?config=…&split=…",
        ),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field with a text, if not prompt.")
    ] = None,
    messages_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field with a chat, if not messages.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field with the prompt's id, if not id.")
    ] = None,
    tag_columns: Annotated[
        list[str] | None,
        typer.Option(
            "--tag-column",
            metavar="[TAG=]NAME",
            help="Field that becomes a tag of the traces, instead of those in tags. May be repeated.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="ROWS", help="Take the first rows only; 0 takes all.", show_default="0"),
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Refuse prompts with a bad line among them.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of chats that bring none.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Have the teacher think first, or not; only where its chat template has a switch for it.",
        ),
    ] = None,
    stream: Annotated[str | None, typer.Option(help="Stream that receives the traces.")] = None,
    service: Service = None,
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
    job: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the job; else a digest of its prompts."),
    ] = None,
    producer_id: Annotated[
        str | None, typer.Option(help="Stable name of this producer.", show_default="teacher")
    ] = None,
    seal: Annotated[
        bool | None, typer.Option("--seal/--no-seal", help="Seal the stream at the end.", show_default="seal")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Entries kept for each position.", show_default="64")
    ] = None,
    tail_draws: Annotated[
        int | None,
        typer.Option(help="Tokens drawn from the tail of each position, 0 to 16.", show_default="0"),
    ] = None,
    completions: Annotated[
        int | None, typer.Option(help="Completions for each prompt.", show_default="1")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Bound on a completion, tokens.", show_default="256")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the likeliest token.", show_default="1.0")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens with this mass.", show_default="1.0"),
    ] = None,
    sample_top_k: Annotated[
        int | None, typer.Option(help="Draw from this many likeliest tokens; 0 from all.", show_default="0")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Draw from tokens with this share of the likeliest's.", show_default="0.0"),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(help="Against tokens that the completion has already, -2 to 2.", show_default="0.0"),
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="The same for each time that it has them.", show_default="0.0")
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1: against tokens that prompt or completion have already.", show_default="1.0"
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text that ends a completion. May be repeated."),
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option("--stop-token-id", metavar="ID", help="Token that ends a completion. May be repeated."),
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option(help="No completion ends before so many tokens.", show_default="0")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the draws; the same seed draws the same.", show_default="0")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Engines; 0 for as many as the cluster has room for.", show_default="0"),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="GPUs for each engine.", show_default="1")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Bound on prompt plus completion, tokens.", show_default="2048")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Completions that an engine writes at once.", show_default="64")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="auto, float32, bfloat16 or float16.", show_default="auto"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of an engine; 0 for all.", show_default="0")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Ray to run on; else that of RAY_ADDRESS, or one of its own."),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(help="Judge answers: maths, regex:PATTERN, json-schema:FILE or python:MODULE:FUNCTION."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="What is published: all, correct or shortest-correct.", show_default="all"),
    ] = None,
    teachers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Several teachers, each for its part of the prompts."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="TEACHER", help="With --teachers: run this one, and seal nothing.")
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Let a teacher answer prompts into a stream.

    What it writes, and its distribution at each token, goes to the trace service, which it waits for. A
    run that was stopped goes on when the command is repeated. docs/teaching.md has examples.
    """
    if teachers is not None:
        _teach_several(teachers, only or "", context, assignments or (), progress)
        return
    if only is not None:
        from lynearm.wire.errors import ConfigError

        raise ConfigError("--only goes with --teachers", "name a job file with several teachers")
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.cli.teach_progress import describe
    from lynearm.teacher.config import TeachConfig

    settings = load_settings(
        TeachConfig, "teach", file=config, flags=flags(context), assignments=assignments or ()
    )
    from lynearm.teacher.job import run_teach

    # Ray prints complaints of its daemons to its driver's standard output, which is for results.
    with Reporter("teach", progress, describe) as report, redirect_stdout(sys.stderr):
        outcome = run_teach(settings, report)
        report.conclude(outcome)
    for line in _left_out(outcome):
        typer.echo(line, err=True)
    if report.for_people:
        typer.echo(_summary(outcome))
    if outcome.interrupted:
        raise Interrupted(f"go on with `{this_command()}`")


def _teach_several(
    job: Path, only: str, context: typer.Context, assignments: Sequence[str], progress: ProgressMode
) -> None:
    from lynearm.cli.progress import Reporter, Status
    from lynearm.cli.teach_job import load_job
    from lynearm.cli.teach_progress import describe

    with Reporter("teach", progress, describe) as report, redirect_stdout(sys.stderr):
        report.announce(Status("reading", f"prompts and tokenizers of {job}"))
        configs = load_job(job, flags(context), assignments)
        from lynearm.teacher.run_several import TeachersFailedError, run_several

        failure: TeachersFailedError | None = None
        try:
            outcomes = run_several(configs, report, only=only)
        except TeachersFailedError as error:
            outcomes, failure = error.reports, error
        for outcome in outcomes.values():
            report.conclude(outcome)
    for name, outcome in outcomes.items():
        for line in _left_out(outcome):
            typer.echo(line, err=True)
        if report.for_people:
            typer.echo(f"teacher {name}: {_summary(outcome)}")
    if failure is not None:
        raise failure
    if any(outcome.interrupted for outcome in outcomes.values()):
        raise Interrupted(f"go on with `{this_command()}`")


def _left_out(report: TeachReport) -> list[str]:
    skipped = [f"skipped {bad}" for bad in report.skipped[:_SHOWN_LINES]]
    failed = [f"failed {prompt}" for prompt in report.failed[:_SHOWN_LINES]]
    rests = {"skipped": len(report.skipped) - len(skipped), "failed": report.failed_prompts - len(failed)}
    return [*skipped, *failed, *(f"{what} {rest} more" for what, rest in rests.items() if rest > 0)]


def _summary(report: TeachReport) -> str:
    from lynearm.cli.progress import duration, size
    from lynearm.cli.teach_progress import verdict_counts

    generating = report.stage_seconds.get("generating", 0.0)
    tokens = report.generated_tokens if report.shares_stream else report.completion_tokens
    rate = f", {tokens / generating:.0f} tokens/s" if generating else ""
    bits = f", {report.size_bytes * 8 / tokens:.0f} bits/token" if tokens else ""
    growth = "" if report.shares_stream else f"; {report.blocks} blocks, {size(report.size_bytes)}{bits}"
    already = f" ({report.finished_before} were there before)" if report.finished_before else ""
    failed = f", {report.failed_prompts} failed" if report.failed_prompts else ""
    verdicts = f"; {verdict_counts(report.verdicts)}" if report.verdicts else ""
    unpublished = f" ({report.left_out} not published)" if report.left_out else ""
    return (
        f"stream {report.stream}: {report.completed} of {report.prompts} prompts finished{already}{failed}, "
        f"{tokens:,} tokens in {duration(report.seconds)}{rate}{growth}{verdicts}{unpublished}; "
        f"{'sealed' if report.sealed else 'open'}"
    )
