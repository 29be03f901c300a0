"""Group commit: blocks that arrive together, from any publishers, share one object and one transaction.

Invariants:

- A block is answered only after its object is durable and its index row committed.
- Blocks of one producer are written and committed in the order in which they were submitted.
- Groups are pipelined: one is written while the one before it commits; commits are never concurrent.
- The queue is bounded in bytes: `submit` waits for room, and so holds its publisher back.
- A failed group fails its own blocks and no others; nothing is retried here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lynearm.traces.cache import BlockCache
from lynearm.traces.catalog import Catalog, CommitOutcome, CommittedBlock, NewBlock
from lynearm.traces.store import BlockStore, StoredObject
from lynearm.traces.tail import Tails
from lynearm.wire.errors import InternalError, LynearmError, ServiceUnavailableError, StorageFullError

logger = logging.getLogger(__name__)

BLOCK_OVERHEAD_BYTES = 4096
"""What a queued block is charged beyond its size, so that tiny blocks cannot queue without bound."""

PendingOffset: TypeAlias = asyncio.Future[int | LynearmError]
"""The offset of a submitted block, or why it has none; a value, since nobody may be left to fetch an exception."""


@dataclass(frozen=True, slots=True)
class _Submission:
    block: NewBlock
    data: bytes | memoryview
    outcome: PendingOffset = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def charge(self) -> int:
        return len(self.data) + BLOCK_OVERHEAD_BYTES

    def resolve(self, outcome: int | LynearmError) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


@dataclass(frozen=True, slots=True)
class _WrittenGroup:
    stored: StoredObject
    submissions: Sequence[_Submission]


class GroupCommitter:
    """Writes and commits blocks in groups. Use as an async context manager; leaving it flushes."""

    def __init__(
        self,
        catalog: Catalog,
        store: BlockStore,
        cache: BlockCache,
        tails: Tails,
        *,
        group_seconds: float,
        group_bytes: int,
        queue_bytes: int,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._cache = cache
        self._tails = tails
        self._group_seconds = group_seconds
        self._group_bytes = group_bytes
        self._queue = _BoundedQueue(queue_bytes)
        self._written: asyncio.Queue[_WrittenGroup | None] = asyncio.Queue(maxsize=1)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> GroupCommitter:
        self._tasks = [
            asyncio.create_task(self._write_groups(), name="write-groups"),
            asyncio.create_task(self._commit_groups(), name="commit-groups"),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._queue.close()
        await asyncio.gather(*self._tasks)

    async def submit(self, block: NewBlock, data: bytes | memoryview) -> PendingOffset:
        """Queue a block; waits for room in the queue.

        Args:
            block: What the catalog will know of it.
            data: The encoded block; must not change.

        Returns:
            A future of the offset, or of the error that refused the block.

        Raises:
            ServiceUnavailableError: the server is stopping.
        """
        submission = _Submission(block, data)
        await self._queue.put(submission)
        return submission.outcome

    async def _write_groups(self) -> None:
        try:
            while group := await self._queue.take_group(self._group_bytes, self._group_seconds):
                try:
                    stored = await self._store.write([submission.data for submission in group])
                except Exception as error:
                    self._fail(group, error)
                else:
                    await self._written.put(_WrittenGroup(stored, group))
        finally:
            await self._written.put(None)

    async def _commit_groups(self) -> None:
        while (group := await self._written.get()) is not None:
            try:
                outcomes = await self._catalog.commit(
                    group.stored, [submission.block for submission in group.submissions]
                )
            except Exception as error:
                self._fail(group.submissions, error)
                # After any other failure the rows may be there once the catalog is opened again.
                delete = isinstance(error, StorageFullError)
            else:
                self._publish(group.submissions, outcomes)
                delete = not any(isinstance(outcome, CommittedBlock) and outcome.is_new for outcome in outcomes)
            if delete:
                await self._delete_object(group.stored.key)

    def _publish(self, submissions: Sequence[_Submission], outcomes: Sequence[CommitOutcome]) -> None:
        ends: dict[int, int] = {}
        for submission, outcome in zip(submissions, outcomes, strict=True):
            stream_id = submission.block.producer.stream_id
            if isinstance(outcome, LynearmError):
                submission.resolve(outcome)
                continue
            if outcome.is_new:
                self._cache.put(stream_id, outcome.offset, submission.data)
                ends[stream_id] = outcome.offset + 1
            submission.resolve(outcome.offset)
        for stream_id, next_offset in ends.items():
            self._tails.advance(stream_id, next_offset)
        self._queue.release(submissions)

    def _fail(self, submissions: Sequence[_Submission], error: Exception) -> None:
        if isinstance(error, LynearmError):
            logger.error("a group of %d blocks was not committed: %s", len(submissions), error)
            outcome = error
        else:
            logger.error("a group of %d blocks was not committed", len(submissions), exc_info=error)
            outcome = InternalError("the server failed to commit the block", "look at the server's log")
        for submission in submissions:
            submission.resolve(outcome)
        self._queue.release(submissions)

    async def _delete_object(self, key: str) -> None:
        try:
            await self._store.delete(key)
        except LynearmError as error:
            logger.warning("object %s stays until the next start: %s", key, error)


class _BoundedQueue:
    """Submissions in order, bounded in bytes from `put` to `release`. Single event loop, one taker."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._held_bytes = 0
        self._queued: deque[_Submission] = deque()
        self._queued_bytes = 0
        self._closed = False
        self._room = asyncio.Condition()
        self._arrived = asyncio.Event()

    async def put(self, submission: _Submission) -> None:
        async with self._room:
            # An empty queue takes any block, whatever its size.
            await self._room.wait_for(
                lambda: not self._held_bytes or self._held_bytes + submission.charge <= self._capacity_bytes
            )
        if self._closed:
            raise stopping()
        self._held_bytes += submission.charge
        self._queued.append(submission)
        self._queued_bytes += len(submission.data)
        self._arrived.set()

    def release(self, submissions: Sequence[_Submission]) -> None:
        self._held_bytes -= sum(submission.charge for submission in submissions)
        raise NotImplementedError

    async def take_group(self, group_bytes: int, group_seconds: float) -> list[_Submission]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def stopping() -> ServiceUnavailableError:
    """The error of calls that meet a server on its way down."""
    return ServiceUnavailableError("the trace service is stopping", "reconnect; resume from the last offset")
