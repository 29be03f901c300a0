"""Flags that several commands share, and how a command's flags reach its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ProgressMode(StrEnum):
    """How a command shows where it is."""

    auto = "auto"
    rich = "rich"
    plain = "plain"
    json = "json"
    none = "none"


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="TOML file; flags override what it says."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set any key of this command's table in the TOML file, flag or not. May be repeated.",
    ),
]
Progress = Annotated[
    ProgressMode,
    typer.Option(
        help="auto: live bars on a terminal, else lines; json: one object a line on standard output.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and a detailed log.")]
Service = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Trace service; else what the file says, LYNEARM_SERVICE, or 127.0.0.1:7411.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def flags(context: typer.Context) -> Mapping[str, object]:
    """The values of a command's parameters by name; None where a flag was not given.

    Commands name their parameters as the fields of their configuration, and pass this on to
    `settings.load_settings` instead of repeating the names.
    """
    return context.params
