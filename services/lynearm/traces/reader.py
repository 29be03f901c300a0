"""Reads committed blocks: from memory while they are recent, else from the store, checked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby

import xxhash

from lynearm.traces.catalog import BlockLocation, Catalog, StreamRecord
from lynearm.traces.quarantine import Quarantine
from lynearm.traces.store import BlockStore
from lynearm.wire.errors import OffsetExpiredError, OffsetNotFoundError, StorageError

READ_BYTES = 4 << 20
"""Most bytes that one read holds in memory, plus one block. Enough to pay for the hop to a thread."""

READ_COUNT = 64
"""Most blocks looked up in one query."""


class BlockCache:
    """The blocks committed last, over all streams, bounded in bytes; the oldest leave first.

    A replay reads from the store and leaves nothing here, so that it cannot push out the live tails.

    Args:
        capacity_bytes: Bound on the sum of the blocks' sizes; 0 keeps none.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._size_bytes = 0
        self._blocks: OrderedDict[tuple[int, int], bytes | memoryview] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of the blocks held."""
        return self._size_bytes

    def get(self, stream_id: int, offset: int) -> bytes | memoryview | None:
        """The block, or None when it is not held."""
        return self._blocks.get((stream_id, offset))

    def put(self, stream_id: int, offset: int, block: bytes | memoryview) -> None:
        """Hold a block that was committed just now, at the cost of older ones."""
        self._blocks[stream_id, offset] = block
        self._size_bytes += len(block)
        while self._size_bytes > self._capacity_bytes:
            _, evicted = self._blocks.popitem(last=False)
            self._size_bytes -= len(evicted)

    def drop_stream(self, stream_id: int) -> None:
        """Forget every block of a deleted stream."""
        for key in [key for key in self._blocks if key[0] == stream_id]:
            self._size_bytes -= len(self._blocks.pop(key))


class BlockReader:
    """Random access to the blocks of every stream.

    Args:
        catalog: Knows where blocks lie.
        store: Holds them.
        cache: Holds the recent ones.
    """

    def __init__(self, catalog: Catalog, store: BlockStore, cache: BlockCache) -> None:
        self._catalog = catalog
        self._store = store
        self._cache = cache
        self.quarantine = Quarantine()

    async def read(
        self, stream: StreamRecord, offset: int, *, end: int, max_bytes: int = READ_BYTES
    ) -> list[bytes | memoryview]:
        """Consecutive blocks from `offset` on.

        Args:
            stream: The stream; only its id and name are used.
            offset: First block; below `end`.
            end: Stop before this offset; blocks below it are committed.
            max_bytes: Stop with the block that reaches this sum; at least one block is returned.

        Raises:
            CorruptBlockError: the first block read is not what was committed. A corrupt block further on
                only ends the list: what precedes it stays readable.
            OffsetExpiredError: the stream does not keep the block any more.
            OffsetNotFoundError: the catalog has no such block; the stream was deleted meanwhile.
            StorageError: the store failed.
        """
        max_bytes = min(max_bytes, READ_BYTES)
        cached = self._read_cache(stream.stream_id, offset, end, max_bytes)
        if cached:
            return cached
        count = min(end - offset, READ_COUNT)
        locations = await self._locate(stream, offset, count)
        try:
            return await self._read_store(stream, _first_bytes(locations, max_bytes))
        except StorageError:
            # Did the blocks expire, and their object with them, between the look-up and the reading?
            await self._locate(stream, offset, 1)
            raise

    async def _locate(self, stream: StreamRecord, offset: int, count: int) -> list[BlockLocation]:
        locations = await self._catalog.find_blocks(stream.stream_id, offset, count)
        if locations and locations[0].offset == offset:
            return locations
        progress = (await self._catalog.find_progress([stream.stream_id])).get(stream.stream_id)
        if progress is not None and offset < progress.next_offset:
            first_offset = locations[0].offset if locations else progress.next_offset
            raise offset_expired(stream.name, offset, first_offset)
        raise OffsetNotFoundError(f"stream {stream.name!r} has no block at offset {offset}")

    def _read_cache(self, stream_id: int, offset: int, end: int, max_bytes: int) -> list[bytes | memoryview]:
        found: list[bytes | memoryview] = []
        while offset < end and max_bytes > 0:
            block = self._cache.get(stream_id, offset)
            if block is None:
                break
            found.append(block)
            offset += 1
            max_bytes -= len(block)
        return found

    async def _read_store(
        self, stream: StreamRecord, locations: Sequence[BlockLocation]
    ) -> list[bytes | memoryview]:
        found: list[bytes | memoryview] = []
        for key, group in groupby(locations, key=lambda location: location.object_key):
            of_object = list(group)
            blocks = await self._store.read(key, [location.span for location in of_object])
            for location, block in zip(of_object, blocks, strict=True):
                if len(block) != location.span.length or xxhash.xxh3_64_intdigest(block) != location.checksum:
                    if found:
                        return found
                    raise self.quarantine.add(stream, location, len(block))
                self.quarantine.release(stream, location.offset)
                found.append(block)
        return found


def offset_expired(stream_name: str, offset: int, first_offset: int) -> OffsetExpiredError:
    """The error of a block that a stream's retention has given up."""
    return OffsetExpiredError(
        f"stream {stream_name!r} keeps block {offset} no more, its first offset is {first_offset}",
        f"continue from offset {first_offset}, or keep blocks for longer",
    )


def _first_bytes(locations: Sequence[BlockLocation], max_bytes: int) -> list[BlockLocation]:
    taken: list[BlockLocation] = []
    for location in locations:
        if max_bytes <= 0:
            break
        taken.append(location)
        max_bytes -= location.span.length
    return taken
