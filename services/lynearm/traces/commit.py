"""Group commit: blocks that arrive together, from any publishers, share one object and one transaction.

Invariants:

- A block is answered only after its object is durable and its index row committed.
- Blocks of one producer are written and committed in the order in which they were submitted.
- Groups are pipelined: while some commit, up to `GROUPS_AHEAD` behind them are written, side by side where
  the store can. Commits are never concurrent, and follow the order of the groups whichever is written first;
  those that are written by the time of a commit share it.
- The queue is bounded in bytes: `submit` waits for room, and so holds its publisher back.
- A write that fails fails the blocks of its group, and a commit that fails those of its groups, and no
  others; nothing is retried here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from types import TracebackType
from typing import Self, TypeAlias

from lynearm.traces import failpoints
from lynearm.traces.catalog import Catalog, CommitOutcome, CommittedBlock, NewBlock, WrittenGroup
from lynearm.traces.reader import BlockCache
from lynearm.traces.store import BlockStore, StoredObject
from lynearm.traces.tail import Tails
from lynearm.wire.errors import DrainingError, InternalError, LynearmError, StorageFullError

logger = logging.getLogger(__name__)

BLOCK_OVERHEAD_BYTES = 4096
"""What a queued block is charged beyond its size, so that tiny blocks cannot queue without bound."""

PROMPT_OVERHEAD_BYTES = 64
"""The same for each prompt id that comes with it, and for each unit of work."""

GROUPS_AHEAD = 4
"""Groups that are written, or wait to be committed, behind those that are being committed, which are as many
at most. A disk that writes some while it syncs others has less idle time, and a commit, which takes longer
beside writes than any of them does, is no bottleneck where several share it."""

PendingOffset: TypeAlias = asyncio.Future[int | LynearmError]
"""The offset of a submitted block, or why it has none: a value, since nobody may be left to fetch an
exception."""


@dataclass(frozen=True, slots=True)
class _Submission:
    block: NewBlock
    data: bytes | memoryview
    outcome: PendingOffset = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def charge_bytes(self) -> int:
        prompt_ids = self.block.finished_prompt_ids
        prompts = sum(map(len, prompt_ids)) + PROMPT_OVERHEAD_BYTES * len(prompt_ids)
        for of_lease in self.block.finished_work:
            for prompt in of_lease.prompts:
                prompts += len(prompt.prompt_id) + PROMPT_OVERHEAD_BYTES * len(prompt.sample_indices)
        return len(self.data) + len(self.block.labels) + prompts + BLOCK_OVERHEAD_BYTES

    def resolve(self, outcome: int | LynearmError) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


_Writing: TypeAlias = asyncio.Task[StoredObject | Exception]
"""The writing of a group; ends with why nothing is stored, where that is so: raised, it would end the
committer."""


@dataclass(frozen=True, slots=True)
class _Group:
    submissions: Sequence[_Submission]
    writing: _Writing


class GroupCommitter:
    """Writes and commits blocks in groups. Use it as an async context manager; leaving it flushes.

    Args:
        catalog: Where index rows go.
        store: Where blocks go.
        cache: Receives each block when it is committed.
        tails: Learn how far each stream is, after the cache has the blocks.
        group_seconds: Longest wait for more blocks once there is one.
        group_bytes: Size at which a group is full.
        queue_bytes: Bound on what is submitted and not yet committed.
    """

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
        self._pipeline = _Pipeline()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        """Start; a fault in here cancels the caller rather than leaving publishers to wait for ever."""
        await self._tasks.__aenter__()
        self._tasks.create_task(self._write_groups(), name="write-groups")
        self._tasks.create_task(self._commit_groups(), name="commit-groups")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit what is queued, take no more, and stop."""
        self._queue.close()
        await self._tasks.__aexit__(kind, error, trace)

    @property
    def queued_bytes(self) -> int:
        """What is submitted and not yet answered, with what is charged for each block."""
        return self._queue.held_bytes

    def hurry(self) -> None:
        """From now on, write each group without waiting for more blocks."""
        self._queue.hurry()

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
        ahead: _Writing | None = None
        while submissions := await self._queue.take_group(self._group_bytes, self._group_seconds, ahead):
            ahead = self._tasks.create_task(self._write([submission.data for submission in submissions]))
            await self._pipeline.put(_Group(submissions, ahead))
        self._pipeline.close()

    async def _write(self, blocks: Sequence[bytes | memoryview]) -> StoredObject | Exception:
        try:
            return await self._store.write(blocks)
        except Exception as error:
            return error

    async def _commit_groups(self) -> None:
        while groups := await self._pipeline.take_written():
            submissions: list[_Submission] = []
            written: list[WrittenGroup] = []
            for group in groups:
                stored = group.writing.result()
                if isinstance(stored, Exception):
                    self._fail(group.submissions, stored)
                else:
                    submissions += group.submissions
                    written.append(WrittenGroup(stored, [one.block for one in group.submissions]))
            if written:
                await self._commit(written, submissions)

    async def _commit(self, groups: Sequence[WrittenGroup], submissions: Sequence[_Submission]) -> None:
        try:
            outcomes = await self._catalog.commit(groups)
        except Exception as error:
            self._fail(submissions, error)
            # After any other failure the rows may be there once the catalog is opened again.
            unused = list(groups) if isinstance(error, StorageFullError) else []
        else:
            failpoints.reach("catalog.after_commit")
            self._publish(submissions, outcomes)
            of_groups = _split(outcomes, [len(group.blocks) for group in groups])
            unused = [
                group for group, found in zip(groups, of_groups, strict=True) if not any(map(_is_new, found))
            ]
        for group in unused:
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
            logger.warning("object %s stays until it is collected: %s", key, error)


