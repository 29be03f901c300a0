"""The requests that a teacher's callers wait for, by name: none is computed twice, and none for nobody.

Invariants:

- Callers that ask for the same under the same name share one request of the engine, whether it is in flight
  or has ended lately; what else is asked under that name is refused.
- A request for which nobody waits any more is aborted in the engine before its next step.
- At most `max_in_flight` requests are in the engine; further callers wait, first come, first served.

Everything here lives on the event loop's thread; the engine's thread only calls in by `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from lynearm.teacher.engine import Completion, TeacherEngine
from lynearm.teacher.engine_loop import EngineLoop, EngineRequest, EngineResult
from lynearm.wire.errors import LynearmError, RequestConflictError

RequestName: TypeAlias = "tuple[str, str]"
"""Session and request id."""


@dataclass(frozen=True, slots=True, eq=False)
class RequestContent:
    """What is asked under a name."""

    digest: bytes
    """Equal for equal requests alone."""
    begin: Callable[[TeacherEngine, str], None]
    """Adds it to the engine, under the id that it is given; called on the engine's thread."""
    is_streamed: bool = False
    """Whether its tokens are followed as they come."""


class SharedRequest:
    """A request of the engine and those who wait for it.

    Args:
        name: By which callers know it.
        digest: Of its content.
    """

    def __init__(self, name: RequestName, digest: bytes) -> None:
        self.name = name
        self.digest = digest
        self.engine_id = ""
        self.waiters = 0
        self.token_ids: Sequence[int] = ()
        """All tokens so far of one that is streamed."""
        self.result: asyncio.Future[EngineResult] = asyncio.get_running_loop().create_future()
        # An error that nobody fetched, since nobody waits any more, is no news.
        self.result.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._changed = asyncio.Event()

    async def wait_change(self) -> None:
        """Return after more tokens, or the result, have come."""
        await self._changed.wait()

    def note_tokens(self, token_ids: Sequence[int]) -> None:
        """Take the tokens so far."""
        self.token_ids = token_ids
        self._wake()

    def end(self, result: EngineResult | LynearmError) -> None:
        """Take the result; further ones are ignored."""
        if self.result.done():
            return
        if isinstance(result, LynearmError):
            self.result.set_exception(result)
        else:
            self.result.set_result(result)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class RequestTable:
    """All requests of a teacher.

    Args:
        engine: Does the work.
        max_in_flight: Requests in the engine at the same time.
        recent_bytes: Of the results that are kept for callers who ask again.
    """

    def __init__(self, engine: EngineLoop, *, max_in_flight: int, recent_bytes: int) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(max_in_flight)
        self._requests: dict[RequestName, SharedRequest] = {}
        self._recent: OrderedDict[RequestName, int] = OrderedDict()
        self._recent_bytes = 0
        self._max_recent_bytes = recent_bytes
        self._numbers = itertools.count()
        self.begun = 0
        """Requests that were given to the engine so far."""

    async def join(self, name: RequestName, content: RequestContent) -> SharedRequest:
        """Wait for a request, which begins now unless it has before; `leave` must follow.

        Raises:
            RequestConflictError: if the name stands for another request.
        """
        found = self._find(name, content.digest)
        if found is None:
            await self._room.acquire()
            found = self._begin_unless_begun(name, content)
        found.waiters += 1
        return found

    def leave(self, request: SharedRequest) -> None:
        """Wait for a request no longer; the last one to leave aborts it, if it has not ended."""
        request.waiters -= 1
        if request.waiters or request.result.done():
            return
        self._engine.abort(request.engine_id)
        del self._requests[request.name]
        request.result.cancel()
        self._room.release()

    def _find(self, name: RequestName, digest: bytes) -> SharedRequest | None:
        found = self._requests.get(name)
        if found is not None and found.digest != digest:
            raise RequestConflictError(
                f"request {name[1]!r} of session {name[0]!r} was asked with other content before",
                "give each request an id of its own, or choose another session",
            )
        return found

    def _begin_unless_begun(self, name: RequestName, content: RequestContent) -> SharedRequest:
        """Begin a request that there is room for, unless somebody has begun it while there was none."""
        try:
            found = self._find(name, content.digest)
        except RequestConflictError:
            self._room.release()
            raise
        if found is not None:
            self._room.release()
            return found
        return self._begin(name, content)

    def _begin(self, name: RequestName, content: RequestContent) -> SharedRequest:
        request = SharedRequest(name, content.digest)
        request.engine_id = f"r{next(self._numbers)}"
        self._requests[name] = request
        self._engine.submit(
            EngineRequest(
                request.engine_id,
                begin=lambda engine: content.begin(engine, request.engine_id),
                on_end=self._posting(partial(self._ended, request)),
                on_tokens=self._posting(request.note_tokens) if content.is_streamed else None,
            )
        )
        self.begun += 1
        return request

    def _posting(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, called on the event loop's thread in place of the engine's."""

        def post(value: object) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(function, value)

        return post

    def _ended(self, request: SharedRequest, result: EngineResult | LynearmError) -> None:
        if request.result.done():  # everybody has left
            return
        self._room.release()
        request.end(result)
        if isinstance(result, LynearmError):
            # What failed may be tried again.
            del self._requests[request.name]
            return
        size_bytes = _size_bytes(result)
        self._recent[request.name] = size_bytes
        self._recent_bytes += size_bytes
        while self._recent_bytes > self._max_recent_bytes:
            name, freed_bytes = self._recent.popitem(last=False)
            self._recent_bytes -= freed_bytes
            del self._requests[name]


def _size_bytes(result: EngineResult) -> int:
    """Memory of a result, with a little for its names and objects."""
    arrays = [result.sampled_logprobs, result.top_k.token_ids, result.top_k.logprobs, result.top_k.tail_mass]
    arrays.append(result.token_ids if isinstance(result, Completion) else result.chosen_logprobs)
    if result.top_k.tail_draws is not None:
        arrays.append(result.top_k.tail_draws)
    return 1024 + sum(array.nbytes for array in arrays)
