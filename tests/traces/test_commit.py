"""The group committer with a store and a catalog that can be held up or made to fail.

The fakes stand in for a disk at a chosen moment; test_publish and test_durability use the real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, cast

import pytest
from traces.harness import LoopThread

from lynearm.traces.catalog import (
    BlockFacts,
    Catalog,
    CommitOutcome,
    CommittedBlock,
    NewBlock,
    Producer,
    WrittenGroup,
)
from lynearm.traces.commit import GROUPS_AHEAD, GroupCommitter, PendingOffset
from lynearm.traces.reader import BlockCache
from lynearm.traces.store import Span, StoredObject
from lynearm.traces.tail import Tails
from lynearm.wire.errors import ServiceUnavailableError, StorageError, StorageFullError

PRODUCER = Producer(1, 1, "s", "p", 1, 1, "exact")


class FakeStore:
    def __init__(self) -> None:
        self.objects: dict[str, list[bytes]] = {}
        self.begun = 0
        self.deleted: list[str] = []
        self.failures: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, blocks: Sequence[bytes | memoryview]) -> StoredObject:
        self.begun += 1
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        key = str(len(self.objects))
        self.objects[key] = [bytes(block) for block in blocks]
        return StoredObject(key, tuple(Span(0, len(block)) for block in blocks))

    async def read(self, key: str, spans: Sequence[Span]) -> list[bytes]:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        self.deleted.append(key)

    async def list_keys(self) -> AsyncIterator[list[str]]:
        yield []

    async def close(self) -> None:
        pass


class FakeCatalog:
    def __init__(self) -> None:
        self.commits: list[list[list[int]]] = []
        """Sequence numbers of each group of each commit."""
        self.failures: list[Exception] = []
        self.is_new = True
        self.resent: set[int] = set()
        """Sequence numbers of blocks that were committed before."""
        self.gate = asyncio.Event()
        self.gate.set()
        self._next_offset = 0

    @property
    def groups(self) -> list[list[int]]:
        return [group for commit in self.commits for group in commit]

    async def commit(self, groups: Sequence[WrittenGroup]) -> list[CommitOutcome]:
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.commits.append([[block.sequence for block in group.blocks] for group in groups])
        outcomes: list[CommitOutcome] = []
        for group in groups:
            for block in group.blocks:
                is_new = self.is_new and block.sequence not in self.resent
                outcomes.append(CommittedBlock(self._next_offset, is_new))
                self._next_offset += 1
        return outcomes


class Bench:
    def __init__(self, **settings: Any) -> None:
        self.store, self.catalog, self.cache, self.tails = (
            FakeStore(),
            FakeCatalog(),
            BlockCache(1000),
            Tails(),
        )
        self.committer = GroupCommitter(
            cast("Catalog", self.catalog),
            self.store,
            self.cache,
            self.tails,
            **{"group_seconds": 0.02, "group_bytes": 100, "queue_bytes": 1 << 20, **settings},
        )

    async def submit(self, sequence: int, size_bytes: int = 10) -> PendingOffset:
        block = NewBlock(PRODUCER, sequence, BlockFacts(size_bytes, 0, 1, 1, 1))
        return await self.committer.submit(block, bytes(size_bytes))

    async def begin_commit(self, sequence: int) -> PendingOffset:
        """Let a full group be committed until the catalog's gate is opened."""
        self.catalog.gate.clear()
        written = len(self.store.objects)
        pending = await self.submit(sequence, 100)
        await until(lambda: len(self.store.objects) > written)
        await asyncio.sleep(0.01)
        return pending


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


BenchTest = Callable[[Bench], Coroutine[Any, Any, None]]


def with_bench(**settings: Any) -> Callable[[BenchTest], Callable[[LoopThread], None]]:
    """Makes a coroutine a test that pytest runs: on the one event loop, inside the committer's context."""

    def decorate(test: BenchTest) -> Callable[[LoopThread], None]:
        def run(loop: LoopThread) -> None:
            async def inside() -> None:
                bench = Bench(**settings)
                async with asyncio.timeout(20), bench.committer:
                    await test(bench)

            loop.run(inside())

        return run

    return decorate