class _Pipeline:
    """Groups on their way to the catalog, in order; at most `GROUPS_AHEAD`. One event loop, one taker."""

    def __init__(self) -> None:
        self._groups: deque[_Group] = deque()
        self._closed = False
        self._changed = asyncio.Event()

    async def put(self, group: _Group) -> None:
        """Add a group; waits until another would have room."""
        self._groups.append(group)
        self._changed = _wake(self._changed)
        while len(self._groups) >= GROUPS_AHEAD:
            await self._changed.wait()

    async def take_written(self) -> list[_Group]:
        """The next group, as soon as it is written, and those behind it that are too; none once closed."""
        while not self._groups:
            if self._closed:
                return []
            await self._changed.wait()
        await asyncio.wait((self._groups[0].writing,))
        taken: list[_Group] = []
        while self._groups and self._groups[0].writing.done():
            taken.append(self._groups.popleft())
        self._changed = _wake(self._changed)
        return taken

    def close(self) -> None:
        """Let the taker end when all are taken."""
        self._closed = True
        self._changed = _wake(self._changed)


class _BoundedQueue:
    """Submissions in order, bounded in bytes from `put` to `release`. One event loop, one taker."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._held_bytes = 0
        self._queued: deque[_Submission] = deque()
        self._queued_bytes = 0
        self._closed = False
        self._hurried = False
        # Replaced and set whenever room or submissions appear, or the queue closes.
        self._freed = asyncio.Event()
        self._arrived = asyncio.Event()
        self._awaited_bytes = 0
        """The taker is woken when so many are queued, rather than for each block."""

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    async def put(self, submission: _Submission) -> None:
        while not self._closed and not self._has_room(submission.charge_bytes):
            await self._freed.wait()
        if self._closed:
            raise stopping()
        self._held_bytes += submission.charge_bytes
        self._queued.append(submission)
        self._queued_bytes += len(submission.data)
        if self._queued_bytes >= self._awaited_bytes:
            self._wake_taker()

    def release(self, submissions: Sequence[_Submission]) -> None:
        """Give back the room of submissions that are answered."""
        self._held_bytes -= sum(submission.charge_bytes for submission in submissions)
        self._freed = _wake(self._freed)

    async def take_group(
        self, group_bytes: int, group_seconds: float, ahead: _Writing | None
    ) -> list[_Submission]:
        """The next submissions, up to `group_bytes` and at least one; none once closed and empty.

        Args:
            group_bytes: Size at which they go at once.
            group_seconds: Longest wait for more of them after `ahead`.
            ahead: The writing of the group before. A smaller group beside it would cost the disk a sync, and
                gain little time.
        """
        self._awaited_bytes = 0
        while not self._queued and not self._closed:
            await self._arrived.wait()
        self._awaited_bytes = group_bytes
        if ahead is not None:
            ahead.add_done_callback(lambda _: self._wake_taker())
            while self._is_gathering and not ahead.done():
                await self._arrived.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(group_seconds):
                while self._is_gathering:
                    await self._arrived.wait()
        group: list[_Submission] = []
        size_bytes = 0
        while self._queued and size_bytes < group_bytes:
            submission = self._queued.popleft()
            size_bytes += len(submission.data)
            group.append(submission)
        self._queued_bytes -= size_bytes
        return group

    def hurry(self) -> None:
        """Let no group wait for company."""
        self._hurried = True
        self._wake_taker()

    def close(self) -> None:
        """Refuse further submissions; those queued can still be taken."""
        self._closed = self._hurried = True
        self._freed = _wake(self._freed)
        self._wake_taker()

    @property
    def _is_gathering(self) -> bool:
        return self._queued_bytes < self._awaited_bytes and not self._hurried

    def _wake_taker(self) -> None:
        self._arrived = _wake(self._arrived)

    def _has_room(self, charge_bytes: int) -> bool:
        # An empty queue takes any block, whatever its size.
        return not self._held_bytes or self._held_bytes + charge_bytes <= self._capacity_bytes


def _split(outcomes: Sequence[CommitOutcome], sizes: Sequence[int]) -> list[Sequence[CommitOutcome]]:
    """The outcomes in pieces of these sizes."""
    ends = list(accumulate(sizes))
    return [outcomes[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _is_new(outcome: CommitOutcome) -> bool:
    return isinstance(outcome, CommittedBlock) and outcome.is_new


def _wake(event: asyncio.Event) -> asyncio.Event:
    """Wake who waits on `event`; returns its successor."""
    event.set()
    return asyncio.Event()


def stopping() -> DrainingError:
    """The error of calls that meet a server on its way down."""
    return DrainingError(
        "the trace service is stopping", "connect again, or to another server; resume from the last offset"
    )
