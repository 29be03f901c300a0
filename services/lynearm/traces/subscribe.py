"""Calls that read blocks: Subscribe, which follows a stream under credit, and FetchBlocks."""

from __future__ import annotations

import asyncio

import grpc.aio

from lynearm.traces.backend import Backend
from lynearm.traces.calls import Context
from lynearm.traces.catalog import StreamRecord
from lynearm.traces.delivery import Credit, Delivery, Reading
from lynearm.traces.reader import READ_BYTES, offset_expired
from lynearm.traces.tail import run_until_end
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import (
    DeadlineError,
    InvalidInputError,
    LynearmError,
    OffsetNotFoundError,
    PreconditionError,
)
from lynearm.wire.frames import frame_fetch_response
from lynearm.wire.labels import filter_from_proto
from lynearm.wire.specs import check_name
from lynearm.wire.traces import Cursor

OPEN_SECONDS = 30.0
"""How long a call may take to say what it is."""


class SubscribeCall:
    """Serves one subscriber from its opening to its end.

    Args:
        backend: What it reads from.
        context: The call, whose responses are bytes.
    """

    def __init__(self, backend: Backend, context: Context) -> None:
        self._backend = backend
        self._context = context

    async def run(self) -> None:
        """Serve the call.

        Raises:
            LynearmError: why the call ends, unless the subscriber has all that it asked for.
        """
        opening = await self._read_opening()
        wanted = filter_from_proto(opening.filter) if opening.HasField("filter") else None
        record, tail = await self._backend.watch_stream(opening.stream)
        start = await self._find_start(opening, record)
        end = None if opening.follow else record.info.next_offset
        credit = Credit(opening.credit_bytes)
        reading = Reading(record, tail, start, end, wanted, opening.skip_damaged)
        granting = asyncio.create_task(self._read_grants(credit))
        try:
            delivery = Delivery(self._backend, self._context, reading, credit)
            await run_until_end(tail, delivery.run(), writing=delivery.writing)
        finally:
            granting.cancel()
            await asyncio.gather(granting, return_exceptions=True)

    async def _read_opening(self) -> pb.SubscribeOpen:
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                message = await self._context.read()
        except TimeoutError as error:
            raise DeadlineError(f"Subscribe was not opened within {OPEN_SECONDS:g} s") from error
        if message is grpc.aio.EOF or message.WhichOneof("message") != "open":
            raise InvalidInputError("Subscribe must begin with an open", "send SubscribeRequest.open first")
        opening: pb.SubscribeOpen = message.open
        if opening.credit_bytes < 1:
            raise InvalidInputError(
                "Subscribe was opened with credit_bytes 0, expected at least 1",
                "grant about what the reader can hold, for example 8 MiB",
            )
        return opening

    async def _read_grants(self, credit: Credit) -> None:
        try:
            while (message := await self._context.read()) is not grpc.aio.EOF:
                if message.WhichOneof("message") != "credit_bytes":
                    raise InvalidInputError("after its open, Subscribe takes nothing but credit")
                credit.grant(message.credit_bytes)
            raise PreconditionError(
                "the credit is used up, and the subscriber has closed its side",
                "keep the requests open and grant credit as blocks are used",
            )
        except LynearmError as error:
            credit.end(error)

    async def _find_start(self, opening: pb.SubscribeOpen, record: StreamRecord) -> Cursor:
        kind = opening.WhichOneof("start")
        if kind == "live" and opening.live:
            return Cursor(record.info.next_offset)
        if kind == "consumer":
            name = check_name(opening.consumer, what="consumer")
            consumer = await self._backend.catalog.get_consumer(record.name, name)
            start = consumer.cursor
        elif kind == "cursor":
            start = Cursor(opening.cursor.offset, opening.cursor.trace_index)
        elif kind == "start_offset":
            start = Cursor(opening.start_offset)
        else:
            start = Cursor(record.info.first_offset)
        if (start.offset, min(start.trace_index, 1)) > (record.info.next_offset, 0):
            raise _offset_not_found(record, start.offset)
        _check_offset(record, start.offset)
        return start


async def fetch_blocks(backend: Backend, request: pb.FetchBlocksRequest, context: Context) -> None:
    """Serve one FetchBlocks call.

    Raises:
        StreamNotFoundError: there is no such stream.
        OffsetExpiredError: it keeps the block at the offset no more.
        OffsetNotFoundError: it has no block at the offset.
        InvalidInputError: the count is 0.
    """
    record, tail = await backend.watch_stream(request.stream)
    if request.count < 1:
        raise InvalidInputError("FetchBlocks with count 0, expected at least 1")
    _check_offset(record, request.offset)
    if request.offset == record.info.next_offset:
        raise _offset_not_found(record, request.offset)
    end = min(request.offset + request.count, record.info.next_offset)
    writing = asyncio.Lock()

    async def send(offset: int) -> None:
        while offset < end:
            for block in await backend.reader.read(record, offset, end=end, max_bytes=READ_BYTES):
                async with writing:
                    await context.write(frame_fetch_response(offset, block))
                offset += 1

    await run_until_end(tail, send(request.offset), writing=writing)


def _check_offset(record: StreamRecord, offset: int) -> None:
    if offset < record.info.first_offset:
        raise offset_expired(record.name, offset, record.info.first_offset)
    if offset > record.info.next_offset:
        raise _offset_not_found(record, offset)


def _offset_not_found(record: StreamRecord, offset: int) -> OffsetNotFoundError:
    return OffsetNotFoundError(
        f"stream {record.name!r} has no block {offset}, its next offset is {record.info.next_offset}",
        "was the stream created anew? then begin at offset 0",
    )
