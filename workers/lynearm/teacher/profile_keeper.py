"""Keeps what a worker measured inside its teacher with the stream, as attachments.

Each producer has attachments of its own (`lynearm.wire.profiles`), which it replaces as its sums grow: now
and then, and at its end. A worker that takes over under the same name begins with the sums that it finds
there, so that nothing is lost but what was measured since they were stored last. Without a profile a job is
as good: whatever goes wrong here is said and passed over.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping

from lynearm.client import TraceClient
from lynearm.client.profiles import PROFILE_PREFIX, read_profile
from lynearm.wire.errors import LynearmError, ServiceUnavailableError
from lynearm.wire.profiles import LayerStatistics, TeacherProfile, encode_profile
from lynearm.wire.specs import TeacherSpec

logger = logging.getLogger(__name__)

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
        self._earlier: TeacherProfile | None = None
        self._is_stored = True
        self._stored_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time to store."""
        return time.monotonic() - self._stored_at >= STORE_SECONDS

    def store(self, statistics: Mapping[int, LayerStatistics]) -> None:
        """Keep all sums with the stream, these and those that a predecessor had stored.

        Args:
            statistics: What was measured since the last call.
        """
        self._stored_at = time.monotonic()
        if statistics:
            measured = TeacherProfile(self._profile.model, self._profile.revision, statistics)
            self._profile = self._profile.plus(measured)
            self._is_stored = False
        if self._is_stored:
            return
        try:
            if self._earlier is None:
                found = read_profile(self._client, self._stream, self._prefix)
                self._earlier = found or TeacherProfile(self._profile.model, self._profile.revision)
            whole = self._earlier.plus(self._profile)
            for number, part in enumerate(encode_profile(whole)):
                self._client.attachments.put(self._stream, f"{self._prefix}{number}", part)
        except ServiceUnavailableError as error:
            logger.info("stream %s: the teacher profile is stored later: %s", self._stream, error)
        except LynearmError as error:
            logger.warning("stream %s: the teacher profile is not stored: %s", self._stream, error)
        else:
            self._is_stored = True