@with_bench()
async def test_blocks_that_arrive_together_share_an_object(bench: Bench) -> None:
    pending = [await bench.submit(sequence) for sequence in range(1, 6)]
    assert [await one for one in pending] == [0, 1, 2, 3, 4]
    assert (len(bench.store.objects), bench.catalog.groups) == (1, [[1, 2, 3, 4, 5]])


@with_bench(group_seconds=15.0)
async def test_a_full_group_does_not_wait(bench: Bench) -> None:
    pending = [await bench.submit(sequence, 60) for sequence in range(1, 5)]
    assert [await one for one in pending] == [0, 1, 2, 3]
    assert bench.catalog.groups == [[1, 2], [3, 4]]


@with_bench()
async def test_the_next_group_is_written_while_one_commits(bench: Bench) -> None:
    bench.catalog.gate.clear()
    pending = [await bench.submit(sequence, 100) for sequence in range(1, 3)]
    await until(lambda: len(bench.store.objects) >= 2)
    assert not any(one.done() for one in pending)
    assert bench.catalog.groups == []
    bench.catalog.gate.set()
    assert [await one for one in pending] == [0, 1]


@with_bench()
async def test_full_groups_are_written_side_by_side_and_committed_in_order(bench: Bench) -> None:
    first_gate = bench.store.gate
    first_gate.clear()
    pending = [await bench.submit(1, 100)]
    await until(lambda: bench.store.begun >= 1)
    bench.store.gate = asyncio.Event()
    bench.store.gate.set()
    pending.append(await bench.submit(2, 100))
    await until(lambda: len(bench.store.objects) >= 1)
    assert bench.catalog.groups == []  # the second is written, and waits for the first
    first_gate.set()
    assert [await one for one in pending] == [0, 1]
    assert bench.catalog.groups == [[1], [2]]


@with_bench()
async def test_groups_that_are_written_during_a_commit_share_the_next_one(bench: Bench) -> None:
    pending = [await bench.begin_commit(1)]
    bench.store.failures.append(StorageError("a bad sector"))
    pending += [await bench.submit(sequence, 100) for sequence in range(2, 5)]
    await until(lambda: bench.store.begun >= 4)
    bench.catalog.gate.set()
    outcomes = [await one for one in pending]
    assert isinstance(outcomes.pop(1), StorageError)
    assert outcomes == [0, 1, 2]
    assert bench.catalog.commits == [[[1]], [[3], [4]]]


@with_bench()
async def test_of_groups_that_share_a_commit_each_unused_object_is_deleted(bench: Bench) -> None:
    pending = [await bench.begin_commit(1)]
    pending += [await bench.submit(sequence, 100) for sequence in range(2, 4)]
    await until(lambda: len(bench.store.objects) >= 3)
    bench.catalog.failures += [StorageError("doubtful"), StorageFullError("full")]
    bench.catalog.gate.set()
    outcomes = [await one for one in pending]
    assert list(map(type, outcomes)) == [StorageError, StorageFullError, StorageFullError]
    await until(lambda: len(bench.store.deleted) >= 2)
    assert bench.store.deleted == ["1", "2"]


@with_bench()
async def test_of_groups_that_share_a_commit_only_those_without_a_new_block_are_deleted(bench: Bench) -> None:
    pending = [await bench.begin_commit(1)]
    # Two blocks in each group; in the second group, a new one stands before one that is not.
    bench.catalog.resent = {3, 5, 7, 8}
    pending += [await bench.submit(sequence, 50) for sequence in range(2, 10)]
    await until(lambda: len(bench.store.objects) >= 5)
    bench.catalog.gate.set()
    assert [await one for one in pending] == list(range(9))
    assert bench.catalog.commits[1:] == [[[2, 3], [4, 5], [6, 7], [8, 9]]]
    assert bench.store.deleted == []

    pending = [await bench.begin_commit(10)]
    bench.catalog.resent = {12, 13, 14, 15}
    pending += [await bench.submit(sequence, 50) for sequence in range(11, 17)]
    await until(lambda: len(bench.store.objects) >= 9)
    bench.catalog.gate.set()
    for one in pending:
        await one
    assert bench.catalog.commits[-1] == [[11, 12], [13, 14], [15, 16]]
    assert bench.store.deleted == ["7"]


