"""`lynearm streams`: look at what a trace service holds, follow it, write it to a file, delete it."""

from __future__ import annotations

import dataclasses
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import EXIT_FAILED, reported
from lynearm.cli.options import (
    AsJson,
    Debug,
    Progress,
    ProgressMode,
    ServiceOnly,
    make_app,
    service_address,
)

if TYPE_CHECKING:
    from lynearm.cli.progress import Status
    from lynearm.interchange import ExportProgress

streams_app = make_app("List, show, follow, export, retain and delete streams of traces.")


class ExportFormat(StrEnum):
    """What a stream can be written as."""

    parquet = "parquet"


_Name = Annotated[str, typer.Argument(metavar="STREAM", help="Name of the stream.")]


@streams_app.command("list")
@reported()
def list_streams(service: ServiceOnly = None, json: AsJson = False, debug: Debug = False) -> None:
    """List streams with size, teacher and licence."""
    from lynearm.cli.stream_views import print_json, stream_fields, stream_table
    from lynearm.client import TraceClient

    with TraceClient(service_address(service)) as client:
        streams = client.list_streams()
    if json:
        for stream in streams:
            print_json(stream_fields(stream))
    elif streams:
        from rich.console import Console

        console = Console()
        console.print(stream_table(streams, console.width))
    else:
        typer.echo(f"no streams at {client.target}; `lynearm teach` makes one", err=True)


@streams_app.command("show")
@reported()
def show_stream(
    stream: _Name, service: ServiceOnly = None, json: AsJson = False, debug: Debug = False
) -> None:
    """Show everything about one stream."""
    from lynearm.cli.stream_views import print_json, stream_details, stream_fields
    from lynearm.client import TraceClient

    with TraceClient(service_address(service)) as client:
        info = client.get_stream(stream)
    if json:
        print_json(stream_fields(info))
    else:
        from rich.console import Console

        Console().print(stream_details(info))


@streams_app.command("tail")
@reported()
def tail_stream(
    stream: _Name,
    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="OFFSET|start|live",
            help="First block: its offset, the start of the stream, or whatever comes from now on.",
        ),
    ] = "live",
    follow: Annotated[
        bool, typer.Option(help="Wait for more until the stream is sealed, or end where it ends now.")
    ] = True,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="End after so many traces.", show_default=False)
    ] = None,
    service: ServiceOnly = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print traces as they arrive.

    For each: prompt id, block, tokens, mean logprob of the sampled tokens, tags and text.
    """
    from lynearm.cli.tail import Tail, parse_start
    from lynearm.client import TraceClient

    first = parse_start(start)
    with TraceClient(service_address(service)) as client:
        tail = Tail(client, stream, as_json=json)
        tail.run(first, follow=follow, limit=count if count is not None else math.inf)
    typer.echo(tail.summary(), err=True)


@streams_app.command("export")
@reported("no file was written; the same command begins again")
def export_stream(
    stream: _Name,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write; there whole or not at all.")],
    format: Annotated[ExportFormat, typer.Option(help="How to write.")] = ExportFormat.parquet,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    service: ServiceOnly = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Write a stream's traces to a file.

    Those that it has now, one row a trace, with the stream's spec in the metadata. pandas, polars and Hugging
    Face datasets read it; `lynearm import` brings it back.
    """
    from lynearm.cli.progress import Reporter, count, duration, size
    from lynearm.client import TraceClient
    from lynearm.interchange.exporting import export_parquet

    with (
        TraceClient(service_address(service)) as client,
        Reporter("export", progress, describe_export) as report,
    ):
        made = export_parquet(client, stream, out, overwrite=overwrite, on_progress=report)
        report.conclude(made)
    if report.for_people:
        typer.echo(
            f"{made.path}: {made.traces:,} traces, {count(made.tokens)} tokens, {size(made.size_bytes)} in "
            f"{duration(made.seconds)}; stream {made.stream} up to offset {made.next_offset}"
        )


def describe_export(event: ExportProgress) -> Status:
    """What a moment of an export to a file means to a person."""
    from lynearm.cli.progress import Status, count, size

    text = f"{count(event.traces)} traces, {count(event.tokens)} tokens, {size(event.size_bytes)} of blocks"
    return Status("exporting", text, event.traces, event.total_traces or None)


@streams_app.command("retain")
@reported()
def retain_blocks(
    stream: _Name,
    max_age: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Let blocks go that are older: 12h, 7d.", show_default=False),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Let the oldest go beyond this: 500GB, 2TB.", show_default=False),
    ] = None,
    read_by: Annotated[
        list[str] | None,
        typer.Option(metavar="CONSUMER", help="Let blocks go that all these consumers have read."),
    ] = None,
    service: ServiceOnly = None,
    debug: Debug = False,
) -> None:
    """Say how long a stream keeps its blocks.

    A block goes when one of the bounds says so. This takes the place of what was said before: without any
    bound, blocks never go.
    """
    from lynearm.cli.quantities import parse_bytes, parse_seconds
    from lynearm.cli.stream_views import describe_retention
    from lynearm.client import Retention, TraceClient

    retention = Retention(
        parse_seconds(max_age) if max_age else 0,
        parse_bytes(max_bytes) if max_bytes else 0,
        tuple(read_by or ()),
    )
    with TraceClient(service_address(service)) as client:
        info = client.set_retention(stream, retention)
    typer.echo(f"stream {stream}: {describe_retention(info.retention)}", err=True)


@streams_app.command("collect")
@reported()
def collect_garbage(service: ServiceOnly = None, json: AsJson = False, debug: Debug = False) -> None:
    """Free now what need not be kept.

    The service does it by itself too, every minute unless told otherwise.
    """
    from lynearm.cli.progress import size
    from lynearm.cli.stream_views import print_json
    from lynearm.client import TraceClient

    with TraceClient(service_address(service)) as client:
        collected = client.collect_garbage()
    if json:
        print_json(dataclasses.asdict(collected))
    else:
        typer.echo(
            f"{collected.expired_blocks:,} blocks of {size(collected.expired_bytes)} expired, "
            f"{collected.orphan_objects:,} objects that were never committed"
        )


@streams_app.command("delete")
@reported()
def delete_stream(
    stream: _Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    service: ServiceOnly = None,
    debug: Debug = False,
) -> None:
    """Delete a stream with all its traces."""
    from lynearm.cli.progress import count, size
    from lynearm.client import TraceClient

    with TraceClient(service_address(service)) as client:
        info = client.get_stream(stream)
        what = f"stream {stream}: {count(info.trace_count)} traces, {size(info.size_bytes)}"
        if not yes and not typer.confirm(f"delete {what}? It cannot be undone."):
            typer.echo("nothing was deleted", err=True)
            raise typer.Exit(EXIT_FAILED)
        client.delete_stream(stream)
    typer.echo(f"deleted {what}", err=True)
