"""Calls that read blocks: Subscribe, which follows a stream under credit, and FetchBlocks.

Invariants: blocks go out in offset order without gaps. A block is sent only while credit is left, so that
at most one block more than the credit is on its way; what is read ahead of that from the store is at most
`reader.READ_BYTES` and one block.
"""

from __future__ import annotations

import asyncio

import grpc.aio

from lynearm.traces.backend import Backend
from lynearm.traces.calls import Context
from lynearm.traces.catalog import StreamRecord
from lynearm.traces.reader import READ_BYTES, offset_expired
from lynearm.traces.tail import StreamTail, run_until_end
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import (
    CorruptBlockError,
    DeadlineError,
    InvalidInputError,
    LynearmError,
    OffsetNotFoundError,
    PreconditionError,
)
from lynearm.wire.frames import frame_damaged_block, frame_fetch_response, frame_subscribe_response

OPEN_SECONDS = 30.0
"""How long a call may take to say what it is."""


class Credit:
    """Bytes that a subscriber is ready to take."""

    def __init__(self, size_bytes: int) -> None:
        self._left_bytes = size_bytes
        self._end: LynearmError | None = None
        self._changed = asyncio.Event()

    def grant(self, size_bytes: int) -> None:
        """Add to what is left."""
        self._left_bytes += size_bytes
        self._changed.set()

    def spend(self, size_bytes: int) -> None:
        """Take from what is left, which may then be below 0."""
        self._left_bytes -= size_bytes

    def end(self, reason: LynearmError) -> None:
        """Note that no more will come."""
        self._end = reason
        self._changed.set()

    async def wait(self) -> int:
        """Wait until some is left; returns how much.

        Raises:
            LynearmError: none is left, and no more will come.
        """
        while self._left_bytes <= 0:
            if self._end is not None:
                raise self._end
            self._changed.clear()
            await self._changed.wait()
        return self._left_bytes


class SubscribeCall:
    """Serves one subscriber from its opening to its end.

    Args:
        backend: What it reads from.
        context: The call, whose responses are bytes.
    """

    def __init__(self, backend: Backend, context: Context) -> None:
        self._backend = backend
        self._context = context
        self._skips_damaged = False
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Serve the call.

        Raises:
            LynearmError: why the call ends, unless the subscriber has all that it asked for.
        """
        opening = await self._read_opening()
        self._skips_damaged = opening.skip_damaged
        record, tail = await self._backend.watch_stream(opening.stream)
        start = _start_offset(opening, record)
        end = None if opening.follow else record.info.next_offset
        credit = Credit(opening.credit_bytes)
        granting = asyncio.create_task(self._read_grants(credit))
        try:
            delivering = self._deliver(record, tail, start, end, credit)
            await run_until_end(tail, delivering, writing=self._writing)
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

    async def _deliver(
        self, record: StreamRecord, tail: StreamTail, offset: int, end: int | None, credit: Credit
    ) -> None:
        while offset < (limit := await tail.wait_beyond(offset) if end is None else end):
            max_bytes = await credit.wait()
            try:
                blocks = await self._backend.reader.read(record, offset, end=limit, max_bytes=max_bytes)
            except CorruptBlockError as error:
                if not self._skips_damaged:
                    raise
                async with self._writing:
                    await self._context.write(frame_damaged_block(offset, error.message, tail.next_offset))
                offset += 1
                continue
            for block in blocks:
                async with self._writing:
                    await self._context.write(frame_subscribe_response(offset, block, tail.next_offset))
                credit.spend(len(block))
                offset += 1


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


def _start_offset(opening: pb.SubscribeOpen, record: StreamRecord) -> int:
    start = opening.WhichOneof("start")
    if start == "live" and opening.live:
        return record.info.next_offset
    if start != "start_offset":
        return record.info.first_offset
    _check_offset(record, opening.start_offset)
    return opening.start_offset


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
