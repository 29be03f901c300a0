"""Several teachers in one stream: what they must share, and the one spec that describes them all.

A stream has one spec, fixed when it is created. Of a stream that several teachers write, the spec is that of
the teacher that came first; its labels name them all, `teacher.NAME = MODEL@REVISION, LICENCE`, and each
trace says by its tag which of them wrote it. So readers that know nothing of several teachers can read the
stream, and those who were not announced cannot write to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lynearm.client import TraceClient
from lynearm.teacher.routing import PromptRoute
from lynearm.wire.errors import MisalignmentError, StreamExistsError, StreamNotFoundError
from lynearm.wire.specs import StreamSpec, TeacherSpec, TokenizerSpec, alignment_differences

LABEL_PREFIX = "teacher."
"""Of the labels that name a stream's teachers."""


def teacher_label(teacher: str) -> str:
    """The label of a stream's spec that describes a teacher."""
    return f"{LABEL_PREFIX}{teacher}"


def teachers_of(labels: Mapping[str, str]) -> dict[str, str]:
    """The teachers that a stream's labels announce, by name; empty for a stream of one teacher."""
    return {
        key.removeprefix(LABEL_PREFIX): value for key, value in labels.items() if key.startswith(LABEL_PREFIX)
    }


def join_licenses(licenses: Sequence[str]) -> str:
    """The terms of a stream under several licences: all of them, as an SPDX expression, each once."""
    distinct = list(dict.fromkeys(licenses))
    if len(distinct) == 1:
        return distinct[0]
    return " AND ".join(
        f"({license})" if " OR " in license and not license.startswith("(") else license
        for license in distinct
    )


def join_stream(client: TraceClient, spec: StreamSpec, route: PromptRoute | None) -> StreamSpec:
    """The spec under which a teacher writes: its own, or that of the stream whose labels announce it.

    Raises:
        MisalignmentError: if the teacher differs from the stream's in what all of its teachers must share.
    """
    if route is None:
        return spec
    width = max(spec.teacher.vocab_size, route.vocab_size)
    own = replace(spec, teacher=replace(spec.teacher, vocab_size=width))
    try:
        existing = client.get_stream(spec.name).spec
    except StreamNotFoundError:
        return own
    return shared_spec(existing, own, route.teacher)


def open_joined(client: TraceClient, spec: StreamSpec, route: PromptRoute | None) -> StreamSpec:
    """Make sure that a teacher's stream is there; the spec under which it writes to it.

    Raises:
        MisalignmentError: as for `join_stream`.
        StreamExistsError: if the stream exists with another spec.
    """
    joined = join_stream(client, spec, route)
    try:
        client.open_stream(joined)
    except StreamExistsError:
        if route is None:
            raise
        # Another of its teachers, who begin side by side, may have opened it in between.
        joined = join_stream(client, spec, route)
        client.open_stream(joined)
    return joined


def shared_spec(existing: StreamSpec, own: StreamSpec, teacher: str) -> StreamSpec:
    """A teacher's spec as far as it may differ from its stream's: with who wrote first as the teacher.

    Args:
        existing: The stream's.
        own: The teacher's.
        teacher: Its name, which the stream must announce; if it does not, `own` comes back, and the service
            refuses it where it differs.

    Raises:
        MisalignmentError: naming every difference in tokenizer, vocabulary or logprobs.
    """
    if teacher_label(teacher) not in existing.labels:
        return own
    before = (existing.teacher, existing.tokenizer)
    refuse_misaligned(existing.name, teacher, before, (own.teacher, own.tokenizer))
    if own.teacher.vocab_size > existing.teacher.vocab_size:
        raise MisalignmentError(
            f"the logits of teacher {teacher!r} are {own.teacher.vocab_size} wide, those of stream "
            f"{existing.name!r} {existing.teacher.vocab_size}",
            "begin a new stream for these teachers",
        )
    return replace(own, teacher=existing.teacher, tokenizer=existing.tokenizer)


def refuse_misaligned(
    stream: str,
    teacher: str,
    first: tuple[TeacherSpec, TokenizerSpec],
    other: tuple[TeacherSpec, TokenizerSpec],
) -> None:
    """Refuse a teacher that cannot write to a stream of another one.

    Raises:
        MisalignmentError: naming every difference in tokenizer or logprobs.
    """
    before, own = first[0], other[0]
    differences = [line.replace("student", "this one") for line in alignment_differences(first[1], other[1])]
    for name in ("logprobs_mode", "logprobs_temperature"):
        if getattr(before, name) != getattr(own, name):
            differences.append(
                f"{name}: {getattr(before, name)!r}, teacher {teacher!r} {getattr(own, name)!r}"
            )
    if differences:
        raise MisalignmentError(
            f"teacher {teacher!r} cannot write to stream {stream!r} of {before.model!r}: "
            + "; ".join(differences),
            "give each teacher a stream of its own, with {teacher} in the stream's name",
        )
