"""A teacher's engine on a thread of its own, which takes requests from others while it works.

Invariants:

- The engine is made, used and closed on that thread alone.
- Each request ends once: with its result, with an error, or not at all once it was aborted.
- What is submitted or aborted takes effect before the next step.
- An engine that fails in the midst of a step fails every request, and takes no more: what it holds in memory
  cannot be trusted any longer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeAlias

from lynearm.teacher.engine import Completion, TeacherEngine
from lynearm.teacher.scoring import Score
from lynearm.wire.errors import LynearmError, ServiceUnavailableError

logger = logging.getLogger(__name__)

EngineResult: TypeAlias = "Completion | Score"


@dataclass(frozen=True, slots=True, eq=False)
class EngineRequest:
    """Something that the engine is to do. Its functions are called on the engine's thread; none may block."""

    request_id: str
    """Unique in the engine."""
    begin: Callable[[TeacherEngine], None]
    """Adds it to the engine, under its id."""
    on_end: Callable[[EngineResult | LynearmError], None]
    on_tokens: Callable[[Sequence[int]], None] | None = None
    """Told of all tokens so far, after each step but the last; of requests that are added as streamed."""


class EngineLoop:
    """Runs an engine. Any thread may submit and abort.

    Args:
        make_engine: Makes the engine; called on its thread.
        on_failure: Called on the engine's thread if the engine fails.
    """

    def __init__(
        self,
        make_engine: Callable[[], TeacherEngine],
        on_failure: Callable[[LynearmError], None] = lambda error: None,
    ) -> None:
        self._make_engine = make_engine
        self._on_failure = on_failure
        self._commands: SimpleQueue[Callable[[TeacherEngine], None]] = SimpleQueue()
        self._requests: dict[str, EngineRequest] = {}
        self._is_closing = False
        self._failure: LynearmError | None = None
        self._made: SimpleQueue[TeacherEngine | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="teacher-engine", daemon=True)
        self.steps = 0
        """Steps of the engine so far."""

    @property
    def failure(self) -> LynearmError | None:
        """Why the engine takes no more; None while it does."""
        return self._failure

    @property
    def unfinished(self) -> int:
        """Requests that the engine works on."""
        return len(self._requests)

    def start(self) -> TeacherEngine:
        """Make the engine; blocks until it is ready. Of what comes back, use only what does not change.

        Raises:
            LynearmError: as the engine's constructor.
        """
        self._thread.start()
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def submit(self, request: EngineRequest) -> None:
        """Begin a request; how it ends, it is told."""
        self._commands.put(lambda engine: self._begin(engine, request))

    def abort(self, request_id: str) -> None:
        """End a request, which is told nothing more; no harm if it has ended."""
        self._commands.put(lambda engine: self._abort(engine, request_id))

    def close(self) -> None:
        """End every request as unavailable, and the thread; blocks for the rest of a step."""
        if not self._thread.is_alive():
            return
        self._commands.put(self._stop)
        self._thread.join()

    def _run(self) -> None:
        try:
            engine = self._make_engine()
        except BaseException as error:
            self._made.put(error)
            return
        self._made.put(engine)
        try:
            while not self._is_closing:
                self._obey(engine)
                if self._failure is None and engine.unfinished:
                    self._step(engine)
                self._deliver_scores(engine)
        finally:
            engine.close()

    def _obey(self, engine: TeacherEngine) -> None:
        """Do what was asked for meanwhile; without work, wait for something."""
        if self._failure is not None or not engine.unfinished:
            self._commands.get()(engine)
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command(engine)

    def _step(self, engine: TeacherEngine) -> None:
        try:
            completions = engine.step()
        # Whatever vLLM raises: nothing of it may end the thread without a word.
        except Exception as error:
            logger.exception("the teacher's engine failed")
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self._fail(
                ServiceUnavailableError(f"the teacher's engine failed: {reason}", "look at the teacher's log")
            )
            return
        self.steps += 1
        for request_id, token_ids in engine.streamed_token_ids.items():
            request = self._requests.get(request_id)
            if request is not None and request.on_tokens is not None:
                request.on_tokens(token_ids)
        for completion in completions:
            self._end(completion.request_id, completion)

    def _deliver_scores(self, engine: TeacherEngine) -> None:
        for score in engine.scoring.take_finished():
            self._end(score.request_id, score)

    def _begin(self, engine: TeacherEngine, request: EngineRequest) -> None:
        if self._failure is not None:
            request.on_end(self._failure)
            return
        try:
            request.begin(engine)
        except LynearmError as error:
            request.on_end(error)
            return
        self._requests[request.request_id] = request

    def _abort(self, engine: TeacherEngine, request_id: str) -> None:
        if self._requests.pop(request_id, None) is not None and self._failure is None:
            engine.abort([request_id])

    def _end(self, request_id: str, result: EngineResult | LynearmError) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            request.on_end(result)

    def _fail(self, error: LynearmError) -> None:
        self._failure = error
        for request_id in list(self._requests):
            self._end(request_id, error)
        self._on_failure(error)

    def _stop(self, engine: TeacherEngine) -> None:
        self._is_closing = True
        running = list(self._requests)
        for request_id in running:
            self._end(request_id, ServiceUnavailableError("the teacher was stopped", "ask another one"))
        if running and self._failure is None:
            engine.abort(running)
