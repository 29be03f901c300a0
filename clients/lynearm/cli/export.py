"""`lynearm export`: a checkpoint becomes a package for Apple devices."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import Assignments, ConfigFile, Debug, Progress, ProgressMode, flags, make_app

if TYPE_CHECKING:
    from lynearm.cli.progress import Status
    from lynearm.export.parity import Parity
    from lynearm.export.progress import ExportProgress

export_app = make_app("Turn a checkpoint into an MLX or Core ML package.")

_HOW_TO_GO_ON = "nothing is left half written; the same command begins again"

_Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Directory of a checkpoint, or a run of `lynearm train`.")
]
_Out = Annotated[Path, typer.Option(help="Directory of the package; replaced if lynearm wrote it.")]
_Overwrite = Annotated[
    bool | None, typer.Option("--overwrite", help="Replace a directory that lynearm did not write.")
]
_Check = Annotated[
    bool | None,
    typer.Option(
        "--check-parity/--no-check-parity",
        help="Compare the package with the checkpoint.",
        show_default="check-parity",
    ),
]


@export_app.command("mlx")
@reported(_HOW_TO_GO_ON)
def export_mlx(
    context: typer.Context,
    checkpoint: _Checkpoint,
    out: _Out,
    bits: Annotated[int | None, typer.Option(help="4, 8 or 16 a weight.", show_default="8")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; 0 chooses.", show_default="0")
    ] = None,
    check_parity: _Check = None,
    overwrite: _Overwrite = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Write an MLX directory, and check it.

    Stock `mlx_lm.load` reads it. The check: it computes what the checkpoint computes.
    """
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.export.config import MlxExportConfig

    settings = load_settings(
        MlxExportConfig, "export.mlx", file=config, flags=flags(context), assignments=assignments or ()
    )
    from lynearm.export import mlx_export

    with Reporter("export", progress, describe) as report:
        with _plain(checkpoint) as plain:
            made = mlx_export.export_mlx(plain, out, settings, report)
        report.conclude(made)
    if report.for_people:
        typer.echo(_summary(made.path, made.size_bytes, made.parity))


@export_app.command("coreml")
@reported(_HOW_TO_GO_ON)
def export_coreml(
    context: typer.Context,
    checkpoint: _Checkpoint,
    out: _Out,
    bits: Annotated[int | None, typer.Option(help="4, 8 or 16 a weight.", show_default="16")] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens that the key-value cache holds.", show_default="2048")
    ] = None,
    check_parity: _Check = None,
    overwrite: _Overwrite = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Write a Core ML package, and check it.

    A stateful .mlpackage for iOS 18 and macOS 15. The check: it computes what the checkpoint computes.
    """
    from lynearm.cli.progress import Reporter
    from lynearm.cli.settings import load_settings
    from lynearm.export.config import CoreMlExportConfig

    settings = load_settings(
        CoreMlExportConfig, "export.coreml", file=config, flags=flags(context), assignments=assignments or ()
    )
    from lynearm.export import coreml_export

    with Reporter("export", progress, describe) as report:
        with _plain(checkpoint) as plain:
            made = coreml_export.export_coreml(plain, out, settings, report)
        report.conclude(made)
    if report.for_people:
        typer.echo(_summary(made.path, made.size_bytes, made.parity))


def describe(event: ExportProgress) -> Status:
    """What a moment of an export means to a person."""
    from lynearm.cli.progress import Status

    return Status("exporting", event.stage, event.fraction, 1.0)


@contextmanager
def _plain(checkpoint: Path) -> Generator[Path]:
    """The checkpoint; of an adapter, what it makes with its base, for as long as the block runs."""
    from lynearm.student.run_directory import find_adapter

    adapter = find_adapter(checkpoint)
    if adapter is None:
        yield checkpoint
        return
    from lynearm.student.merging import merge_student

    with tempfile.TemporaryDirectory(prefix="lynearm-merged-") as place:
        # Packages are named after the checkpoint's directory.
        merged = Path(place, adapter.resolve().name)
        merge_student(adapter, merged)
        yield merged


def _summary(path: Path, size_bytes: int, parity: Parity | None) -> str:
    from lynearm.cli.progress import size

    checked = parity.summary() if parity is not None else "not compared with the checkpoint"
    return f"{path}: {size(size_bytes)}; {checked}"
