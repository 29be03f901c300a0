"""`lynearm student cut`: a student out of some of its teacher's layers, heads, neurons and channels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynearm.cli.failures import reported
from lynearm.cli.options import Debug, Progress, ProgressMode, ServiceOnly, service_address

if TYPE_CHECKING:
    from lynearm.cli.progress import Status
    from lynearm.client import TraceClient
    from lynearm.student.cutting.cut import Evidence
    from lynearm.student.cutting.progress import CutProgress
    from lynearm.wire.profiles import TeacherProfile
    from lynearm.wire.traces import Trace

CALIBRATION_TOKENS = 4096
"""Completion tokens of a stream that are measured on, about 20 answers of GSM8K: one forward pass over them
for heads and neurons, and half of one for each layer that is tried."""


@reported("nothing is left half written; the same command begins again")
def cut(
    teacher: Annotated[Path, typer.Option(help="A llama-like model in the transformers layout.")],
    out: Annotated[Path, typer.Option(help="Directory of the student; must not exist.")],
    layers: Annotated[int, typer.Option(help="How many layers to keep.", show_default="all")] = 0,
    keep: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Which layers to keep, instead of --layers.")
    ] = None,
    choose: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Which layers: measured (by the KL to the teacher), influence (the least is left out) or "
            "evenly.",
            show_default="influence with --profile, else measured",
        ),
    ] = None,
    heads: Annotated[
        int, typer.Option(help="Query heads to keep in each layer.", show_default="all of --kv-heads")
    ] = 0,
    kv_heads: Annotated[
        int, typer.Option("--kv-heads", help="Key-value heads to keep in each layer.", show_default="all")
    ] = 0,
    neurons: Annotated[
        int, typer.Option(help="Feed-forward neurons to keep in each layer.", show_default="all")
    ] = 0,
    hidden_size: Annotated[
        int, typer.Option(help="Channels to keep of the residual stream.", show_default="all")
    ] = 0,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="STREAM|FILE",
            help="Teacher profile to choose by: of a stream, or what `lynearm teacher profile --json` wrote.",
        ),
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(metavar="STREAM", help="Measure on a stream's traces, not on two short answers."),
    ] = None,
    service: ServiceOnly = None,
    progress: Progress = ProgressMode.auto,
    debug: Debug = False,
) -> None:
    """Make a student of a part of a teacher's weights.

    It keeps the teacher's tokenizer, and what heads, neurons and channels do most; --layers alone keeps the
    layers whole. `lynearm train` heals what was cut.
    """
    from lynearm.cli.progress import Reporter, Status
    from lynearm.student.cutting.config import CutConfig

    config = CutConfig(
        layers=layers,
        keep=_layer_numbers(keep),
        choose=choose or ("influence" if profile else "measured"),
        kv_heads=kv_heads,
        heads=heads,
        neurons=neurons,
        hidden_size=hidden_size,
    )
    with Reporter("cut", progress, describe_cut) as show:
        # Importing torch and transformers takes seconds, in which nobody should look at nothing.
        show.announce(Status("starting", "loading torch"))
        from lynearm.student.cutting.cut import cut_student

        evidence = _gather(teacher, profile, traces, service)
        made = cut_student(teacher, out, config, evidence=evidence, on_progress=show)
        show.conclude(made)
    if show.for_people:
        from rich.console import Console

        from lynearm.cli.cut_views import cut_summary, cut_table

        Console().print(cut_table(made))
        typer.echo(cut_summary(made))


def describe_cut(event: CutProgress) -> Status:
    """What a moment of a cut means to a person."""
    from lynearm.cli.progress import Status

    kl = f", KL {event.kl:.3f}" if event.kl is not None and event.dropped else ""
    dropped = f", without {', '.join(map(str, event.dropped))}" if event.dropped else ""
    return Status("cutting", f"{event.message}{dropped}{kl}")


def _gather(teacher: Path, profile: str | None, traces: str | None, service: str | None) -> Evidence:
    from lynearm.client import TraceClient
    from lynearm.student.cutting.cut import Evidence
    from lynearm.student.cutting.profile_files import read_profile_file
    from lynearm.student.cutting.sequences import sequences_from_traces

    from_file = profile is not None and (profile.endswith(".json") or Path(profile).is_file())
    found = read_profile_file(Path(profile)) if profile is not None and from_file else None
    if traces is None and (profile is None or from_file):
        return Evidence(found)
    with TraceClient(service_address(service)) as client:
        if profile is not None and not from_file:
            found = _stored_profile(client, profile)
        if traces is None:
            return Evidence(found)
        _check_tokenizer(client, traces, teacher)
        read = _read_traces(client, traces)
        return Evidence(found, sequences_from_traces(read, max_tokens=CALIBRATION_TOKENS))


def _stored_profile(client: TraceClient, stream: str) -> TeacherProfile:
    from lynearm.client.profiles import read_profile
    from lynearm.wire.errors import InvalidInputError

    found = read_profile(client, stream)
    if found is None:
        raise InvalidInputError(
            f"stream {stream!r} has no teacher profile",
            "teach with --stats layers to gather one, or leave out --profile: the cut measures by itself",
        )
    return found


def _check_tokenizer(client: TraceClient, stream: str, teacher: Path) -> None:
    """Token ids of another tokenizer would be another text to the teacher."""
    from lynearm.student.model import read_tokenizer_spec
    from lynearm.wire.errors import MisalignmentError

    theirs, ours = client.get_stream(stream).spec.tokenizer, read_tokenizer_spec(teacher)
    if theirs.vocab_sha256 != ours.vocab_sha256:
        raise MisalignmentError(
            f"stream {stream!r} is in the tokens of {theirs.name!r}, {teacher} has another vocabulary",
            "name a stream of this teacher, or leave out --traces",
        )


def _read_traces(client: TraceClient, stream: str) -> Iterator[Trace]:
    from lynearm.wire.codec import decode_block

    dictionaries = client.dictionaries(stream)
    with client.subscribe(stream, follow=False) as subscription:
        for received in subscription:
            yield from decode_block(received.block, dictionaries=dictionaries)


def _layer_numbers(keep: str | None) -> tuple[int, ...]:
    from lynearm.wire.errors import ConfigError

    if keep is None:
        return ()
    try:
        return tuple(int(number) for number in keep.split(","))
    except ValueError as error:
        raise ConfigError(f"--keep {keep!r} is not a list of layers", "for example --keep 0,1,5,9") from error
