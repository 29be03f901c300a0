"""Score: one client's stream of completions, scored in whatever order they finish.

Invariants:

- Every completion that was read is answered once, by a result or by a failure of its own.
- Results that the client has not read yet take at most `buffer_bytes`, or are one result; beyond that its
  requests are not read, and it waits.
- However the call ends, nothing that it alone waited for stays in the engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np

from lynearm.teacher.request_table import RequestContent, RequestTable, SharedRequest
from lynearm.teacher.scoring import Score, ScoreTask, check_task
from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.wire.errors import (
    DrainingError,
    InternalError,
    InvalidInputError,
    LimitError,
    LynearmError,
    ServiceUnavailableError,
)
from lynearm.wire.scoring import (
    MAX_RESULT_BYTES,
    ScoredCompletion,
    ScoreSettings,
    StudentCompletion,
    TeacherInfo,
    completion_from_proto,
    failure_to_proto,
    result_bytes_bound,
    results_to_proto,
    settings_from_proto,
    teacher_info_to_proto,
)
from lynearm.wire.traces import SamplingParams, Trace

logger = logging.getLogger(__name__)

PACKED_BYTES = 512 << 10
"""Results that are ready are sent together up to about this size."""


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    """How one completion ended."""

    request_id: str
    reserved_bytes: int
    scored: ScoredCompletion | None
    error: LynearmError | None = None


class ScoreCall:
    """One call of Score.

    Args:
        table: Computes.
        teacher: Who scores.
        buffer_bytes: Of results that the client has not read yet.
    """

    def __init__(self, table: RequestTable, teacher: TeacherInfo, *, buffer_bytes: int) -> None:
        self._table = table
        self._teacher = teacher
        self._room = _Room(buffer_bytes)
        self._outcomes: asyncio.Queue[_Outcome | LynearmError | None] = asyncio.Queue()
        self._waiting: set[asyncio.Task[None]] = set()
        self._reading: asyncio.Task[None] | None = None
        self._is_draining = False

    def drain(self) -> None:
        """Read no more; the call ends when what was read is answered."""
        self._is_draining = True
        if self._reading is not None:
            self._reading.cancel()

    async def serve(self, requests: AsyncIterator[pb.ScoreRequest]) -> AsyncGenerator[pb.ScoreResponse, None]:
        """The call's responses.

        Raises:
            InvalidInputError: if the opening asks for what this teacher does not give.
            DrainingError: after everything that was read, if the server is on its way down.
        """
        settings = await self._opening(requests)
        yield pb.ScoreResponse(opened=pb.ScoreOpened(teacher=teacher_info_to_proto(self._teacher)))
        reading = self._reading = asyncio.create_task(self._read(requests, settings), name="read-completions")
        ending = asyncio.create_task(self._end(reading), name="end-completions")
        if self._is_draining:
            reading.cancel()
        try:
            async with aclosing(self._packed(settings)) as packed:
                async for outcomes in packed:
                    yield await asyncio.to_thread(self._response, outcomes, settings)
                    # Here the client has taken it: what it took of the buffer is free.
                    self._room.free(sum(outcome.reserved_bytes for outcome in outcomes))
            if self._is_draining:
                raise DrainingError(
                    "the teacher is about to stop", "ask another one, or this one's successor"
                )
        finally:
            tasks = [reading, ending, *self._waiting]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _opening(self, requests: AsyncIterator[pb.ScoreRequest]) -> ScoreSettings:
        first = await anext(requests, pb.ScoreRequest())
        if first.WhichOneof("message") != "open":
            raise InvalidInputError("Score must begin with an open", "send ScoreRequest.open first")
        settings = settings_from_proto(first.open)
        if settings.top_k > self._teacher.max_top_k:
            raise InvalidInputError(
                f"top_k {settings.top_k} is above the {self._teacher.max_top_k} of this teacher",
                "ask for less, or serve it with a larger --top-k",
            )
        return settings

    async def _read(self, requests: AsyncIterator[pb.ScoreRequest], settings: ScoreSettings) -> None:
        """Begin what the client sends, as far as there is room."""
        async for request in requests:
            if request.WhichOneof("message") != "completions":
                raise InvalidInputError("Score takes one open, then completions", "send no other message")
            for message in request.completions.completions:
                await self._begin(message, settings)

    async def _end(self, reading: asyncio.Task[None]) -> None:
        """Say that all is there, once everything that was read has ended."""
        await asyncio.wait([reading])
        error = None if reading.cancelled() else reading.exception()
        if isinstance(error, LynearmError):
            self._outcomes.put_nowait(error)
        elif error is not None:
            logger.debug("a client of Score is gone: %s", error)
        if self._waiting:
            await asyncio.wait(self._waiting)
        self._outcomes.put_nowait(None)

    async def _begin(self, message: pb.Completion, settings: ScoreSettings) -> None:
        reserved_bytes = 0
        try:
            completion = completion_from_proto(message)
            task = self._checked_task(completion, settings)
            size_bytes = _result_bytes(completion, settings)
            await self._room.take(size_bytes)
            reserved_bytes = size_bytes
            content = RequestContent(
                content_digest(task), lambda engine, key: engine.scoring.add(replace(task, request_id=key))
            )
            shared = await self._table.join((settings.session, completion.request_id), content)
        except LynearmError as error:
            self._outcomes.put_nowait(_Outcome(message.request_id, reserved_bytes, None, error))
            return
        waiting = asyncio.create_task(self._wait(shared, task, reserved_bytes), name="wait-score")
        self._waiting.add(waiting)
        waiting.add_done_callback(self._waiting.discard)
        # Not in the task: one that is cancelled before it begins would never leave.
        waiting.add_done_callback(lambda _: self._table.leave(shared))

    def _checked_task(self, completion: StudentCompletion, settings: ScoreSettings) -> ScoreTask:
        task = ScoreTask(
            completion.request_id,
            completion.prompt_token_ids,
            completion.completion_token_ids,
            settings.top_k,
            completion.chosen_ids,
            settings.temperature,
            settings.tail_draws,
        )
        spec = self._teacher.spec
        check_task(task, vocab_size=spec.vocab_size, max_model_len=spec.max_model_len)
        chosen = 0 if completion.chosen_ids is None else completion.chosen_ids.shape[1]
        if chosen > self._teacher.max_chosen_ids:
            raise InvalidInputError(
                f"request {completion.request_id!r}: {chosen} chosen ids at a position, this teacher takes "
                f"{self._teacher.max_chosen_ids}",
                "choose fewer, or serve it with a larger --max-chosen-ids",
            )
        size_bytes = result_bytes_bound(completion.completion_token_ids.size, settings, chosen)
        if size_bytes > MAX_RESULT_BYTES:
            raise LimitError(
                f"the result of request {completion.request_id!r} may have {size_bytes} bytes, "
                f"a message holds {MAX_RESULT_BYTES}",
                "ask for a smaller top_k or fewer chosen ids, or split the completion",
            )
        return task

    async def _wait(self, shared: SharedRequest, task: ScoreTask, reserved_bytes: int) -> None:
        try:
            result = await asyncio.shield(shared.result)
            if not isinstance(result, Score):  # names and digests tell scores from completions
                raise InternalError(f"request {task.request_id!r} gave no score")
            outcome = _Outcome(task.request_id, reserved_bytes, self._scored(task, result))
        except ServiceUnavailableError as error:
            # The engine is gone, and with it all that this call waits for: another teacher can do it.
            self._outcomes.put_nowait(error)
            return
        except LynearmError as error:
            outcome = _Outcome(task.request_id, reserved_bytes, None, error)
        self._outcomes.put_nowait(outcome)

    def _scored(self, task: ScoreTask, score: Score) -> ScoredCompletion:
        written = task.completion_token_ids
        is_whole = bool(written.size) and int(written[-1]) in self._teacher.tokenizer.eos_token_ids
        trace = Trace(
            task.request_id,
            np.zeros((0,), np.int32),
            written,
            score.sampled_logprobs,
            score.top_k,
            "stop" if is_whole else "length",
            sampling=SamplingParams(),
        )
        return ScoredCompletion(trace, score.chosen_logprobs)

    async def _packed(self, settings: ScoreSettings) -> AsyncGenerator[list[_Outcome], None]:
        """Outcomes as they come, those that are there already together."""
        has_ended = False
        while not has_ended:
            outcomes: list[_Outcome] = []
            size_bytes = 0
            found = await self._outcomes.get()
            while True:
                if isinstance(found, LynearmError):
                    raise found
                has_ended = found is None
                if found is not None:
                    outcomes.append(found)
                    size_bytes += _encoded_bytes(found, settings)
                if has_ended or size_bytes >= PACKED_BYTES or self._outcomes.empty():
                    break
                found = self._outcomes.get_nowait()
            if outcomes:
                yield outcomes

    def _response(self, outcomes: Sequence[_Outcome], settings: ScoreSettings) -> pb.ScoreResponse:
        scored = [outcome.scored for outcome in outcomes if outcome.scored is not None]
        results = pb.ScoreResults()
        if scored:
            results = results_to_proto(scored, settings, vocab_size=self._teacher.spec.vocab_size)
        results.failures.extend(
            failure_to_proto(outcome.request_id, outcome.error)
            for outcome in outcomes
            if outcome.error is not None
        )
        return pb.ScoreResponse(results=results)


class _Room:
    """Bytes of a buffer, for one who takes and one who frees."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._taken_bytes = 0
        self._freed = asyncio.Event()

    async def take(self, size_bytes: int) -> None:
        """Wait until there is room; what is larger than all of it passes alone."""
        while self._taken_bytes and self._taken_bytes + size_bytes > self._size_bytes:
            self._freed.clear()
            await self._freed.wait()
        self._taken_bytes += size_bytes

    def free(self, size_bytes: int) -> None:
        """Give bytes back."""
        self._taken_bytes -= size_bytes
        self._freed.set()


def content_digest(task: ScoreTask) -> bytes:
    """Equal for tasks that give equal scores alone."""
    digest = hashlib.sha256(b"score")
    chosen = np.zeros((0, 0), np.int32) if task.chosen_ids is None else task.chosen_ids
    facts = (task.top_k, task.temperature, task.tail_draws, task.prompt_token_ids.size, chosen.shape)
    digest.update(repr(facts).encode())
    for ids in (task.prompt_token_ids, task.completion_token_ids, chosen):
        digest.update(np.ascontiguousarray(ids).tobytes())
    return digest.digest()


def _result_bytes(completion: StudentCompletion, settings: ScoreSettings) -> int:
    """Memory of a result, as arrays."""
    chosen = 0 if completion.chosen_ids is None else completion.chosen_ids.shape[1]
    per_position = 12 + 8 * settings.top_k + 4 * settings.tail_draws + 8 * chosen
    return 1024 + completion.completion_token_ids.size * per_position


def _encoded_bytes(outcome: _Outcome, settings: ScoreSettings) -> int:
    if outcome.scored is None:
        return 1024
    chosen = outcome.scored.chosen_logprobs.shape[1]
    return result_bytes_bound(outcome.scored.trace.completion_token_ids.size, settings, chosen)
