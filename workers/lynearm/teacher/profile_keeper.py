"""Keeps what a worker measured inside its teacher with the stream, as attachments.

Each producer has attachments of its own (`lynearm.wire.profiles`), which it replaces as its sums grow: now and
then, and at its end. A worker that takes over under the same name begins with the sums that it finds there, so
that nothing is lost but what was measured since they were stored last, and nothing counts twice. Without a
profile a job is as good: whatever goes wrong here is said and passed over.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping

from lynearm.client import TraceClient
from lynearm.wire.errors import LynearmError, ServiceUnavailableError
from lynearm.wire.profiles import LayerStatistics, TeacherProfile, decode_profile, encode_profile
from lynearm.wire.specs import TeacherSpec

logger = logging.getLogger(__name__)

PROFILE_PREFIX = "profile."
"""Begins the name of every attachment that is part of a stream's teacher profile."""

STORE_SECONDS = 60.0
"""How often sums are stored: what a worker that is killed loses at most."""


class ProfileKeeper:
    """The profile of one producer.

    Args:
        client: Of the service that keeps the stream.
        stream: Name of the stream; it exists.
        producer_id: Of the worker that measures.
        teacher: That it measures.
    """

    def __init__(self, client: TraceClient, stream: str, producer_id: str, teacher: TeacherSpec) -> None:
        self._client = client
        self._stream = stream
        # A producer id may be as long as a name: with the prefix it would be none.
        self._prefix = f"{PROFILE_PREFIX}{hashlib.sha256(producer_id.encode()).hexdigest()[:16]}."
        self._profile = TeacherProfile(teacher.model, teacher.revision)
        self._found: TeacherProfile | None = None
        self._is_stored = True
        self._stored_at = time.monotonic()

    def add(self, statistics: Mapping[int, LayerStatistics]) -> None:
        """Add sums; stores them when it is time."""
        if statistics:
            self._profile = self._profile.plus(
                TeacherProfile(self._profile.model, self._profile.revision, statistics)
            )
            self._is_stored = False
        if time.monotonic() - self._stored_at >= STORE_SECONDS:
            self.store()

    @property
    def is_due(self) -> bool:
        """Whether sums should be taken out of the engine and added now."""
        return time.monotonic() - self._stored_at >= STORE_SECONDS

    def store(self) -> None:
        """Keep all sums with the stream, and those that its predecessor had stored."""
        self._stored_at = time.monotonic()
        if self._is_stored:
            return
        try:
            if self._found is None:
                self._found = read_profile(self._client, self._stream, self._prefix)
            whole = self._profile if self._found is None else self._found.plus(self._profile)
            for number, part in enumerate(encode_profile(whole)):
                self._client.attachments.put(self._stream, f"{self._prefix}{number}", part)
        except ServiceUnavailableError as error:
            logger.info("stream %s: the teacher profile is stored later: %s", self._stream, error)
        except LynearmError as error:
            logger.warning("stream %s: the teacher profile is not stored: %s", self._stream, error)
        else:
            if self._found is None:
                self._found = TeacherProfile(whole.model, whole.revision)
            self._is_stored = True


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
