"""One answer of a teacher, as it comes and as a whole."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeAlias, cast
from uuid import uuid4

import grpc
import numpy as np

from lynearm.client.connection import Connection
from lynearm.client.interrupts import Interruptible
from lynearm.client.methods import ResponseStream
from lynearm.client.retries import Retries, service_hung_up
from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.v1 import trace_pb2
from lynearm.wire.blocks import MODE_TO_PROTO
from lynearm.wire.errors import InvalidInputError, PreconditionError, ServiceUnavailableError
from lynearm.wire.sampling import sampling_to_proto
from lynearm.wire.scoring import finish_reason_from_proto
from lynearm.wire.specs import CodecMode
from lynearm.wire.traces import FinishReason, Int32Array, SamplingParams, Trace

PromptContent: TypeAlias = "str | Sequence[Mapping[str, str]] | Sequence[int] | Int32Array"
"""A text, a chat as a sequence of {"role": …, "content": …}, or token ids."""


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How a teacher is to answer."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    """max_tokens 0: as long as the context allows."""
    trace_top_k: int | None = None
    """Entries kept per position of the trace; None: no trace."""
    codec: CodecMode = "fine"
    """Encoding of the trace."""
    session: str = ""
    """Within which requests are named; empty: one that nobody else has."""
    request_id: str = "1"
    """Whoever asks again under the same name gets the same answer, as long as the teacher remembers it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All of an answer."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    """Tokens, an end token included."""
    trace: Trace | None
    """Where it was asked for."""
    stop_string: str = ""
    """The stop string that ended it; the text ends with the token that completed it. Empty: none did."""


class AnswerSoFar:
    """What is asked, and what of the answer has come; no I/O.

    Args:
        prompt: What is asked.
        options: How to answer.
    """

    def __init__(self, prompt: PromptContent, options: GenerateOptions) -> None:
        self.request = _request(prompt, options)
        self.pieces: list[str] = []
        self.answer: Answer | None = None
        """All of it, after its end."""

    def take(self, response: pb.GenerateResponse) -> str:
        """The piece of text in a response; empty where there is none."""
        if response.WhichOneof("message") == "end":
            self.answer = self._end(response.end)
            return ""
        if response.text.text:
            self.pieces.append(response.text.text)
        return response.text.text

    def whole(self) -> Answer:
        """The answer.

        Raises:
            PreconditionError: if it was closed before its end.
        """
        if self.answer is None:
            raise PreconditionError("the generation was closed before its end", "ask again")
        return self.answer

    def _end(self, end: pb.GenerateEnd) -> Answer:
        trace = None
        if end.HasField("block"):
            from lynearm.wire.codec import decode_block  # brings numba, for which others need not wait

            (trace,) = decode_block(end.block.SerializeToString())
        return Answer(
            "".join(self.pieces),
            finish_reason_from_proto(end.finish_reason),
            end.prompt_token_count,
            end.completion_token_count,
            trace,
            end.stop_string,
        )


class Generation:
    """An iterator over the text of an answer. Made by `TeacherClient.generate`.

    A teacher that is away is tried again until the first piece has come; what breaks off later is raised.
    """

    def __init__(
        self,
        connection: Connection,
        so_far: AnswerSoFar,
        *,
        retries: Retries,
        timeout_seconds: float | None,
    ) -> None:
        self._connection = connection
        self._so_far = so_far
        self._retries = retries
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._call: ResponseStream[pb.GenerateResponse] | None = None
        self._target = ""
        self._is_closed = False

    def __iter__(self) -> Iterator[str]:
        """The generation itself."""
        return self

    def __next__(self) -> str:
        """The next piece of the text; waits for it.

        Raises:
            InvalidInputError: if the prompt cannot be answered as it is asked for.
            RequestConflictError: if the request's name stands for another one.
            DeadlineError: after the timeout.
            ServiceUnavailableError: if no teacher answers, or it went away.
        """
        while self._so_far.answer is None and not self._is_closed:
            try:
                piece = self._so_far.take(self._read())
            except (grpc.RpcError, ServiceUnavailableError) as failure:
                self._hang_up()
                if self._is_closed:
                    break
                if self._so_far.pieces:
                    raise self._retries.final(failure, self._target) from failure
                time.sleep(self._retries.failed(failure, self._target))
                continue
            if piece:
                return piece
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """All of the answer; reads what is still to come.

        Raises:
            LynearmError: as iterating does.
            PreconditionError: if the generation was closed before.
        """
        for _ in self:
            pass
        return self._so_far.whole()

    def __enter__(self) -> Self:
        """The generation itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """End the answer where it is: the teacher stops to work on it."""
        self._is_closed = True
        self._hang_up()

    def _read(self) -> pb.GenerateResponse:
        with Interruptible() as interrupt:
            if self._call is None:
                self._target = self._connection.endpoints.current
                left_seconds = None if self._deadline is None else max(self._deadline - time.monotonic(), 0)
                self._call = self._connection.generate(self._target, self._so_far.request, left_seconds)
            interrupt.wake_by(self._call.cancel)
            response = next(self._call, None)
        if response is None:
            raise service_hung_up(self._target, self._connection.endpoints.service)
        return response

    def _hang_up(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            with Interruptible():
                call.cancel()


def _request(prompt: PromptContent, options: GenerateOptions) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        session=options.session or f"generate-{uuid4().hex}",
        request_id=options.request_id,
        sampling=_sampling(options.sampling),
        with_trace=options.trace_top_k is not None,
        top_k=options.trace_top_k or 0,
        codec_mode=MODE_TO_PROTO[options.codec],
    )
    _put_prompt(request, prompt)
    return request


def _sampling(sampling: SamplingParams) -> trace_pb2.SamplingParams:
    try:
        return sampling_to_proto(sampling)
    except ValueError as error:
        raise InvalidInputError(f"sampling: {error}") from error


def _put_prompt(request: pb.GenerateRequest, prompt: PromptContent) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    if len(prompt) and isinstance(prompt[0], Mapping):
        for turn in cast("Sequence[Mapping[str, str]]", prompt):
            if set(turn) != {"role", "content"}:
                raise InvalidInputError(f"a turn of a chat has {sorted(turn)}, expected role and content")
            request.chat.turns.add(role=turn["role"], content=turn["content"])
        return
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 1 << 31:
        raise InvalidInputError(
            "the prompt is neither a text, nor a chat, nor token ids", "give at least one token id"
        )
    request.tokens.token_ids.extend(int(token_id) for token_id in ids.tolist())
