"""What a person reads when a command fails or is interrupted, and the exit code that a script gets.

0    done                               2    a flag, a file or a value is wrong
1    failed                             130  interrupted with Ctrl-C
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec

import typer

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

EXTRAS = {
    "sqlalchemy": "service",
    "prometheus_client": "service",
    "grpc_reflection": "service",
    "vllm": "teacher",
    "ray": "teacher",
    "torch": "student",
    "transformers": "student",
    "safetensors": "student",
    "jinja2": "student",
    "mlx": "mlx",
    "mlx_lm": "mlx",
    "coremltools": "coreml",
    "accelerate": "gguf",
    "gguf": "gguf",
    "pyarrow": "parquet",
    "datasets": "datasets",
}
"""Which extra of the package brings a module."""

_Parameters = ParamSpec("_Parameters")


def reported(
    how_to_go_on: str = "",
) -> Callable[[Callable[_Parameters, None]], Callable[_Parameters, None]]:
    """Decorates a command: failures become one line on standard error and an exit code.

    The command's keyword `debug` asks for the traceback as well, and for the log of every part.

    Args:
        how_to_go_on: What to say after Ctrl-C; a command that knows more raises `Interrupted`.
    """

    def decorate(command: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
        @functools.wraps(command)
        def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
            debug = bool(kwargs.get("debug"))
            set_up_logging(debug=debug)
            try:
                command(*args, **kwargs)
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except BrokenPipeError as error:
                # Whoever reads our output has had enough: `lynearm streams tail … | head`. What is still
                # buffered would raise again at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(EXIT_FAILED) from error
            except (Exception, KeyboardInterrupt) as error:
                if debug:
                    traceback.print_exc()
                message, code = explain(error, how_to_go_on)
                print(message, file=sys.stderr)
                raise typer.Exit(code) from error

        return run

    return decorate


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a command that knows how to go on.

    Args:
        how_to_go_on: What to type.
    """

    def __init__(self, how_to_go_on: str) -> None:
        super().__init__(how_to_go_on)
        self.how_to_go_on = how_to_go_on


def this_command(*more: str) -> str:
    """The command line that runs, with more arguments unless it has them, ready to be typed again."""
    arguments = sys.argv[1:]
    return shlex.join(["lynearm", *arguments, *(one for one in more if one not in arguments)])


def explain(error: BaseException, how_to_go_on: str = "") -> tuple[str, int]:
    """The line for a person, and the exit code."""
    from lynearm.wire.errors import ConfigError, LynearmError

    if isinstance(error, KeyboardInterrupt):
        advice = error.how_to_go_on if isinstance(error, Interrupted) else how_to_go_on
        return f"stopped; {advice}" if advice else "stopped", EXIT_INTERRUPTED
    if isinstance(error, LynearmError):
        return _line(str(error)), EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    extra = EXTRAS.get((error.name or "").split(".")[0]) if isinstance(error, ImportError) else None
    if extra is not None:
        return _line(f"{error}: install it with `pip install 'lynearm[{extra}]'`"), EXIT_FAILED
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return _line(f"{error.strerror}{where}"), EXIT_FAILED
    return (
        _line(
            f"{type(error).__name__}: {error}: lynearm did not expect this; --debug shows where it happened"
        ),
        EXIT_FAILED,
    )


def set_up_logging(*, debug: bool) -> None:
    """Send warnings, or with `debug` everything of lynearm's own, to standard error."""
    root = logging.getLogger()
    if not any(isinstance(handler, _StandardErrorHandler) for handler in root.handlers):
        root.addHandler(_StandardErrorHandler())
    logging.getLogger("lynearm").setLevel(logging.DEBUG if debug else logging.WARNING)


class _StandardErrorHandler(logging.Handler):
    """Prints to whatever standard error is at the moment: a live display puts its own in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        print(self.format(record), file=sys.stderr)


def _line(text: str) -> str:
    return "error: " + " ".join(text.split())
