"""The methods of TeacherService: requests in, responses out, and what goes wrong as a status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from lynearm.teacher.generate_calls import GenerateCalls
from lynearm.teacher.request_table import RequestTable
from lynearm.teacher.score_calls import ScoreCall
from lynearm.teacher.teacher_access import abort
from lynearm.teacher.tokenizer import PromptTokenizer
from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.wire.errors import (
    DrainingError,
    InternalError,
    InvalidInputError,
    LynearmError,
    ServiceUnavailableError,
)
from lynearm.wire.scoring import TeacherInfo, teacher_info_to_proto

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name

MAX_CALLS = 1024
"""At the same time; further ones are refused as unavailable."""

Request = TypeVar("Request", bound=Message)

# Any: the classes of context that gRPC makes are typed by request and response, which no function here reads.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class TeacherService:
    """Serves TeacherService.

    Args:
        table: Computes.
        teacher: Who answers.
        tokenizer: Its tokenizer.
        call_buffer_bytes: Results of one Score call that may wait until its client has read them.
    """

    def __init__(
        self,
        table: RequestTable,
        teacher: TeacherInfo,
        tokenizer: PromptTokenizer,
        *,
        call_buffer_bytes: int,
    ) -> None:
        self._table = table
        self._teacher = teacher
        self._generating = GenerateCalls(table, teacher, tokenizer)
        self._call_buffer_bytes = call_buffer_bytes
        self._scoring: set[ScoreCall] = set()
        self._calls = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False

    def drain(self) -> None:
        """Let no more calls in; those that are in end when what they have read is answered."""
        self._is_draining = True
        for call in self._scoring:
            call.drain()

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until no call is left; False when some still are after the time."""
        try:
            await asyncio.wait_for(self._is_idle.wait(), timeout_seconds)
        except TimeoutError:
            return False
        return True

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server is given."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetTeacher": grpc.unary_unary_rpc_method_handler(
                self._get_teacher, _parser(pb.GetTeacherRequest), _serialize
            ),
            "Score": grpc.stream_stream_rpc_method_handler(self._score, _parser(pb.ScoreRequest), _serialize),
            "Generate": grpc.unary_stream_rpc_method_handler(
                self._generate, _parser(pb.GenerateRequest), _serialize
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def _get_teacher(
        self, request: pb.GetTeacherRequest | _Malformed, context: Context
    ) -> pb.GetTeacherResponse | None:
        try:
            _checked(request)
            return pb.GetTeacherResponse(teacher=teacher_info_to_proto(self._teacher))
        except LynearmError as error:
            await abort(context, error)
        return None

    async def _score(self, requests: AsyncIterator[pb.ScoreRequest | _Malformed], context: Context) -> None:
        call = ScoreCall(self._table, self._teacher, buffer_bytes=self._call_buffer_bytes)
        self._scoring.add(call)
        try:
            await self._answer(lambda: call.serve(_checked_all(requests)), context)
        finally:
            self._scoring.discard(call)

    async def _generate(self, request: pb.GenerateRequest | _Malformed, context: Context) -> None:
        await self._answer(lambda: self._generating.serve(_checked(request)), context)

    async def _answer(self, serve: Callable[[], AsyncGenerator[Message, None]], context: Context) -> None:
        """Send a method's responses; what it raises becomes the call's status."""
        try:
            with self._call():
                # However the call ends, what its method holds is let go of now.
                async with aclosing(serve()) as responses:
                    async for response in responses:
                        await context.write(response)
        except LynearmError as error:
            logger.debug("%s: %s", type(error).__name__, error)
            await abort(context, error)
        except grpc.aio.BaseError as error:
            logger.debug("a call broke off: %s", error)
        except Exception:
            logger.exception("a call failed")
            await abort(context, InternalError("the teacher failed", "look at the teacher's log"))

    @contextmanager
    def _call(self) -> Generator[None]:
        if self._is_draining:
            raise DrainingError("the teacher is about to stop", "ask another one, or this one's successor")
        if self._calls >= MAX_CALLS:
            raise ServiceUnavailableError(f"the teacher has {MAX_CALLS} calls already", "try again later")
        self._calls += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._is_idle.set()


class _Malformed:
    """In place of a message that did not parse, which would make gRPC log a traceback and answer UNKNOWN."""


def _parser(message_class: type[Request]) -> Callable[[bytes], Request | _Malformed]:
    def parse(data: bytes) -> Request | _Malformed:
        try:
            return message_class.FromString(data)
        except DecodeError:
            return _Malformed()

    return parse


def _checked(request: Request | _Malformed) -> Request:
    if isinstance(request, _Malformed):
        raise InvalidInputError(
            "the request is not the message that this method takes", "use the protos of lynearm.v1"
        )
    return request


async def _checked_all(requests: AsyncIterator[Request | _Malformed]) -> AsyncIterator[Request]:
    async for request in requests:
        yield _checked(request)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
