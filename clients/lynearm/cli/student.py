"""`lynearm student`: cut a student out of its teacher, and see what went into one and how it learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import AsJson, Debug, Progress, ProgressMode, make_app

if TYPE_CHECKING:
    from lynearm.cli.progress import Status
    from lynearm.student.cutting import CutProgress, CutReport

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


@student_app.command("cut")
@reported("nothing is left half written; the same command begins again")
def cut(
    teacher: Annotated[Path, typer.Option(help="A llama-like model in the transformers layout.")],
    out: Annotated[Path, typer.Option(help="Directory of the student; must not exist.")],
    layers: Annotated[int | None, typer.Option(help="How many to keep; measurement chooses which.")] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Which layers to keep, instead of --layers.")
    ] = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Make a student of some of a teacher's layers.

    Its embeddings, head and tokenizer are the teacher's. `lynearm train` heals what was cut.
    """
    from lynearm.cli.progress import Reporter, Status

    chosen = _layer_numbers(keep)
    with Reporter("cut", progress, describe_cut) as show:
        # Importing torch and transformers takes seconds, in which nobody should look at nothing.
        show.announce(Status("starting", "loading torch"))
        from lynearm.student.cutting import cut_student

        made = cut_student(teacher, out, layers=chosen, num_layers=layers, on_progress=show)
        show.conclude(made)
    if show.for_people:
        typer.echo(_summary(made))


def describe_cut(event: CutProgress) -> Status:
    """What a moment of a cut means to a person."""
    from lynearm.cli.progress import Status

    kl = f", KL {event.kl:.3f}" if event.kl is not None and event.dropped else ""
    dropped = f", without {', '.join(map(str, event.dropped))}" if event.dropped else ""
    return Status("cutting", f"{event.message}{dropped}{kl}")


def _layer_numbers(keep: str | None) -> list[int] | None:
    from lynearm.wire.errors import ConfigError

    if keep is None:
        return None
    try:
        return [int(number) for number in keep.split(",")]
    except ValueError as error:
        raise ConfigError(f"--keep {keep!r} is not a list of layers", "for example --keep 0,1,5,9") from error


def _summary(made: CutReport) -> str:
    kept, dropped = (", ".join(map(str, layers)) or "none" for layers in (made.layers, made.dropped))
    measured = (
        f"\nKL to the teacher on the calibration text: {made.kl:.3f} nats a position"
        if made.kl is not None
        else ""
    )
    return (
        f"{made.directory}: {len(made.layers)} of {len(made.layers) + len(made.dropped)} layers\n"
        f"kept: {kept}\nleft out: {dropped}{measured}"
    )
