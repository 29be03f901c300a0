"""Flags that several commands share, and how a command's flags reach its configuration."""

from __future__ import annotations

import os
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
        metavar="MODE",
        help="auto, rich, plain, json or none. auto: live bars on a terminal, else lines; "
        "json: one object a line on standard output.",
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
SERVICE_VARIABLE = "LYNEARM_SERVICE"
"""Environment variable with the address of the trace service, host:port: it takes the place of the built-in
default, so that a file and a flag override it. The only one that the command reads itself."""

DEFAULT_SERVICE = "127.0.0.1:7411"

ServiceOnly = Annotated[
    str | None,
    typer.Option(
        "--service",
        metavar="HOST:PORT",
        help="Trace service; else LYNEARM_SERVICE, or 127.0.0.1:7411.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def make_app(help_text: str) -> typer.Typer:
    """A group of commands.

    Args:
        help_text: What the group is for.
    """
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        # Plain text: drawing help with rich takes three times as long as everything else that it needs.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def flags(context: typer.Context) -> Mapping[str, object]:
    """The values of a command's parameters by name; None where a flag was not given.

    Commands name their parameters as the fields of their configuration, and pass this on to
    `settings.load_settings` instead of repeating the names.
    """
    return context.params


def weights(given: list[str] | None, flag: str) -> dict[str, float] | None:
    """What a repeated flag NAME:WEIGHT says, by name; None where it was not given.

    Raises:
        ConfigError: if one is not of this form.
    """
    from lynearm.wire.errors import ConfigError  # loads numpy, which `--help` does without

    found: dict[str, float] = {}
    for one in given or ():
        name, _, weight = one.rpartition(":")
        try:
            found[name] = float(weight)
        except ValueError as error:
            raise ConfigError(f"{flag} {one!r}: {weight!r} is not a number", "write NAME:WEIGHT") from error
    return found or None


def service_address(flag: str | None) -> str:
    """The service of a command without a configuration file: the flag, the environment or the default."""
    return flag or os.environ.get(SERVICE_VARIABLE) or DEFAULT_SERVICE
