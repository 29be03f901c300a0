"""The teacher profile of a stream: what its workers measured inside the teacher, added up."""

from __future__ import annotations

from lynearm.client.trace_client import TraceClient
from lynearm.wire.profiles import TeacherProfile, decode_profile

PROFILE_PREFIX = "profile."
"""Begins the name of every attachment that is part of a stream's teacher profile."""


def read_profile(client: TraceClient, stream: str, prefix: str = PROFILE_PREFIX) -> TeacherProfile | None:
    """The sums of all parts of a stream's profile, or of one producer's; None where there are none.

    Raises:
        StreamNotFoundError: if there is no such stream.
        CorruptBlockError: if an attachment under that prefix is no profile.
        MisalignmentError: if the parts are of different teachers.
    """
    found: TeacherProfile | None = None
    for attachment in client.attachments.list(stream):
        if attachment.name.startswith(prefix):
            part = decode_profile(client.attachments.get(stream, attachment.name))
            found = part if found is None else found.plus(part)
    return found
