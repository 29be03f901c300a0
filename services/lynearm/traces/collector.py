"""Lets go of what need not be kept: blocks that a stream's retention gives up, and objects without rows.

Invariants:

- What a row points at is never deleted: rows go first, in a transaction, and objects after it.
- An object that no row names is condemned in the catalog before it is deleted, so that no server, however
  late, can commit it afterwards. Its age only spares the trouble for those about to be committed.
- Any number of servers may collect at the same time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from lynearm.traces.catalog import Catalog, StreamRecord
from lynearm.traces.store import BlockStore
from lynearm.wire.errors import LynearmError
from lynearm.wire.retention import Collected

logger = logging.getLogger(__name__)

EXPIRE_COUNT = 1000
"""Blocks that go in one transaction, which holds up the stream's publishers."""

DELETE_COUNT = 16
"""Objects that are being deleted at the same time."""


class Collector:
    """Collects when asked, and by itself in `run`.

    Args:
        catalog: Knows what is kept.
        store: Holds it.
        orphan_seconds: Age at which an object without rows is condemned.
    """

    def __init__(self, catalog: Catalog, store: BlockStore, *, orphan_seconds: float) -> None:
        self._catalog = catalog
        self._store = store
        self._orphan_seconds = orphan_seconds

    async def run(self, period_seconds: float) -> None:
        """Collect for ever: expired blocks each period, orphans as often as they can become old enough."""
        next_orphans = time.monotonic() + self._orphan_seconds
        while True:
            await asyncio.sleep(period_seconds)
            due = time.monotonic() >= next_orphans
            try:
                await self.collect(orphans=due)
            except LynearmError as error:
                logger.warning("collecting comes later: %s", error)
            if due:
                next_orphans = time.monotonic() + self._orphan_seconds

    async def collect(self, *, orphans: bool = True) -> Collected:
        """One pass.

        Args:
            orphans: Also search the whole store for objects without rows.

        Raises:
            StorageError, ServiceUnavailableError: the catalog or the store failed; what was done is done.
        """
        block_count, size_bytes = 0, 0
        for stream in await self._catalog.list_streams():
            if stream.info.retention.is_bounded:
                blocks, size = await self._expire(stream)
                block_count += blocks
                size_bytes += size
        orphan_count = await self._delete_orphans() if orphans else 0
        if orphan_count:
            logger.info("deleted %d objects that were never committed", orphan_count)
        return Collected(block_count, size_bytes, orphan_count)

    async def _expire(self, stream: StreamRecord) -> tuple[int, int]:
        block_count, size_bytes = 0, 0
        while True:
            expired = await self._catalog.expire_blocks(stream.stream_id, time.time_ns(), EXPIRE_COUNT)
            await delete_objects(self._store, expired.object_keys)
            block_count += expired.block_count
            size_bytes += expired.size_bytes
            if expired.block_count < EXPIRE_COUNT:
                break
        if block_count:
            logger.info(
                "stream %s: %d blocks, %d bytes expired; it begins at offset %d",
                stream.name,
                block_count,
                size_bytes,
                expired.first_offset,
            )
        return block_count, size_bytes

    async def _delete_orphans(self) -> int:
        count = 0
        async for keys in self._store.list_keys(self._orphan_seconds):
            # A look without locks first: nearly always there is nothing to write.
            if found := await self._catalog.find_unreferenced(keys):
                condemned = await self._catalog.condemn_objects(found)
                await delete_objects(self._store, condemned)
                count += len(condemned)
        return count


async def sweep(catalog: Catalog, store: BlockStore) -> None:
    """Delete the objects that no row points at, whatever their age: groups whose commit never happened.

    Only where no other server uses the store.
    """
    count = 0
    async for keys in store.list_keys():
        for key in await catalog.find_unreferenced(keys):
            await store.delete(key)
            count += 1
    if count:
        logger.info("deleted %d objects that were never committed", count)


async def delete_objects(store: BlockStore, object_keys: Iterable[str]) -> None:
    """Delete objects whose rows are gone; those that resist stay for the collector."""
    room = asyncio.Semaphore(DELETE_COUNT)

    async def delete(key: str) -> None:
        async with room:
            try:
                await store.delete(key)
            except LynearmError as error:
                logger.warning("object %s stays until it is collected: %s", key, error)

    async with asyncio.TaskGroup() as tasks:
        for key in object_keys:
            tasks.create_task(delete(key))
