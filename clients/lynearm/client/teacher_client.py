"""The synchronous client of a served teacher: scores completions of a student, and answers prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeAlias

import grpc

from lynearm.client.calls import get_teacher
from lynearm.client.client_settings import DEFAULT_TIMEOUT_SECONDS
from lynearm.client.credentials import Credentials
from lynearm.client.endpoints import TEACHER_SERVICE
from lynearm.client.generation import AnswerSoFar, GenerateOptions, Generation, PromptContent
from lynearm.client.interrupts import Interruptible
from lynearm.client.methods import ResponseStream
from lynearm.client.retries import Retries, service_hung_up
from lynearm.client.score_window import OnFailure, ScoreWindow
from lynearm.client.sync_client import SyncClient
from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.wire.errors import ServiceUnavailableError
from lynearm.wire.scoring import (
    ScoredCompletion,
    ScoreSettings,
    StudentCompletion,
    TeacherInfo,
)

DEFAULT_TEACHER_TARGET = "127.0.0.1:7412"

DEFAULT_IN_FLIGHT = 256
"""Completions that are sent and not answered yet: four batches of a teacher."""

Requests: TypeAlias = "SimpleQueue[pb.ScoreRequest | None]"


class TeacherClient(SyncClient):
    """A client of one teacher, or of several that serve the same model. Threads may share it.

    Single calls raise `ServiceUnavailableError` after about a second without a teacher, once every address
    was tried. Scoring waits for one, and sends again what was not answered, to whichever address answers;
    what a teacher has computed already it does not compute twice.

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

    def describe(self, *, timeout_seconds: float | None = None) -> TeacherInfo:
        """Who the teacher is, and what it takes."""
        return self._ask(get_teacher(), timeout_seconds)

    def score(
        self,
        completions: Iterable[StudentCompletion],
        settings: ScoreSettings | None = None,
        *,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        timeout_seconds: float | None = None,
        on_failure: OnFailure | None = None,
    ) -> Iterator[ScoredCompletion]:
        """What the teacher thinks of completions, in the order in which it has scored them.

        Completions are taken as there is room for more, on this thread, while results are awaited: a slow
        iterable holds the results up that come meanwhile. An iteration that is left early ends what is under
        way.

        Args:
            completions: What is to be scored; each with a request id of its own.
            settings: What is wanted of each.
            max_in_flight: Completions that may be sent and not answered.
            timeout_seconds: Deadline of the whole iteration; None: none.
            on_failure: Told of completions that cannot be scored, and why; the iteration goes on. None: the
                first of them is raised.

        Raises:
            InvalidInputError: if a completion, or what is asked for, is not what the teacher takes.
            RequestConflictError: if the settings name a session in which a request id stood for another one.
            DeadlineError: after `timeout_seconds`.
            ServiceUnavailableError: if the teacher stayed away longer than the client's patience.
        """
        window = ScoreWindow(
            completions, settings or ScoreSettings(), size=max_in_flight, on_failure=on_failure
        )
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        retries = self._long_retries("scoring")
        while True:
            target = self._endpoints.current
            try:
                yield from self._score_connected(window, target, deadline, retries)
                return
            except (grpc.RpcError, ServiceUnavailableError) as failure:
                pause_seconds = retries.failed(failure, target)
            left_seconds = math.inf if deadline is None else max(deadline - time.monotonic(), 0.0)
            time.sleep(min(pause_seconds, left_seconds))

    def generate(
        self,
        prompt: PromptContent,
        options: GenerateOptions | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Generation:
        """The teacher's answer to a prompt: an iterator of its text, and when that has ended, all of it.

        Args:
            prompt: A text, a chat as a sequence of {"role": …, "content": …}, or token ids.
            options: How to draw, and whether the trace is wanted.
            timeout_seconds: Deadline of the whole answer; None: none.
        """
        return Generation(
            self._connection,
            AnswerSoFar(prompt, options or GenerateOptions()),
            retries=self._short_retries(),
            timeout_seconds=timeout_seconds,
        )

    def _score_connected(
        self, window: ScoreWindow, target: str, deadline: float | None, retries: Retries
    ) -> Iterator[ScoredCompletion]:
        requests: Requests = SimpleQueue()
        for message in window.open():
            requests.put(message)
        timeout_seconds = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        call = self._connection.score(target, _until_none(requests), timeout_seconds)
        try:
            while True:
                for message in window.fill():
                    requests.put(message)
                if window.has_all:
                    requests.put(None)
                if window.is_complete:
                    return
                response = _next_or_none(call)
                if response is None:
                    raise service_hung_up(target, TEACHER_SERVICE)
                window.receive(response)
                retries.succeeded()
                yield from window.take_scored()
        finally:
            requests.put(None)
            with Interruptible():
                call.cancel()


def _next_or_none(call: ResponseStream[pb.ScoreResponse]) -> pb.ScoreResponse | None:
    with Interruptible() as interrupt:
        interrupt.wake_by(call.cancel)
        return next(call, None)


def _until_none(requests: Requests) -> Iterator[pb.ScoreRequest]:
    while (request := requests.get()) is not None:
        yield request
