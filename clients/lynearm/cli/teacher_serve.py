"""`lynearm teacher serve`: a teacher that scores and answers, without a stream."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import Assignments, ConfigFile, Debug, Progress, ProgressMode, flags

if TYPE_CHECKING:
    from lynearm.cli.progress import Status


@dataclass(frozen=True, slots=True)
class Ready:
    """The teacher answers."""

    address: str
    """host:port."""
    model: str


@reported()
def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Directory of the model, or its name on the hub.", show_default=False)
    ] = None,
    bind: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where to listen; port 0 takes any free one.",
            show_default="127.0.0.1:7412",
        ),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Listen beyond loopback without TLS or without tokens."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM; turns TLS on.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of the certificate, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Authorities of clients, PEM; clients then need a certificate.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Tokens, one a line; calls then need one, as a client's --token-file holds it.",
        ),
    ] = None,
    license: Annotated[  # the name of the field
        str | None, typer.Option(help="Terms under which the teacher may be distilled.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Most entries of a row that clients may ask for.", show_default="256")
    ] = None,
    max_chosen_ids: Annotated[
        int | None, typer.Option(help="Most ids that a student may choose per position.", show_default="256")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt plus completion, tokens.", show_default="2048")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Sequences at work at once.", show_default="64")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the engine; 0 for all.", show_default="0")
    ] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(help="Time that calls get to end at a stop.", show_default="30.0")
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Answer by gRPC until Ctrl-C: score what students write, and write.

    Students come with `lynearm.client.TeacherClient`.
    """
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.teacher.serving_config import ServeTeacherConfig

    settings = load_settings(
        ServeTeacherConfig, "teacher.serve", file=config, flags=flags(context), assignments=assignments or ()
    )
    from lynearm.teacher.teacher_server import run_teacher_server

    # vLLM may print to standard output, which is for results.
    with Reporter("teacher serve", progress, _describe) as report, redirect_stdout(sys.stderr):

        def on_ready(address: str) -> None:
            report(Ready(address, settings.model_name or settings.model))

        run_teacher_server(settings, on_ready)


def _describe(event: Ready) -> Status:
    from lynearm.cli.progress import Status

    return Status("ready", f"teacher {event.model} on {event.address}; Ctrl-C stops it")
