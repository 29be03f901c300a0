"""Objects that nobody refers to: which are deleted, and which may never be."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from traces.harness import (
    LoopThread,
    RunningServer,
    StartServer,
    create,
    fetch,
    make_block,
    make_spec,
    publish,
)
from traces.storages import StoredObjects, catalog_rows

from lynearm.traces.catalog import BlockFacts, CommittedBlock, NewBlock, Producer, WrittenGroup
from lynearm.traces.config import ServeConfig
from lynearm.traces.storage import Storage, open_storage
from lynearm.traces.store import Span, StoredObject
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.errors import ServiceUnavailableError

ORPHAN = "0f" * 16


def collect(stub: TraceServiceStub) -> int:
    return stub.CollectGarbage(pb.CollectGarbageRequest()).orphan_objects


@pytest.fixture
def opened(loop: LoopThread, tmp_path: Path, storage: dict[str, Any]) -> Iterator[Storage]:
    """Catalog and blocks without a server."""
    context = open_storage(ServeConfig(tmp_path / "data", **storage))
    yield loop.run(context.__aenter__())
    loop.run(context.__aexit__(None, None, None))


async def open_producer(storage: Storage) -> Producer:
    await storage.catalog.create_stream(make_spec(), allow_existing=True)
    return await storage.catalog.open_producer("s", "p", 0)


def new_block(producer: Producer, sequence: int) -> NewBlock:
    return NewBlock(producer, sequence, BlockFacts(5, 7, 1, 1, 1))


def stored(key: str) -> StoredObject:
    return StoredObject(key, (Span(0, 5),))


def test_an_object_that_was_never_committed_is_deleted_when_it_is_old(start_server: StartServer) -> None:
    server = start_server(orphan_seconds=3600)
    create(server.stub)
    publish(server.stub, range(3))
    objects = StoredObjects(server.config)
    committed = objects.read()
    objects.write(ORPHAN, b"half a group")
    assert collect(server.stub) == 0
    assert ORPHAN in objects.read()
    server.stop()
    server = start_server(orphan_seconds=0, collect_seconds=0)
    objects.write(ORPHAN, b"half a group")
    assert collect(server.stub) == 1
    assert objects.read() == committed
    assert collect(server.stub) == 0
    assert len(list(fetch(server.stub, 0, 9))) == 3


def test_what_is_no_object_is_left_alone(start_server: StartServer) -> None:
    server = start_server(orphan_seconds=0, collect_seconds=0)
    create(server.stub)
    publish(server.stub, [1])
    assert collect(server.stub) == 0
    server.stop()
    # The identity of the store, for one: without it, this would be another store.
    assert list(fetch(start_server().stub, 0, 9)) == [(0, make_block(1))]


def test_orphans_are_found_without_being_asked(start_server: StartServer) -> None:
    server = start_server(orphan_seconds=0, collect_seconds=0.05)
    objects = StoredObjects(server.config)
    objects.write(ORPHAN, b"half a group")
    deadline = time.monotonic() + 60
    while ORPHAN in objects.list_keys():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_condemned_object_can_not_be_committed_any_more(opened: Storage, loop: LoopThread) -> None:
    async def run() -> None:
        catalog = opened.catalog
        producer = await open_producer(opened)
        assert await catalog.condemn_objects([ORPHAN]) == [ORPHAN]
        with pytest.raises(ServiceUnavailableError, match="collected as garbage"):
            await catalog.commit([WrittenGroup(stored(ORPHAN), [new_block(producer, 1)])])
        # Nothing of it is there: the same block goes with another object.
        with_another = WrittenGroup(stored("1f" * 16), [new_block(producer, 1)])
        assert await catalog.commit([with_another]) == [CommittedBlock(0, True)]
        assert await catalog.condemn_objects([ORPHAN]) == [ORPHAN]

    loop.run(run())


def test_a_committed_object_is_never_condemned(opened: Storage, loop: LoopThread) -> None:
    async def run() -> None:
        producer = await open_producer(opened)
        await opened.catalog.commit([WrittenGroup(stored(ORPHAN), [new_block(producer, 1)])])
        assert await opened.catalog.find_unreferenced([ORPHAN]) == []
        assert await opened.catalog.condemn_objects([ORPHAN]) == []

    loop.run(run())


def test_of_a_commit_and_a_collector_at_the_same_instant_one_wins(opened: Storage, loop: LoopThread) -> None:
    async def condemn(key: str, delay_seconds: float) -> list[str]:
        await asyncio.sleep(delay_seconds)
        return await opened.catalog.condemn_objects([key])

    async def run() -> None:
        producer = await open_producer(opened)
        sequence = 1
        for number in range(40):
            key = secrets.token_hex(16)
            committing = opened.catalog.commit([WrittenGroup(stored(key), [new_block(producer, sequence)])])
            both = (committing, condemn(key, number % 8 / 1000))
            committed, condemned = await asyncio.gather(*both, return_exceptions=True)
            if condemned == [key]:
                assert isinstance(committed, ServiceUnavailableError)
            else:
                assert (committed, condemned) == ([CommittedBlock(sequence - 1, True)], [])
                sequence += 1

    loop.run(run())


def test_several_collectors_get_along(opened: Storage, loop: LoopThread) -> None:
    keys = [secrets.token_hex(16) for _ in range(50)]

    async def run() -> None:
        found = await asyncio.gather(*(opened.catalog.condemn_objects(keys[:n][::-1]) for n in (50, 40, 30)))
        assert [len(condemned) for condemned in found] == [50, 40, 30]

    loop.run(run())


def test_condemned_objects_leave_a_row_each_and_nothing_else(
    start_server: StartServer,
) -> None:
    server: RunningServer = start_server(orphan_seconds=0, collect_seconds=0)
    StoredObjects(server.config).write(ORPHAN, b"half a group")
    collect(server.stub)
    assert catalog_rows(server.config, "SELECT key FROM objects") == [(ORPHAN,)]
    assert StoredObjects(server.config).read() == {}
