"""`lynearm import`: files of traces become blocks of a stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import Interrupted, reported, this_command
from lynearm.cli.options import Debug, Progress, ProgressMode, ServiceOnly, flags

if TYPE_CHECKING:
    from lynearm.cli.progress import Status
    from lynearm.interchange import ImportProgress, ImportReport

_SHOWN_FAILURES = 10


@reported("the same command goes on: prompts that the stream has are not imported again")
def import_files(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Parquet, or JSONL of an OpenAI-compatible server."),
    ],
    stream: Annotated[
        str | None,
        typer.Option(
            help="Stream that receives the traces; else the one that the Parquet file was exported from.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="parquet|openai-jsonl",
            help="Of all files; else each one's suffix tells.",
            show_default=False,
        ),
    ] = None,
    service: ServiceOnly = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR|NAME", help="Of the teacher, for transformers.", show_default=False),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Terms under which the teacher may be distilled, SPDX or URL.")
    ] = None,
    teacher_model: Annotated[
        str | None, typer.Option(help="Name of the teacher; else what the responses say.")
    ] = None,
    teacher_revision: Annotated[
        str | None, typer.Option(help="Its hub commit, or sha256: and the digest of its weights.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Width of its logits.", show_default="as beside the tokenizer")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Its context, tokens.", show_default="as beside the tokenizer")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Program and version that computed the logprobs.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the forward pass, for example bfloat16.")] = None,
    logprobs_mode: Annotated[
        str | None, typer.Option(metavar="raw|processed", help="Before or after sampling filters.")
    ] = None,
    logprobs_temperature: Annotated[
        float | None, typer.Option(help="Applied before the logprobs were taken.", show_default="1.0")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(metavar="standard|exact", help="Encoding of a new stream.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Entries kept per position; JSONL that has more is cut to the likeliest."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="How the completions of JSONL were drawn.", show_default="1.0")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="As --temperature.", show_default="1.0")] = None,
    producer_id: Annotated[
        str | None, typer.Option(help="Stable name of this producer.", show_default="import-0")
    ] = None,
    seal: Annotated[bool | None, typer.Option("--seal", help="Seal the stream at the end.")] = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Bring traces from files into a stream.

    Parquet is what `lynearm streams export` writes, or pandas, polars and datasets after it. JSONL holds the
    responses of vLLM's OpenAI server or its batch runner. A run that was stopped goes on when the command is
    repeated. Flags about the teacher say what the files do not.
    """
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.interchange import ImportConfig

    settings = load_settings(ImportConfig, "import", flags=flags(context))
    from lynearm.interchange import importing

    with Reporter("import", progress, describe_import) as report:
        outcome = importing.import_files(settings, report)
        report.conclude(outcome)
    for line in _failures(outcome):
        typer.echo(line, err=True)
    if report.for_people:
        typer.echo(_summary(outcome))
    if outcome.interrupted:
        raise Interrupted(f"go on with `{this_command()}`")


def describe_import(event: ImportProgress) -> Status:
    """What a moment of an import means to a person."""
    from lynearm.cli.progress import Status, count, size

    facts = [
        f"{count(event.traces)} traces",
        f"{count(event.tokens)} tokens",
        f"{size(event.read_bytes)} of {size(event.total_bytes)}",
    ]
    if event.skipped_traces:
        facts.append(f"{count(event.skipped_traces)} skipped")
    if event.waiting_reason:
        facts.insert(0, event.waiting_reason)
    if event.stage != "importing":
        return Status(event.stage, "the files" if event.stage == "checking" else "the stream")
    return Status(event.stage, ", ".join(facts), event.read_bytes, event.total_bytes or None)


def _failures(report: ImportReport) -> list[str]:
    lines = [f"skipped {failed.where}: {failed.reason}" for failed in report.failed[:_SHOWN_FAILURES]]
    rest = report.failed_requests - len(lines)
    return [*lines, f"skipped {rest} more failed requests"] if rest else lines


def _summary(report: ImportReport) -> str:
    from lynearm.cli.progress import duration, size

    skipped = (
        f"; skipped {report.skipped_prompts:,} prompts, {report.skipped_traces:,} traces, that it had already"
        if report.skipped_prompts
        else ""
    )
    failed = f"; {report.failed_requests:,} failed requests" if report.failed_requests else ""
    return (
        f"stream {report.stream}: {report.traces:,} traces of {report.prompts:,} prompts imported, "
        f"{report.tokens:,} tokens in {duration(report.seconds)}; {report.blocks:,} blocks, "
        f"{size(report.size_bytes)}{skipped}{failed}; {'sealed' if report.sealed else 'open'}"
    )
