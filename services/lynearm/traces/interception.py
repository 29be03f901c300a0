"""What happens to every call before it reaches its method: who calls, may they, and is the request one.

Invariants:

- No method runs for a caller whom its rule does not admit, and none reads a first message that names a stream
  which the caller may not touch.
- A request that is no message of its type never raises inside gRPC, which would log a traceback and answer
  UNKNOWN; it is refused as invalid.
- A long call ends when its token does.
- Observers see every call that has a method, refused ones too, with the status that it ends with.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from lynearm.traces.access import Rule, check_caller, check_target, is_open
from lynearm.traces.callers import AnonymousCallers, Callers
from lynearm.traces.calls import Context, abort
from lynearm.traces.current_call import Call, Metadata, begin_call
from lynearm.traces.limits import CallerQuota
from lynearm.traces.observation import Observer, heeding
from lynearm.traces.tokens import Caller
from lynearm.wire.errors import AuthenticationError, InvalidInputError, LynearmError

logger = logging.getLogger(__name__)

LAST_WRITE_SECONDS = 2.0
"""How long a call whose token ended waits for its peer to take the message under way."""

# Any: handlers and messages of every method pass through here; gRPC types them by their serialisers.
Untyped: TypeAlias = Any
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Stands before every method of every service of a server.

    Args:
        callers: Whom the server knows.
        max_open_calls: Calls at the same time from one address to what anybody may call.
        observers: Who is told of each call.
    """

    def __init__(self, callers: Callers, *, max_open_calls: int, observers: Sequence[Observer] = ()) -> None:
        self.observers = tuple(observers)
        self.observers_of_received = heeding(observers, "received")
        self.observers_of_sent = heeding(observers, "sent")
        self._callers = callers
        self._strangers = AnonymousCallers(CallerQuota(max_open_calls))

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's handler, guarded; None where there is no such method, which gRPC answers."""
        handler: Untyped = await continuation(handler_call_details)
        if handler is None:
            return None
        details: Untyped = handler_call_details
        method = _GuardedMethod(self, details.method, details.invocation_metadata or (), handler)
        make: Untyped = _HANDLER_MAKERS[handler.request_streaming, handler.response_streaming]
        parse = _tolerant(handler.request_deserializer)
        return cast("Handler", make(method.serve, parse, handler.response_serializer))

    def identify(self, method: str, metadata: Metadata, peer: str) -> Caller:
        """Who makes a call; for what anybody may call, nobody that is known.

        Raises:
            AuthenticationError: if the method asks for a token, and none that is known came.
        """
        return (self._strangers if is_open(method) else self._callers).identify(metadata, peer)


class _GuardedMethod:
    """One call to one method."""

    def __init__(self, interceptor: CallInterceptor, name: str, metadata: Metadata, handler: Untyped) -> None:
        self._interceptor = interceptor
        self._name = name
        self._metadata = metadata
        self._behaviour: Untyped = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        self._takes_stream = bool(handler.request_streaming)
        self._is_long = bool(handler.request_streaming or handler.response_streaming)

    async def serve(self, request: Untyped, context: Context) -> Untyped:
        """Answer, or end the call with the status of a typed error."""
        call = Call(self._name, self._is_long, self._metadata)
        begin_call(call)
        for observer in self._interceptor.observers:
            observer.begin_call(call)
        try:
            return await self._answer(call, request, context)
        except asyncio.CancelledError:
            call.status = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            if call.status == "OK":  # what is not ours ended the call
                call.status = _status_name(context)
            raise
        finally:
            for observer in self._interceptor.observers:
                observer.end_call(call)

    async def _answer(self, call: Call, request: Untyped, context: Context) -> Untyped:
        try:
            caller = call.caller = self._interceptor.identify(self._name, self._metadata, context.peer())
            with caller.limits.call(caller.name):
                return await self._serve(call, caller, request, context)
        except LynearmError as error:
            logger.debug("%s: %s: %s", self._name, type(error).__name__, error)
            await abort(context, error)

    async def _serve(self, call: Call, caller: Caller, request: Untyped, context: Context) -> Untyped:
        if is_open(self._name):
            return await self._behaviour(_checked(request), context)
        rule = check_caller(caller, self._name)
        guarded = _GuardedContext(context, call, caller=caller, rule=rule, interceptor=self._interceptor)
        if self._takes_stream:
            request = guarded.messages()
        else:
            await guarded.take(request)
        work = _run(self._behaviour, request, guarded)
        response = await (_run_until_revoked(caller, work, guarded.writing) if self._is_long else work)
        if not self._is_long:
            guarded.note_sent(response)
        return response


