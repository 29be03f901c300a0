"""`lynearm demo`: the whole path on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import Assignments, ConfigFile, Debug, flags


@reported("`lynearm demo` begins again; the converted teacher is kept")
def demo(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option(help="Directory for all that the demo makes.", show_default="runs/demo")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Another teacher: a directory in the transformers layout.", show_default="SmolLM2-135M"
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Other prompts, JSON lines.", show_default="its own 300")
    ] = None,
    coreml: Annotated[
        bool | None,
        typer.Option("--coreml/--no-coreml", help="Make a Core ML package.", show_default="coreml"),
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    debug: Debug = False,
) -> None:
    """Teach, train and export on this machine.

    A real teacher, in at most eight minutes on two cores.
    """
    from lynearm.cli.settings import load_settings
    from lynearm.demo.config import DemoConfig

    settings = load_settings(
        DemoConfig, "demo", file=config, flags=flags(context), assignments=assignments or ()
    )
    from rich.console import Console

    from lynearm.demo.run import run_demo

    run_demo(settings, Console())
