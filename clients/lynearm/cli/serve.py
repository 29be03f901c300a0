"""`lynearm serve`: the trace service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import Assignments, ConfigFile, Debug, Progress, ProgressMode, flags

if TYPE_CHECKING:
    from lynearm.cli.progress import Status
    from lynearm.cli.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Ready:
    """The service accepts calls."""

    address: str
    """host:port."""
    data_dir: Path
    places: str
    """Where catalog and blocks are; without passwords."""


@reported()
def serve(
    context: typer.Context,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory of what is nowhere else; made when missing.", show_default="lynearm-data"
        ),
    ] = None,
    catalog: Annotated[
        str | None,
        typer.Option(
            metavar="URL|FILE",
            help="postgresql://…, for any number of servers, or a SQLite file; else in the data directory.",
            show_default=False,
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="URL|DIRECTORY",
            help="s3://bucket/prefix, gs://…, az://…, or a directory; else in the data directory.",
            show_default=False,
        ),
    ] = None,
    shared: Annotated[
        bool | None,
        typer.Option("--shared", help="Let other servers of this machine use the same SQLite file too."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(help="TCP port; 0 takes any free one.", show_default="7411")
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Listen beyond loopback, neither encrypted nor authenticated."),
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Run a trace service until Ctrl-C.

    It takes blocks from teachers, keeps them, and gives them to students.
    """
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.cli.traffic import watch_traffic
    from lynearm.traces.config import ServeConfig

    settings = load_settings(
        ServeConfig, "serve", file=config, flags=flags(context), assignments=assignments or ()
    )
    from lynearm.traces.server import run_server

    with Reporter("serve", progress, _describe) as report, watch_traffic(report) as watch:

        def on_ready(address: str) -> None:
            report(Ready(address, settings.data_dir, settings.places))
            # Programs follow streams, not the service: only people are shown its traffic.
            if report.for_people:
                watch(address)

        run_server(settings, on_ready)
    if report.for_people:
        typer.echo(
            f"stopped; all that was acknowledged is in {settings.places}, "
            "and the same command serves it again",
            err=True,
        )


def _describe(event: Ready | Traffic) -> Status:
    from lynearm.cli.progress import Status, count, size

    if isinstance(event, Ready):
        return Status("ready", f"trace service on {event.address}, data in {event.places}; Ctrl-C stops it")
    text = f"{event.streams} streams, {count(event.traces)} traces, {size(event.size_bytes)}"
    if event.tokens_per_second:
        text += f"; {count(event.tokens_per_second)} tokens/s, {size(event.bytes_per_second)}/s"
    return Status(f"serving {event.address}", text)
