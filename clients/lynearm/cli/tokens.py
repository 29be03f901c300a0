"""`lynearm tokens`: the tokens that a service asks for."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import AsJson, Debug, make_app

TokensFile = Annotated[
    Path, typer.Option("--file", metavar="FILE", help="The file that `lynearm serve --tokens` names.")
]
Scopes = Annotated[
    list[str],
    typer.Option(
        "--scope",
        metavar="PERMISSION:STREAMS",
        help="publish, consume or admin, a colon, and a stream, or the beginning of names and *. "
        "May be repeated.",
    ),
]

tokens_app = make_app("Make and list the tokens of a service.")


@tokens_app.command("new")
@reported()
def new(
    name: Annotated[str, typer.Argument(help="Whose token it is; shown in logs.")],
    scope: Scopes,
    file: TokensFile,
    days: Annotated[
        int | None, typer.Option(min=1, help="Days until it expires; else it never does.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a token: its hash goes into the file, the token itself to standard output, once.

    A server that uses the file takes it over within seconds.
    """
    from lynearm.traces.tokens import Scope, format_entry, new_token, parse_tokens

    token = new_token()
    entry = format_entry(name, token, [Scope.parse(one) for one in scope])
    if days is not None:
        expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
        entry += f"expires = {expires.isoformat()}\n"
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    text = f"{before.rstrip()}\n\n{entry}".lstrip()
    parse_tokens(text, str(file))
    _replace(file, text)
    typer.echo(token)
    typer.echo(f"{file} knows {name!r}; keep the token itself where only its holder reads it", err=True)


@tokens_app.command("list")
@reported()
def list_tokens(file: TokensFile, as_json: AsJson = False, debug: Debug = False) -> None:
    """List whose tokens a file holds, and what they are good for."""
    import json

    from lynearm.traces.tokens import parse_tokens

    entries = [
        {
            "name": entry.name,
            "scopes": [str(scope) for scope in entry.scopes],
            "expires": _time(entry.expires_unix_seconds),
        }
        for entry in parse_tokens(file.read_text(encoding="utf-8"), str(file))
    ]
    if as_json:
        typer.echo(json.dumps(entries))
        return
    for entry in entries:
        until = f", until {entry['expires']}" if entry["expires"] else ""
        typer.echo(f"{entry['name']}: {', '.join(entry['scopes'] or [])}{until}")


def _time(unix_seconds: float | None) -> str:
    return "" if unix_seconds is None else datetime.fromtimestamp(unix_seconds, UTC).isoformat()


def _replace(file: Path, text: str) -> None:
    """Write a file as a whole: a server that reads it meanwhile sees the old one or the new one."""
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
    new_file = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(new_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    new_file.replace(file)