class _GuardedContext:
    """A call's context that looks at each message before the method sees it, and counts what passes."""

    def __init__(
        self, context: Context, call: Call, *, caller: Caller, rule: Rule, interceptor: CallInterceptor
    ) -> None:
        self._context = context
        self._call = call
        self._caller = caller
        self._rule = rule
        self._observers_of_received = interceptor.observers_of_received
        self._observers_of_sent = interceptor.observers_of_sent
        self.writing = asyncio.Lock()
        """Held while a message goes out."""

    async def read(self) -> Untyped:
        """The next message, or grpc.aio.EOF."""
        message: Untyped = await self._context.read()
        if message is not grpc.aio.EOF:
            await self.take(message)
        return message

    async def write(self, message: Untyped) -> None:
        """Send a message."""
        async with self.writing:
            await self._context.write(message)
        self.note_sent(message)

    async def messages(self) -> AsyncIterator[Untyped]:
        """What a method gets that iterates over its requests."""
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    async def take(self, message: Untyped) -> None:
        """Let a message through.

        Raises:
            LynearmError: it is malformed, a first one about a stream of others, or one too many.
        """
        _checked(message)
        size_bytes = _size_bytes(message)
        self._call.received_bytes += size_bytes
        for observer in self._observers_of_received:
            observer.received(self._call, size_bytes)
        if self._rule.target is not None and self._call.target is None:
            target = self._rule.target(message)
            check_target(self._caller, self._rule, target)
            self._call.target = target
        if self._rule.is_metered:
            await self._caller.limits.pay_for_publish(self._caller.name, size_bytes)

    def note_sent(self, message: Untyped) -> None:
        """Count a message that went out."""
        size_bytes = _size_bytes(message)
        self._call.sent_bytes += size_bytes
        if self._rule.read_offset is not None and self._observers_of_sent:
            self._call.sent_offset = self._rule.read_offset(message)
        for observer in self._observers_of_sent:
            observer.sent(self._call, size_bytes)

    def __getattr__(self, name: str) -> Untyped:
        return getattr(self._context, name)


@dataclass(frozen=True, slots=True)
class _Malformed:
    """In place of a message that did not parse."""


def _tolerant(parse: Callable[[bytes], Untyped] | None) -> Callable[[bytes], Untyped] | None:
    if parse is None:
        return None

    def parse_or_mark(data: bytes) -> Untyped:
        try:
            return parse(data)
        except DecodeError:
            return _Malformed()

    return parse_or_mark


def _checked(message: Untyped) -> Untyped:
    if isinstance(message, _Malformed):
        raise InvalidInputError(
            "the request is not the message that this method takes", "use the protos of lynearm.v1"
        )
    return message


def _size_bytes(message: Untyped) -> int:
    return len(message) if isinstance(message, bytes) else int(message.ByteSize())


def _status_name(context: Context) -> str:
    code: Untyped = context.code()
    return str(code.name) if isinstance(code, grpc.StatusCode) else "UNKNOWN"


async def _run(behaviour: Untyped, request: Untyped, context: _GuardedContext) -> Untyped:
    if inspect.isasyncgenfunction(behaviour):
        async for response in behaviour(request, context):
            await context.write(response)
        return None
    return await behaviour(request, context)


async def _run_until_revoked(caller: Caller, work: Awaitable[Untyped], writing: asyncio.Lock) -> Untyped:
    working = asyncio.ensure_future(work)
    ending = asyncio.ensure_future(caller.wait_revoked())
    try:
        await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            # gRPC takes no status for a call that has a message under way.
            with suppress(TimeoutError):
                await asyncio.wait_for(writing.acquire(), LAST_WRITE_SECONDS)
        if not working.done():
            raise AuthenticationError(
                "the token was revoked or has expired", "ask whoever runs the service for a new one"
            )
        return working.result()
    finally:
        for task in (working, ending):
            task.cancel()
        # Nothing of the call may run on after its end.
        await asyncio.gather(working, ending, return_exceptions=True)


_HANDLER_MAKERS: dict[tuple[bool, bool], Callable[..., object]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
