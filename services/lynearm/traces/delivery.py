"""What one subscription sends: the blocks that it wants, in offset order and under credit.

Invariants: blocks go out in offset order; every block below the offset of a message was sent, or is counted
in `skipped` of this message or of one before it. A block is sent only while credit is left, so that at
most one block more than the credit is on its way; what is read ahead of that from the store is at most
`reader.READ_BYTES` and one block. Labels are looked at `_SCAN_COUNT` at a time; blocks that are passed over
are never read from the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from lynearm.traces.backend import Backend
from lynearm.traces.calls import Context
from lynearm.traces.catalog import LabelledOffset, StreamRecord
from lynearm.traces.tail import StreamTail
from lynearm.wire.errors import CorruptBlockError, LynearmError
from lynearm.wire.frames import SkippedBlocks, frame_damaged_block, frame_skipped, frame_subscribe_response
from lynearm.wire.labels import TraceFilter, labels_from_bytes
from lynearm.wire.traces import Cursor

_SCAN_COUNT = 512
"""Blocks whose labels one query reads: at 16 KiB each, 8 MiB at worst, and some 100 KiB as a rule."""


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


@dataclass(frozen=True, slots=True)
class Reading:
    """What a subscription reads."""

    record: StreamRecord
    tail: StreamTail
    start: Cursor
    end: int | None
    """Offset to stop before; None to follow until the stream is sealed."""
    wanted: TraceFilter | None
    """None: every block."""
    skips_damaged: bool = False
    """Name damaged blocks and go on behind them, in place of ending."""


class Delivery:
    """Sends what a subscription reads.

    Args:
        backend: Where blocks come from.
        context: The call, whose responses are bytes.
        reading: What is read.
        credit: What the subscriber is ready to take.
    """

    def __init__(self, backend: Backend, context: Context, reading: Reading, credit: Credit) -> None:
        self._backend = backend
        self._context = context
        self._reading = reading
        self._credit = credit
        self._offset = reading.start.offset
        """Of the first block that is neither sent nor passed over."""
        self._skipped = 0
        """Blocks right before `_offset` that were passed over, and of which the subscriber does not know."""
        self.writing = asyncio.Lock()
        """Held while a message is written, which must not be cut off."""

    async def run(self) -> None:
        """Send everything.

        Raises:
            LynearmError: a block cannot be read, or credit ran out for good.
        """
        while self._offset < (limit := await self._limit()):
            if self._reading.wanted is None:
                await self._send_until(limit)
            else:
                await self._send_wanted(self._reading.wanted, limit)

    async def _limit(self) -> int:
        """Wait for blocks; those below the result are there."""
        if self._reading.end is not None:
            return self._reading.end
        return await self._reading.tail.wait_beyond(self._offset)

    async def _send_wanted(self, wanted: TraceFilter, limit: int) -> None:
        count = min(_SCAN_COUNT, limit - self._offset)
        stream_id = self._reading.record.stream_id
        labelled = await self._backend.catalog.find_labels(stream_id, self._offset, count)
        if not labelled or labelled[0].offset != self._offset:
            await self._send_until(self._offset + 1)  # which says what became of the block
            return
        for end, is_wanted in _runs(labelled, wanted):
            if is_wanted:
                await self._send_until(end)
            else:
                self._skipped += end - self._offset
                self._offset = end
        if self._skipped:
            word = SkippedBlocks(self._offset, self._reading.tail.next_offset, self._skipped)
            await self._write(frame_skipped(word))

    async def _send_until(self, end: int) -> None:
        record, tail, start = self._reading.record, self._reading.tail, self._reading.start
        while self._offset < end:
            max_bytes = await self._credit.wait()
            try:
                blocks = await self._backend.reader.read(record, self._offset, end=end, max_bytes=max_bytes)
            except CorruptBlockError as error:
                if not self._reading.skips_damaged:
                    raise
                message = frame_damaged_block(
                    self._offset, error.message, tail.next_offset, skipped=self._skipped
                )
                self._offset += 1
                await self._write(message)
                continue
            for block in blocks:
                used_traces = start.trace_index if self._offset == start.offset else 0
                message = frame_subscribe_response(
                    self._offset, block, tail.next_offset, skipped=self._skipped, used_traces=used_traces
                )
                self._offset += 1
                await self._write(message)
                self._credit.spend(len(block))

    async def _write(self, message: bytes) -> None:
        async with self.writing:
            await self._context.write(message)
        self._skipped = 0


def _runs(labelled: list[LabelledOffset], wanted: TraceFilter) -> Iterator[tuple[int, bool]]:
    """Stretches of blocks that are all wanted, or all not: (offset after the last, whether they are)."""
    known: dict[bytes, bool] = {}  # whole stretches of a stream are labelled alike
    for block in labelled:
        if block.labels not in known:
            known[block.labels] = wanted.may_match(labels_from_bytes(block.labels))
    consecutive = _without_gaps(labelled)
    for is_wanted, run in groupby(consecutive, key=lambda block: known[block.labels]):
        yield [block.offset for block in run][-1] + 1, is_wanted


def _without_gaps(labelled: list[LabelledOffset]) -> Iterator[LabelledOffset]:
    for expected, block in enumerate(labelled, labelled[0].offset):
        if block.offset != expected:
            return
        yield block
