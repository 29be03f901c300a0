"""`lynearm teacher profile`: what a job measured inside its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import AsJson, Debug, ServiceOnly, service_address


@reported()
def profile(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Name of the stream.")],
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw it too, as SVG.", show_default=False),
    ] = None,
    service: ServiceOnly = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what each layer of a stream's teacher does.

    Block influence (0: the layer changes nothing), what its attention heads add, and how active its neurons
    are: means over the completion positions that `lynearm teach --stats layers` looked at.
    """
    from lynearm.cli.profile_views import draw_profile, profile_fields, profile_table
    from lynearm.cli.stream_views import print_json
    from lynearm.client import TraceClient
    from lynearm.client.profiles import read_profile
    from lynearm.wire.errors import InvalidInputError

    with TraceClient(service_address(service)) as client:
        found = read_profile(client, stream)
    if found is None:
        raise InvalidInputError(
            f"stream {stream!r} has no teacher profile", "teach with --stats layers to gather one"
        )
    if plot is not None:
        plot.write_text(draw_profile(found), encoding="utf-8")
    if json:
        print_json(profile_fields(found))
    else:
        from rich.console import Console

        Console().print(profile_table(found))
    if plot is not None:
        typer.echo(f"drawn: {plot}", err=True)
