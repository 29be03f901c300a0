"""`lynearm serve`: the trace service."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import Assignments, ConfigFile, Debug, Progress, ProgressMode, flags

if TYPE_CHECKING:
    from lynearm.cli.progress import Status
    from lynearm.cli.traffic import Traffic


class LogFormat(StrEnum):
    """How the log is written."""

    text = "text"
    json = "json"


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
        typer.Option("--insecure", help="Listen beyond loopback without TLS or without tokens."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain, PEM; turns TLS on. Replaced files take effect.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of the certificate, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Authorities of clients, PEM; clients then need a certificate.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="File of tokens, from `lynearm tokens new`; calls then need one of them."),
    ] = None,
    max_connections: Annotated[
        int | None, typer.Option(help="Connections at a time.", show_default="4096")
    ] = None,
    max_calls_per_caller: Annotated[
        int | None, typer.Option(help="Calls at a time of one token or address.", show_default="512")
    ] = None,
    requests_per_second: Annotated[
        float | None,
        typer.Option(help="Calls that one token or address may begin; 0: any.", show_default="0.0"),
    ] = None,
    publish_bytes_per_second: Annotated[
        float | None,
        typer.Option(help="Bytes that one token or address may publish; 0: any.", show_default="0.0"),
    ] = None,
    max_streams: Annotated[
        int | None, typer.Option(help="Streams that may exist.", show_default="10000")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="TCP port of Prometheus metrics.")] = None,
    metrics_host: Annotated[
        str | None, typer.Option(help="Address of that port.", show_default="127.0.0.1")
    ] = None,
    reflection: Annotated[
        bool | None, typer.Option("--reflection", help="Let tools such as grpcurl list methods and messages.")
    ] = None,
    log_format: Annotated[
        LogFormat | None, typer.Option(help="text or json, on standard error.", show_default="text")
    ] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(help="Time that calls get to end at a stop.", show_default="10.0")
    ] = None,
    min_free_bytes: Annotated[
        int | None,
        typer.Option(help="Refuse blocks that leave fewer bytes free on the disk.", show_default="268435456"),
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
    from lynearm.traces.logs import redact_logs
    from lynearm.traces.server import run_server

    redact_logs(settings.log_format, debug=debug)
    # It watches over a connection of its own, for which it has neither token nor authority.
    is_open = settings.tls_cert is None and settings.tokens is None
    with Reporter("serve", progress, _describe) as report, watch_traffic(report) as watch:

        def on_ready(address: str) -> None:
            report(Ready(address, settings.data_dir, settings.places))
            # Programs follow streams, not the service: only people are shown its traffic.
            if report.for_people and is_open:
                watch(address)

        run_server(settings, on_ready)
    if report.for_people and settings.log_format == "text":
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
