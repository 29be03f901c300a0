"""Objects that are truncated or flipped: what is damaged is said and kept apart, the rest stays readable."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import xxhash
from models.server_process import Server, object_files, publish_singly, read_all
from traces.harness import make_block, make_spec

from lynearm.client import TraceClient
from lynearm.traces import failpoints
from lynearm.traces.backend import Backend, open_backend
from lynearm.traces.catalog import BlockFacts, NewBlock, StreamRecord, WrittenGroup
from lynearm.traces.config import ServeConfig
from lynearm.wire.errors import CorruptBlockError

BLOCKS = [make_block(number, 200) for number in range(3)]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """One object that holds three blocks."""
    directory = tmp_path / "data"

    async def fill(backend: Backend) -> None:
        await backend.catalog.create_stream(make_spec(), allow_existing=False)
        producer = await backend.catalog.open_producer("s", "p", 0)
        stored = await backend.store.write(BLOCKS)
        facts = [BlockFacts(len(block), xxhash.xxh3_64_intdigest(block), 1, 1, 1) for block in BLOCKS]
        group = [NewBlock(producer, sequence, one) for sequence, one in enumerate(facts, 1)]
        await backend.catalog.commit([WrittenGroup(stored, group)])

    with_backend(directory, fill)
    return directory


def with_backend(directory: Path, work: Callable[[Backend], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with open_backend(ServeConfig(data_dir=directory, cache_bytes=0)) as backend:
            await work(backend)

    asyncio.run(run())


async def read_each(backend: Backend, record: StreamRecord) -> list[bytes | None]:
    """Each block as the service reads it; None for what it says is damaged."""
    found: list[bytes | None] = []
    for offset in range(len(BLOCKS)):
        damage: CorruptBlockError | None = None
        try:
            found.append(bytes((await backend.reader.read(record, offset, end=offset + 1))[0]))
        except CorruptBlockError as error:
            damage = error
            found.append(None)
        if damage is not None:
            assert f"block {offset} of stream 's' is damaged" in damage.message
            assert f"continue from offset {offset + 1}" in damage.remedy
    return found


def test_an_object_truncated_anywhere_loses_no_block_before_the_cut(data_dir: Path) -> None:
    (path,) = object_files(data_dir)
    whole = path.read_bytes()
    ends = [sum(map(len, BLOCKS[: count + 1])) for count in range(len(BLOCKS))]

    async def cut(backend: Backend) -> None:
        record = await backend.catalog.get_stream("s")
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            kept = [block if end <= size else None for block, end in zip(BLOCKS, ends, strict=True)]
            assert await read_each(backend, record) == kept
            damaged = sum(block is None for block in kept)
            assert backend.reader.quarantine.block_count == damaged

    with_backend(data_dir, cut)


def test_any_flipped_bit_condemns_its_block_and_no_other(data_dir: Path) -> None:
    (path,) = object_files(data_dir)
    whole = path.read_bytes()
    first, second = len(BLOCKS[0]), len(BLOCKS[0]) + len(BLOCKS[1])

    async def flip(backend: Backend) -> None:
        record = await backend.catalog.get_stream("s")
        for position in range(first, second):
            for bit in (1, 1 << (position % 8)):
                flipped = bytearray(whole)
                flipped[position] ^= bit
                path.write_bytes(flipped)
                assert await read_each(backend, record) == [BLOCKS[0], None, BLOCKS[2]]
                assert backend.reader.quarantine.block_count == 1

    with_backend(data_dir, flip)


def test_a_damaged_block_is_logged_once_and_readable_when_its_object_is_put_back(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = object_files(data_dir)
    whole = path.read_bytes()

    async def heal(backend: Backend) -> None:
        record = await backend.catalog.get_stream("s")
        path.write_bytes(whole[:-1])
        for _ in range(3):
            assert await read_each(backend, record) == [*BLOCKS[:2], None]
        assert backend.reader.quarantine.block_count == 1
        path.write_bytes(whole)
        assert await read_each(backend, record) == BLOCKS
        assert backend.reader.quarantine.block_count == 0

    with caplog.at_level(logging.WARNING):
        with_backend(data_dir, heal)
    damaged, healed = (record.getMessage() for record in caplog.records)
    assert "block 2" in damaged
    assert path.name in damaged
    assert "readable again" in healed


def test_a_deleted_stream_leaves_the_quarantine(data_dir: Path) -> None:
    (path,) = object_files(data_dir)
    path.write_bytes(b"")

    async def delete(backend: Backend) -> None:
        await read_each(backend, await backend.catalog.get_stream("s"))
        assert backend.reader.quarantine.block_count == 3
        await backend.delete_stream("s")
        assert backend.reader.quarantine.block_count == 0

    with_backend(data_dir, delete)


def test_a_subscriber_may_skip_damaged_blocks_and_learns_which(tmp_path: Path) -> None:
    with Server(tmp_path / "data", cache_bytes=0) as server, TraceClient(server.target) as client:
        publish_singly(client, range(5))
        for path in object_files(tmp_path / "data"):
            content = path.read_bytes()
            if content == make_block(1):
                path.write_bytes(content[:-1] + b"x")
            elif content in (make_block(2), make_block(4)):
                path.write_bytes(content[:10])
        blocks = iter(client.subscribe("s"))
        assert bytes(next(blocks).block) == make_block(0)
        with pytest.raises(CorruptBlockError, match="block 1 of stream 's' is damaged"):
            next(blocks)
        client.seal_stream("s")
        with client.subscribe("s", on_corrupt="skip") as patient:
            read = {received.offset: bytes(received.block) for received in patient}
        assert read == {0: make_block(0), 3: make_block(3)}
        assert patient.damaged_offsets == (1, 2, 4)
        assert patient.next_offset == 5
        with pytest.raises(CorruptBlockError):
            read_all(client)
        assert server.log.count("block 1 of stream 's' is damaged") == 1


def test_a_bad_sector_costs_its_block_and_no_other(data_dir: Path) -> None:
    async def read(backend: Backend) -> None:
        record = await backend.catalog.get_stream("s")
        failpoints.arm("store.before_read=eio@2")
        try:
            assert await read_each(backend, record) == [BLOCKS[0], None, BLOCKS[2]]
            # All three at once, the second of which fails again: what is before it is not lost with it.
            failpoints.arm("store.before_read=eio@2")
            assert await backend.reader.read(record, 0, end=3) == BLOCKS[:1]
        finally:
            failpoints.arm("")

    with_backend(data_dir, read)
