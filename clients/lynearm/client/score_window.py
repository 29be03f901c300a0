"""The completions that a client has sent to a teacher and that are not answered yet; no I/O.

Invariants: every completion is answered once, across connections; at most `size` are unanswered. What is not
answered when a connection is lost is sent again on the next one, under the same name, so that a teacher which
has computed it already does not do so twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from uuid import uuid4

from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.wire.errors import InternalError, InvalidInputError, LynearmError, MisalignmentError
from lynearm.wire.scoring import (
    ScoredCompletion,
    ScoreSettings,
    StudentCompletion,
    TeacherInfo,
    completion_to_proto,
    failure_from_proto,
    results_from_proto,
    settings_to_proto,
    teacher_info_from_proto,
    with_prompt,
)

MESSAGE_BYTES = 256 << 10
"""Completions are sent together up to about this size, which is well under gRPC's 4 MiB."""

MAX_MESSAGE_BYTES = (4 << 20) - 1024

_MAX_HOLD_SECONDS = 0.01
"""A completion is not held back for the next one for longer: making that one may take a while."""

OnFailure = Callable[[str, LynearmError], None]
"""Told of a completion that the teacher cannot score, by its request id."""


class ScoreWindow:
    """What one call of `TeacherClient.score` has under way.

    Args:
        completions: What is to be scored; taken as there is room.
        settings: What is wanted of each.
        size: Completions that may be unanswered.
        on_failure: Told of what cannot be scored; None: that is raised.
    """

    def __init__(
        self,
        completions: Iterable[StudentCompletion],
        settings: ScoreSettings,
        *,
        size: int,
        on_failure: OnFailure | None = None,
    ) -> None:
        if size < 1:
            raise InvalidInputError(f"max_in_flight {size} is below 1")
        session = settings.session or f"score-{uuid4().hex}"
        self._settings = replace(settings, session=session)
        self._source = iter(completions)
        self._size = size
        self._on_failure = on_failure
        self._unanswered: dict[str, StudentCompletion] = {}
        self._scored: deque[ScoredCompletion] = deque()
        self._has_all = False
        self._teacher: TeacherInfo | None = None

    @property
    def is_complete(self) -> bool:
        """Whether everything was taken and answered."""
        return self._has_all and not self._unanswered

    @property
    def has_all(self) -> bool:
        """Whether nothing is left to be taken."""
        return self._has_all

    def open(self) -> Iterator[pb.ScoreRequest]:
        """First messages of a connection: the settings, and what was sent before and not answered."""
        yield pb.ScoreRequest(open=settings_to_proto(self._settings))
        batch = pb.CompletionBatch()
        size_bytes = 0
        for completion in self._unanswered.values():
            message = completion_to_proto(completion)
            if batch.completions and size_bytes + message.ByteSize() > MESSAGE_BYTES:
                yield pb.ScoreRequest(completions=batch)
                batch, size_bytes = pb.CompletionBatch(), 0
            batch.completions.append(message)
            size_bytes += message.ByteSize()
        if batch.completions:
            yield pb.ScoreRequest(completions=batch)

    def fill(self) -> Iterator[pb.ScoreRequest]:
        """Take completions while there is room; the messages that carry them."""
        batch = pb.CompletionBatch()
        size_bytes, begun = 0, time.monotonic()
        while not self._has_all and len(self._unanswered) < self._size:
            completion = next(self._source, None)
            if completion is None:
                self._has_all = True
                break
            message = self._take(completion)
            if batch.completions and size_bytes + message.ByteSize() > MESSAGE_BYTES:
                yield pb.ScoreRequest(completions=batch)
                batch, size_bytes, begun = pb.CompletionBatch(), 0, time.monotonic()
            batch.completions.append(message)
            size_bytes += message.ByteSize()
            if time.monotonic() - begun > _MAX_HOLD_SECONDS:
                yield pb.ScoreRequest(completions=batch)
                batch, size_bytes, begun = pb.CompletionBatch(), 0, time.monotonic()
        if batch.completions:
            yield pb.ScoreRequest(completions=batch)

    def receive(self, response: pb.ScoreResponse) -> None:
        """Take a message of the teacher's.

        Raises:
            LynearmError: what the teacher says of a completion, unless `on_failure` is told.
            CorruptBlockError: if a result is not what was asked for.
            MisalignmentError: if another teacher answers than before.
        """
        if response.WhichOneof("message") == "opened":
            self._open(teacher_info_from_proto(response.opened.teacher))
            return
        for scored in results_from_proto(response.results):
            self._scored.append(with_prompt(scored, self._answered(scored.request_id)))
        for failure in response.results.failures:
            self._answered(failure.request_id)
            error = failure_from_proto(failure)
            if self._on_failure is None:
                raise error
            self._on_failure(failure.request_id, error)

    def take_scored(self) -> Iterator[ScoredCompletion]:
        """The results that are there."""
        while self._scored:
            yield self._scored.popleft()

    def _take(self, completion: StudentCompletion) -> pb.Completion:
        message = completion_to_proto(completion)
        if completion.request_id in self._unanswered:
            raise InvalidInputError(
                f"request id {completion.request_id!r} is there twice",
                "give each completion an id of its own",
            )
        if message.ByteSize() > MAX_MESSAGE_BYTES:
            raise InvalidInputError(
                f"request {completion.request_id!r} takes {message.ByteSize()} bytes, "
                f"a message holds {MAX_MESSAGE_BYTES}",
                "choose fewer ids at each position, or split the completion",
            )
        self._unanswered[completion.request_id] = completion
        return message

    def _answered(self, request_id: str) -> StudentCompletion:
        completion = self._unanswered.pop(request_id, None)
        if completion is None:
            raise InternalError(f"the teacher answers request {request_id!r}, which nobody sent or awaits")
        return completion

    def _open(self, teacher: TeacherInfo) -> None:
        before = self._teacher or teacher
        if (teacher.spec, teacher.tokenizer) != (before.spec, before.tokenizer):
            raise MisalignmentError(
                f"teacher {before.spec.model!r} ({before.spec.revision}) was in use, and now "
                f"{teacher.spec.model!r} ({teacher.spec.revision}) answers",
                "serve the same model at every address",
            )
        self._teacher = teacher