@with_bench(group_seconds=0.0)
async def test_a_group_that_is_not_full_waits_for_the_one_ahead(bench: Bench) -> None:
    bench.store.gate.clear()
    pending = [await bench.submit(1, 100)]
    for sequence in range(2, 5):
        pending.append(await bench.submit(sequence, 20))
        await asyncio.sleep(0.01)
    assert bench.store.begun == 1
    bench.store.gate.set()
    assert [await one for one in pending] == [0, 1, 2, 3]
    assert bench.catalog.groups == [[1], [2, 3, 4]]


@with_bench()
async def test_no_more_groups_are_written_than_the_pipeline_holds(bench: Bench) -> None:
    pending = [await bench.begin_commit(1)]
    pending += [await bench.submit(sequence, 100) for sequence in range(2, 8)]
    await asyncio.sleep(0.05)
    assert bench.store.begun == 1 + GROUPS_AHEAD
    bench.catalog.gate.set()
    assert [await one for one in pending] == list(range(7))


@with_bench()
async def test_a_failed_write_fails_its_own_group_only(bench: Bench) -> None:
    bench.store.failures.append(StorageFullError("full"))
    first, second = await bench.submit(1, 100), await bench.submit(2, 100)
    assert isinstance(await first, StorageFullError)
    assert await second == 0
    assert bench.catalog.groups == [[2]]


@with_bench()
async def test_what_the_catalog_could_not_take_is_deleted(bench: Bench) -> None:
    bench.catalog.failures.append(StorageFullError("full"))
    assert isinstance(await (await bench.submit(1)), StorageFullError)
    assert await (await bench.submit(2)) == 0
    assert bench.store.deleted == ["0"]


@with_bench()
async def test_after_a_doubtful_commit_the_object_stays(bench: Bench) -> None:
    bench.catalog.failures.append(StorageError("sync failed"))
    assert isinstance(await (await bench.submit(1)), StorageError)
    assert await (await bench.submit(2)) == 0
    assert bench.store.deleted == []


@with_bench()
async def test_an_object_of_resent_blocks_is_deleted(bench: Bench) -> None:
    bench.catalog.is_new = False
    assert await (await bench.submit(1)) == 0
    bench.catalog.is_new = True
    assert await (await bench.submit(2)) == 1
    assert bench.store.deleted == ["0"]


@with_bench()
async def test_a_reader_is_woken_after_the_block_is_in_memory(bench: Bench) -> None:
    tail = bench.tails.register(1)
    waiting = asyncio.create_task(tail.wait_beyond(0))
    await bench.submit(1)
    assert await waiting == 1
    assert bench.cache.get(1, 0) == bytes(10)


@with_bench(queue_bytes=10_000)
async def test_submit_waits_for_room(bench: Bench) -> None:
    bench.store.gate.clear()
    await bench.submit(1, 5000)
    second = asyncio.create_task(bench.submit(2, 5000))
    await asyncio.sleep(0.05)
    assert not second.done()
    bench.store.gate.set()
    assert await (await second) == 1


def test_leaving_commits_what_is_queued_and_refuses_more(loop: LoopThread) -> None:
    async def run() -> None:
        bench = Bench(group_seconds=10.0)
        async with asyncio.timeout(5):
            async with bench.committer:
                pending = [await bench.submit(sequence) for sequence in range(1, 4)]
            assert [await one for one in pending] == [0, 1, 2]
            with pytest.raises(ServiceUnavailableError, match="stopping"):
                await bench.submit(4)

    loop.run(run())
