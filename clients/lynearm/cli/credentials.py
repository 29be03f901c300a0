"""Flags before the command that say with what a client comes to a service.

They are written to the environment variables of `lynearm.client.credentials`, so that every part of a command
finds them, in processes that it starts too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def take_credentials(
    tls_ca: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Authorities of the service, PEM, or `system`; turns TLS on. Else LYNEARM_TLS_CA.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Certificate of this client, PEM. Else LYNEARM_TLS_CERT."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its private key, PEM. Else LYNEARM_TLS_KEY.")
    ] = None,
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name in the service's certificate, if not its address. Else LYNEARM_TLS_SERVER_NAME.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File that holds a token. Else LYNEARM_TOKEN_FILE, or LYNEARM_TOKEN itself."
        ),
    ] = None,
) -> None:
    """Take over the flags that were given."""
    given = {
        "LYNEARM_TLS_CA": tls_ca,
        "LYNEARM_TLS_CERT": tls_cert,
        "LYNEARM_TLS_KEY": tls_key,
        "LYNEARM_TLS_SERVER_NAME": tls_server_name,
        "LYNEARM_TOKEN_FILE": token_file,
    }
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    if token_file is not None:
        # A flag overrides the environment.
        os.environ.pop("LYNEARM_TOKEN", None)
