"""What all calls have in common: the bound on their number, and how what they raise becomes a status.

A server that is full refuses at once, as unavailable, so that a client turns elsewhere or waits with its
own patience; gRPC's own bound would leave the call hanging without a word.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio

from lynearm.traces.current_call import note_end
from lynearm.wire.errors import InternalError, LynearmError, ServiceUnavailableError
from lynearm.wire.status import reason_of, shorten, trailing_metadata

logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")

# Any: the classes of context that gRPC makes are typed by request and response, which no function here reads.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class CallGate:
    """Lets calls in while there is room, answers what they raise, and knows when none is left.

    Args:
        max_calls: Calls at the same time.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal: LynearmError | None = None

    def close(self, reason: LynearmError) -> None:
        """Let no more calls in; those that are in go on."""
        self._refusal = reason

    def guard(
        self, handler: Callable[[Request, Context], Awaitable[Response]]
    ) -> Callable[[Request, Context], Awaitable[Response | None]]:
        """The handler as gRPC may call it: it raises nothing but gRPC's own abort and cancellation."""

        async def call(request: Request, context: Context) -> Response | None:
            if self._refusal is not None:
                await abort(context, self._refusal)
            if self._calls >= self._max_calls:
                await abort(context, _too_many(self._max_calls))
            self._calls += 1
            self._idle.clear()
            try:
                return await _answer(handler, request, context)
            finally:
                self._calls -= 1
                if not self._calls:
                    self._idle.set()

        return call

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until no call is left; False when some still are after the time."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_seconds)
        except TimeoutError:
            return False
        return True


async def abort(context: Context, error: LynearmError) -> NoReturn:
    """End a call with the status of an error, and what a client needs to raise it again."""
    code = grpc.StatusCode[error.status_code]
    note_end(error.status_code, reason_of(type(error)))
    await context.abort(code, shorten(error.message), trailing_metadata(error))


async def _answer(
    handler: Callable[[Request, Context], Awaitable[Response]], request: Request, context: Context
) -> Response | None:
    try:
        return await handler(request, context)
    except LynearmError as error:
        logger.debug("%s: %s", type(error).__name__, error)
        await abort(context, error)
    except grpc.aio.BaseError as error:
        # The peer is gone: there is nobody to answer.
        logger.debug("a call broke off: %s", error)
        return None
    except Exception:
        logger.exception("a call failed")
        await abort(context, InternalError("the server failed", "look at the server's log"))


def _too_many(max_calls: int) -> ServiceUnavailableError:
    return ServiceUnavailableError(
        f"the trace service has {max_calls} calls already", "try again later, or raise its max_calls"
    )
