"""The flags of `lynearm serve`, for a command that starts servers in another way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar, get_type_hints

from lynearm.cli.serve import serve

_Command = TypeVar("_Command", bound=Callable[..., None])


def with_serve_flags(command: _Command) -> _Command:
    """The command with every flag of `lynearm serve` besides its own, so that none is missing or differs.

    The command declares `**_` for them, and reads them from its context, as `options.flags` does.
    """
    own = {
        name: parameter
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    inherited = {
        name: parameter for name, parameter in inspect.signature(serve).parameters.items() if name not in own
    }
    hints = get_type_hints(serve, include_extras=True) | get_type_hints(command, include_extras=True)
    merged = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name])
        for one in (*own.values(), *inherited.values())
    ]
    # Both are where typer looks.
    command.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]  # functions may have one
    command.__annotations__ = {one.name: one.annotation for one in merged}
    return command
