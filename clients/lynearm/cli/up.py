"""`lynearm up` and `lynearm down`: the trace service on a Ray cluster."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import ConfigFile, Debug, Progress, ProgressMode, flags
from lynearm.cli.serve_flags import with_serve_flags

if TYPE_CHECKING:
    from lynearm.cli.progress import Reporter, Status
    from lynearm.fleet.fleet import Fleet, FleetStatus

WATCH_SECONDS = 2.0
"""Between two looks at the servers; each is one small call to each of them."""

OnRay = Annotated[bool, typer.Option("--ray", help="On the Ray cluster that this machine belongs to.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Ray, if not that of RAY_ADDRESS or this machine.",
        show_default="auto",
    ),
]


@with_serve_flags
@reported("the servers go on; `lynearm up --ray` finds them, `lynearm down --ray` takes them away")
def up(
    context: typer.Context,
    ray: OnRay = False,
    servers: Annotated[
        int | None, typer.Option(help="Trace servers, each on a node of its own.", show_default="1")
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(help="CPUs that each reserves of its node.", show_default="1.0")
    ] = None,
    ray_address: RayAddress = None,
    start_seconds: Annotated[
        float | None, typer.Option(help="Patience with servers that start.", show_default="120.0")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="End once they serve, instead of watching them.")
    ] = False,
    endpoints_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the list of endpoints in a file too.")
    ] = None,
    config: ConfigFile = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set any key of [serve] in the TOML file, flag or not. May be repeated.",
        ),
    ] = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
    **_: object,
) -> None:
    """Run trace servers on the nodes of a Ray cluster.

    Prints their endpoints, as `--service` takes them. Servers that run already are found, not started twice.
    They outlive this command, which watches them and replaces those whose node is lost; Ray itself starts
    again what dies. The flags of `lynearm serve` say what each server is; paths are those of its node.
    """
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.fleet.config import FleetConfig, check_storage
    from lynearm.traces.config import ServeConfig

    _expect_ray(ray, "add it, or use `lynearm serve` for a server on this machine")
    fleet_config = load_settings(FleetConfig, "up", file=config, flags=flags(context))
    serve_config = load_settings(
        ServeConfig, "serve", file=config, flags=flags(context), assignments=assignments or ()
    )
    check_storage(serve_config, fleet_config.servers)
    from lynearm.fleet.fleet import Fleet
    from lynearm.fleet.ray_cluster import connect

    with Reporter("up", progress, _describe) as report, ExitStack() as stack:
        teller = _Teller(report, sys.stdout, endpoints_file)
        # Ray prints what its nodes complain of to standard output, where programs read ours.
        stack.enter_context(redirect_stdout(sys.stderr))
        cluster = stack.enter_context(connect(fleet_config.ray_address))
        fleet = Fleet(cluster, fleet_config, serve_config, on_status=report)
        teller.tell(fleet.bring_up().endpoints)
        if not detach:
            _watch(fleet, teller)


@reported("servers that are left are taken away by the same command")
def down(
    ray: OnRay = False,
    ray_address: RayAddress = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Drain the trace servers on a Ray cluster, and take them away.

    What they acknowledged stays where catalog and blocks are.
    """
    from lynearm.cli.settings import load_settings
    from lynearm.fleet.config import FleetConfig

    _expect_ray(ray, "add it, or stop `lynearm serve` with Ctrl-C")
    settings = load_settings(FleetConfig, "up", file=config, flags={"ray_address": ray_address})
    from lynearm.fleet.fleet import take_down
    from lynearm.fleet.ray_cluster import connect

    with connect(settings.ray_address) as cluster:
        count = take_down(cluster)
    shown = f"{count} server{'s' if count > 1 else ''} drained and taken away" if count else "no server runs"
    typer.echo(shown, err=True)


def _expect_ray(ray: bool, otherwise: str) -> None:
    from lynearm.wire.errors import ConfigError

    if not ray:
        raise ConfigError("--ray is missing, and there is nothing else to place servers on", otherwise)


def _watch(fleet: Fleet, teller: _Teller) -> None:
    """Until the servers are taken down: show them, replace the lost ones, and tell where they are."""
    while (status := fleet.mend()).servers:
        teller.tell(status.endpoints)
        time.sleep(WATCH_SECONDS)
    typer.echo("somebody took the servers down", err=True)


class _Teller:
    """Says where the servers are, whenever that changes: to whoever reads standard output, and in a file."""

    def __init__(self, report: Reporter[FleetStatus], output: TextIO, file: Path | None) -> None:
        # With JSON, the events say it.
        self._output = output if report.for_people else None
        self._file = file
        self._told = ""

    def tell(self, endpoints: str) -> None:
        """Say it, unless it is what was said last."""
        if endpoints == self._told:
            return
        self._told = endpoints
        if self._output is not None:
            print(endpoints, file=self._output, flush=True)
        if self._file is not None:
            new_file = self._file.with_name(f".{self._file.name}.{os.getpid()}")
            new_file.write_text(endpoints + "\n", encoding="utf-8")
            new_file.replace(self._file)


def _describe(status: FleetStatus) -> Status | None:
    from lynearm.cli.progress import Status

    total = len(status.servers)
    if not total:
        return None
    facts = [f"{status.serving} of {total} servers at {status.endpoints}"]
    facts += [
        f"server {server.number} is {server.phase}" + (f" ({server.error})" if server.error else "")
        for server in status.servers
        if server.phase != "serving"
    ]
    if status.serving == total:
        return Status("serving", facts[0])
    return Status("waiting", "; ".join(facts), status.serving, total)
