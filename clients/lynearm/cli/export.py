"""`lynearm export`: a checkpoint becomes a package for Apple devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import Assignments, ConfigFile, Debug, Progress, ProgressMode, flags

if TYPE_CHECKING:
    from lynearm.cli.progress import Status
    from lynearm.export.config import ExportProgress

export_app = typer.Typer(help="Turn a checkpoint into an MLX or Core ML package.", no_args_is_help=True)

_HOW_TO_GO_ON = "nothing was left half written; the same command begins again"

_Checkpoint = Annotated[
    Path | None,
    typer.Argument(metavar="CHECKPOINT", help="Directory of a checkpoint, or a run of `lynearm train`."),
]
_Out = Annotated[Path | None, typer.Option(help="Directory of the package.")]
_Overwrite = Annotated[
    bool | None, typer.Option("--overwrite", help="Replace a directory that lynearm did not write.")
]


@export_app.command("mlx")
@reported(_HOW_TO_GO_ON)
def export_mlx(
    context: typer.Context,
    checkpoint: _Checkpoint = None,
    out: _Out = None,
    bits: Annotated[int | None, typer.Option(help="4, 8 or 16 a weight.", show_default="8")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; 0 chooses.", show_default="0")
    ] = None,
    overwrite: _Overwrite = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Write a directory that stock `mlx_lm.load` reads, and check that it computes the same."""
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.export.config import MlxExportConfig

    settings = load_settings(
        MlxExportConfig, "export.mlx", file=config, flags=flags(context), assignments=assignments or ()
    )
    from lynearm.export.run import run_export_mlx

    with Reporter("export", progress, describe) as report:
        outcome = run_export_mlx(settings, report)
        report.result(outcome)
    if report.shows_people:
        typer.echo(str(outcome))


@export_app.command("coreml")
@reported(_HOW_TO_GO_ON)
def export_coreml(
    context: typer.Context,
    checkpoint: _Checkpoint = None,
    out: _Out = None,
    bits: Annotated[int | None, typer.Option(help="4, 8 or 16 a weight.", show_default="16")] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens that the key-value cache holds.", show_default="2048")
    ] = None,
    overwrite: _Overwrite = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Write a stateful .mlpackage for iOS 18 and macOS 15, and check that it computes the same."""
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.export.config import CoreMlExportConfig

    settings = load_settings(
        CoreMlExportConfig, "export.coreml", file=config, flags=flags(context), assignments=assignments or ()
    )
    from lynearm.export.run import run_export_coreml

    with Reporter("export", progress, describe) as report:
        outcome = run_export_coreml(settings, report)
        report.result(outcome)
    if report.shows_people:
        typer.echo(str(outcome))


def describe(event: ExportProgress) -> Status:
    """What a moment of an export means to a person."""
    from lynearm.cli.progress import Status

    return Status(event.stage, event.message, event.fraction, 1.0)
