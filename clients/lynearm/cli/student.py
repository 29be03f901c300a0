"""`lynearm student`: make a student, merge its adapter, and see what went into it and how it learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import AsJson, Debug, make_app
from lynearm.cli.student_cut import cut

student_app = make_app("Make a student, and see what went into one.")

_Run = Annotated[
    Path, typer.Argument(metavar="DIR", help="Directory of a checkpoint, or a run of `lynearm train`.")
]


@student_app.command("lineage")
@reported()
def lineage(directory: _Run, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show what went into a checkpoint: streams, teachers, terms, settings and versions."""
    from lynearm.student.lineage import read_lineage
    from lynearm.student.run_directory import resolve_checkpoint

    manifest = read_lineage(resolve_checkpoint(directory))
    if as_json:
        typer.echo(json.dumps(manifest, ensure_ascii=False))
        return
    from rich.console import Console

    from lynearm.cli.lineage_views import lineage_views

    console = Console()
    for view in lineage_views(manifest):
        console.print(view)


@student_app.command("report")
@reported()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a run of `lynearm train`.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file.", show_default="DIR/report.html")] = None,
    debug: Debug = False,
) -> None:
    """Draw a run's curves into one HTML file that needs nothing else."""
    from lynearm.report.page import write_page
    from lynearm.report.training import load_training_report, render_training_report

    path = out or directory / "report.html"
    write_page(path, render_training_report(load_training_report(directory)))
    typer.echo(str(path))


student_app.command("cut")(cut)


@student_app.command("merge")
@reported("nothing is left half written; the same command begins again")
def merge(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Directory of an adapter, or a run of `lynearm train --lora`."),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the merged student; must not exist.")],
    debug: Debug = False,
) -> None:
    """Add an adapter to its base.

    What comes out is a plain model that needs neither.
    """
    from lynearm.student.merging import merge_student

    merged = merge_student(directory, out)
    typer.echo(f"{out}: {merged} merged into its base")
