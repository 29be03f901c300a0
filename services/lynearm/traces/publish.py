"""One Publish call: takes a producer's blocks as they come, and acknowledges them as they become durable.

Invariants:

- Blocks are committed in the order of their arrival; acknowledgements name them in that order.
- Everything that was committed before an error is acknowledged before the call ends with it.
- A block enters the queue only when the stream holds the dictionary that it needs.
- A block is queued only when the commit queue and the stream's consumers have room for it, and a message is
  read when that holds for the last block of the one before: that holds a producer back.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

import grpc.aio
import xxhash

from lynearm.traces import failpoints
from lynearm.traces.backend import Backend
from lynearm.traces.calls import Context
from lynearm.traces.catalog import BlockFacts, NewBlock, Producer
from lynearm.traces.commit import PendingOffset
from lynearm.traces.consumer_records import LagState
from lynearm.traces.lag_gate import StreamGate
from lynearm.traces.tail import StreamTail, run_until_end
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.blocks import BlockHeader, verify_block
from lynearm.wire.errors import DeadlineError, InvalidInputError, LagLimitError, LynearmError
from lynearm.wire.frames import PublishBlock, PublishOpen, parse_publish_request
from lynearm.wire.labels import BlockLabels, labels_to_bytes
from lynearm.wire.specs import check_name

OPEN_SECONDS = 30.0
"""How long a call may take to say what it is."""

MAX_PENDING_BLOCKS = 4096
"""Blocks of one call that wait for durability or for the peer to read acknowledgements; the commit queue
bounds their bytes."""


@dataclass(frozen=True, slots=True)
class _Pending:
    sequence: int
    offset: PendingOffset


@dataclass(frozen=True, slots=True)
class _Opened:
    """What holds for every block of a call."""

    opening: PublishOpen
    labels: bytes
    """What the index keeps of a block that says nothing of its tags."""
    producer: Producer
    gate: StreamGate


_End: TypeAlias = "Exception | None"
"""Why no more blocks come; None when the producer said that it is done."""


class PublishCall:
    """Serves one producer from its opening to its end.

    Args:
        backend: What it publishes to.
        context: The call, whose requests and responses are bytes.
    """

    def __init__(self, backend: Backend, context: Context) -> None:
        self._backend = backend
        self._context = context
        self._pending: asyncio.Queue[_Pending | pb.PublishHeld | _End] = asyncio.Queue(MAX_PENDING_BLOCKS)

    async def run(self) -> None:
        """Serve the call.

        Raises:
            LynearmError: why the call ends, unless the producer ended it.
        """
        opening = await self._read_opening()
        labels = labels_to_bytes(BlockLabels(opening.labels))
        producer = await self._backend.catalog.open_producer(
            opening.stream, check_name(opening.producer_id, what="producer id"), opening.epoch
        )
        tail = self._backend.tails.register(producer.stream_id)
        opened = pb.PublishOpened(epoch=producer.epoch, next_sequence=producer.next_sequence)
        await self._context.write(pb.PublishResponse(opened=opened))
        gate = self._backend.lag.register(producer.stream_id)
        receiving = asyncio.create_task(self._receive(_Opened(opening, labels, producer, gate), tail))
        try:
            await self._acknowledge()
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    async def _read_opening(self) -> PublishOpen:
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                message = await self._context.read()
        except TimeoutError as error:
            raise DeadlineError(f"Publish was not opened within {OPEN_SECONDS:g} s") from error
        opening = None if message is grpc.aio.EOF else parse_publish_request(message)
        if not isinstance(opening, PublishOpen):
            raise InvalidInputError("Publish must begin with an open", "send PublishRequest.open first")
        return opening

    async def _receive(self, opened: _Opened, tail: StreamTail) -> None:
        end: _End = None
        try:
            await run_until_end(tail, self._submit_blocks(opened))
        except Exception as error:  # raised by _acknowledge, after what came before it
            end = error
        await self._pending.put(end)

    async def _submit_blocks(self, opened: _Opened) -> None:
        while (message := await self._context.read()) is not grpc.aio.EOF:
            request = parse_publish_request(message)
            if isinstance(request, PublishOpen):
                raise InvalidInputError("Publish was opened twice", "use one call for each producer")
            is_mostly_blocks = 2 * sum(len(published.block) for published in request) >= len(message)
            for published in request:
                # A view keeps the message alive, which is well where that is little more than its blocks.
                data = published.block if is_mostly_blocks else bytes(published.block)
                await self._submit_block(opened, published, data)

    async def _submit_block(self, opened: _Opened, published: PublishBlock, data: bytes | memoryview) -> None:
        header = verify_block(data)
        block = _new_block(opened, published, header)
        if needed := header.dictionary_digest:
            await self._backend.dictionaries.check(opened.producer, published.sequence, needed)
        # The store asks too; here, what would be refused is not even queued.
        self._backend.space.check(len(data))
        offset = await self._submit(opened, block, data)
        await self._pending.put(_Pending(published.sequence, offset))

    async def _submit(self, opened: _Opened, block: NewBlock, data: bytes | memoryview) -> PendingOffset:
        """Submit a block once the consumers are close enough; one that is committed already need not wait."""
        if block.sequence < opened.producer.next_sequence:
            return await self._backend.committer.submit(block, data)

        async def on_held(state: LagState) -> None:
            if opened.opening.no_wait:
                raise _too_far_behind(opened.opening.stream, state)
            lag = state.lag
            await self._pending.put(
                pb.PublishHeld(
                    sequence=block.sequence,
                    consumer=state.consumer,
                    lag_blocks=lag.blocks,
                    lag_traces=lag.traces,
                )
            )

        trace_count = block.facts.trace_count
        await opened.gate.enter(trace_count, on_held)
        try:
            offset = await self._backend.committer.submit(block, data)
        except BaseException:
            opened.gate.leave(trace_count)
            raise
        offset.add_done_callback(lambda _: opened.gate.leave(trace_count))
        return offset

    async def _acknowledge(self) -> None:
        ack = pb.PublishAck()
        while isinstance(pending := await self._pending.get(), _Pending | pb.PublishHeld):
            if isinstance(pending, pb.PublishHeld):
                await self._send(ack)
                ack = pb.PublishAck(first_sequence=pending.sequence)
                await self._context.write(pb.PublishResponse(held=pending))
                continue
            if not pending.offset.done() or pending.sequence != ack.first_sequence + len(ack.offsets):
                await self._send(ack)
                ack = pb.PublishAck(first_sequence=pending.sequence)
            # Shielded: the block's fate is its own, whatever becomes of the call.
            outcome = await asyncio.shield(pending.offset)
            if isinstance(outcome, LynearmError):
                await self._send(ack)
                raise outcome
            ack.offsets.append(outcome)
            if self._pending.empty():
                await self._send(ack)
                ack = pb.PublishAck(first_sequence=pending.sequence + 1)
        await self._send(ack)
        if pending is not None:
            raise pending

    async def _send(self, ack: pb.PublishAck) -> None:
        if ack.offsets:
            failpoints.reach("publish.before_ack")
            await self._context.write(pb.PublishResponse(ack=ack))


def _new_block(opened: _Opened, published: PublishBlock, header: BlockHeader) -> NewBlock:
    producer = opened.producer
    if header.codec_mode != producer.codec_mode:
        raise InvalidInputError(
            f"block {published.sequence} is encoded in mode {header.codec_mode!r}, "
            f"stream {producer.stream_name!r} is in {producer.codec_mode!r}",
            "encode in the stream's mode",
        )
    facts = BlockFacts(
        size_bytes=len(published.block),
        checksum=xxhash.xxh3_64_intdigest(published.block),
        trace_count=header.trace_count,
        prompt_token_count=header.prompt_token_count,
        completion_token_count=header.completion_token_count,
    )
    labels = opened.labels
    if published.tags is not None:
        labels = labels_to_bytes(BlockLabels(opened.opening.labels, published.tags))
    return NewBlock(
        producer, published.sequence, facts, published.finished_prompt_ids, published.finished_work, labels
    )


def _too_far_behind(stream: str, state: LagState) -> LagLimitError:
    return LagLimitError(
        f"consumer {state.consumer!r} of stream {stream!r} is {state.lag.blocks} blocks and "
        f"{state.lag.traces} traces behind, as far as the stream allows",
        "publish again when it has caught up, or let the service hold the block back (no no_wait)",
    )
