"""The asynchronous client of a served teacher: the surface of `TeacherClient`, for an event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Self, TypeVar

import grpc

from lynearm.client.async_client import AsyncClient
from lynearm.client.async_connection import AsyncConnection, AsyncResponses, is_being_cancelled, is_end
from lynearm.client.calls import get_teacher
from lynearm.client.client_settings import DEFAULT_TIMEOUT_SECONDS
from lynearm.client.credentials import Credentials
from lynearm.client.endpoints import TEACHER_SERVICE
from lynearm.client.generation import Answer, AnswerSoFar, GenerateOptions, PromptContent
from lynearm.client.retries import Retries, service_hung_up
from lynearm.client.score_window import OnFailure, ScoreWindow
from lynearm.client.teacher_client import DEFAULT_IN_FLIGHT, DEFAULT_TEACHER_TARGET
from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.wire.errors import ServiceUnavailableError
from lynearm.wire.scoring import ScoredCompletion, ScoreSettings, StudentCompletion, TeacherInfo

Response = TypeVar("Response")


class AsyncTeacherClient(AsyncClient):
    """A client of one teacher, or of several that serve the same model, for asyncio.

    Args:
        target: host:port of the teacher, several as a sequence, or with commas.
        timeout_seconds: Deadline of each single call, tries and waits included.
        patience_seconds: How long scoring waits for a teacher that went away.
        credentials: TLS and token; None: what the environment says (`lynearm.client.credentials`).

    Raises:
        InvalidInputError: if an address is not host:port.
        ConfigError: if a token would go out in plain text.
    """

    service = TEACHER_SERVICE

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TEACHER_TARGET,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        patience_seconds: float = math.inf,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(
            target,
            timeout_seconds=timeout_seconds,
            patience_seconds=patience_seconds,
            credentials=credentials,
        )

    async def describe(self, *, timeout_seconds: float | None = None) -> TeacherInfo:
        """As `TeacherClient.describe`."""
        return await self._ask(get_teacher(), timeout_seconds)

    async def score(
        self,
        completions: Iterable[StudentCompletion],
        settings: ScoreSettings | None = None,
        *,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        timeout_seconds: float | None = None,
        on_failure: OnFailure | None = None,
    ) -> AsyncGenerator[ScoredCompletion, None]:
        """As `TeacherClient.score`. The iterable is read on the event loop, which must not wait for it."""
        window = ScoreWindow(
            completions, settings or ScoreSettings(), size=max_in_flight, on_failure=on_failure
        )
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        retries = self._long_retries("scoring")
        while True:
            target = self._endpoints.current
            try:
                async with aclosing(self._score_connected(window, target, deadline, retries)) as scores:
                    async for scored in scores:
                        yield scored
                return
            except (grpc.RpcError, ServiceUnavailableError) as failure:
                pause_seconds = retries.failed(failure, target)
            left_seconds = math.inf if deadline is None else max(deadline - time.monotonic(), 0.0)
            await asyncio.sleep(min(pause_seconds, left_seconds))

    def generate(
        self,
        prompt: PromptContent,
        options: GenerateOptions | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> AsyncGeneration:
        """As `TeacherClient.generate`; not awaited."""
        return AsyncGeneration(
            self._connection,
            AnswerSoFar(prompt, options or GenerateOptions()),
            retries=self._short_retries(),
            timeout_seconds=timeout_seconds,
        )

    async def _score_connected(
        self, window: ScoreWindow, target: str, deadline: float | None, retries: Retries
    ) -> AsyncGenerator[ScoredCompletion, None]:
        requests: asyncio.Queue[pb.ScoreRequest | None] = asyncio.Queue()
        for message in window.open():
            requests.put_nowait(message)
        timeout_seconds = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        call = self._connection.score(target, _until_none(requests), timeout_seconds)
        try:
            while True:
                for message in window.fill():
                    requests.put_nowait(message)
                if window.has_all:
                    requests.put_nowait(None)
                if window.is_complete:
                    return
                window.receive(await _read(call, target))
                retries.succeeded()
                for scored in window.take_scored():
                    yield scored
        finally:
            requests.put_nowait(None)
            call.cancel()


class AsyncGeneration:
    """An asynchronous iterator over the text of an answer: the twin of `Generation`."""

    def __init__(
        self,
        connection: AsyncConnection,
        so_far: AnswerSoFar,
        *,
        retries: Retries,
        timeout_seconds: float | None,
    ) -> None:
        self._connection = connection
        self._so_far = so_far
        self._retries = retries
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._call: AsyncResponses[pb.GenerateResponse] | None = None
        self._target = ""
        self._is_closed = False

    def __aiter__(self) -> Self:
        """The generation itself."""
        return self

    async def __anext__(self) -> str:
        """As `Generation.__next__`. Cancelled, the answer ends where it is."""
        while self._so_far.answer is None and not self._is_closed:
            try:
                piece = self._so_far.take(await _read(self._connected(), self._target))
            except (grpc.RpcError, ServiceUnavailableError) as failure:
                self._hang_up()
                if self._is_closed:
                    break
                if self._so_far.pieces:
                    raise self._retries.final(failure, self._target) from failure
                await asyncio.sleep(self._retries.failed(failure, self._target))
                continue
            if piece:
                return piece
        raise StopAsyncIteration

    async def answer(self) -> Answer:
        """As `Generation.answer`."""
        async for _ in self:
            pass
        return self._so_far.whole()

    async def __aenter__(self) -> Self:
        """The generation itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """As `Generation.close`."""
        self._is_closed = True
        self._hang_up()

    def _connected(self) -> AsyncResponses[pb.GenerateResponse]:
        if self._call is None:
            self._target = self._connection.endpoints.current
            left_seconds = None if self._deadline is None else max(self._deadline - time.monotonic(), 0)
            self._call = self._connection.generate(self._target, self._so_far.request, left_seconds)
        return self._call

    def _hang_up(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


async def _read(call: AsyncResponses[Response], target: str) -> Response:
    try:
        response = await call.read()
    except asyncio.CancelledError as error:
        if is_being_cancelled():
            raise
        # Nobody cancelled this task: the call was, with its channel.
        raise service_hung_up(target, TEACHER_SERVICE) from error
    if is_end(response):
        raise service_hung_up(target, TEACHER_SERVICE)
    return response


async def _until_none(requests: asyncio.Queue[pb.ScoreRequest | None]) -> AsyncIterator[pb.ScoreRequest]:
    while (request := await requests.get()) is not None:
        yield request
