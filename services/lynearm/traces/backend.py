"""What every call of one server works on: the catalog, the blocks, and what is kept of both in memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from lynearm.traces.catalog import Catalog, StreamRecord, stream_not_found
from lynearm.traces.collector import Collector, delete_objects, sweep
from lynearm.traces.commit import GroupCommitter
from lynearm.traces.config import ServeConfig
from lynearm.traces.current_call import note_tail
from lynearm.traces.dictionaries import KnownDictionaries
from lynearm.traces.free_space import FreeSpace
from lynearm.traces.lag_gate import LagGates
from lynearm.traces.observation import UNWATCHED, Observation
from lynearm.traces.reader import BlockCache, BlockReader
from lynearm.traces.silence import SilenceWatch
from lynearm.traces.storage import open_storage
from lynearm.traces.store import BlockStore
from lynearm.traces.tail import StreamTail, Tails
from lynearm.traces.wakeups import follow_catalog

logger = logging.getLogger(__name__)

_RESTART_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Backend:
    """The parts of a server behind its calls. Made by `open_backend`."""

    catalog: Catalog
    store: BlockStore
    cache: BlockCache
    tails: Tails
    reader: BlockReader
    committer: GroupCommitter
    dictionaries: KnownDictionaries
    space: FreeSpace
    collector: Collector
    lag: LagGates
    silence: SilenceWatch

    async def watch_stream(self, name: str) -> tuple[StreamRecord, StreamTail]:
        """A stream as it is, and the tail that tells of every commit from then on.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        record = await self.catalog.get_stream(name)
        while True:
            tail = self.tails.register(record.stream_id)
            # Read again: a commit between the first look and the registration woke nobody.
            latest = await self.catalog.get_stream(name)
            if latest.stream_id == record.stream_id:
                tail.advance(latest.info.next_offset, sealed=latest.info.sealed)
                note_tail(tail)
                return latest, tail
            record = latest

    async def seal_stream(self, name: str) -> StreamRecord:
        """Let a stream take no more blocks, and those who follow it finish.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        record = await self.catalog.seal_stream(name)
        self.tails.advance(record.stream_id, record.info.next_offset, sealed=True)
        return record

    async def delete_stream(self, name: str) -> None:
        """Remove a stream with its blocks and dictionaries, and end the calls that use it.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        deleted = await self.catalog.delete_stream(name)
        self.tails.end(deleted.stream_id, stream_not_found(name))
        self.cache.drop_stream(deleted.stream_id)
        self.reader.quarantine.drop_stream(deleted.stream_id)
        await delete_objects(self.store, deleted.object_keys)


@asynccontextmanager
async def open_backend(config: ServeConfig, observation: Observation = UNWATCHED) -> AsyncGenerator[Backend]:
    """Take catalog and blocks, with nothing in them but what was committed; on leaving, commit and let go.

    Args:
        config: Where it is.
        observation: Who watches.

    Raises:
        LynearmError: as for `open_storage`.
    """
    async with AsyncExitStack() as stack:
        storage = await stack.enter_async_context(open_storage(config))
        catalog = observation.watch_catalog(storage.catalog)
        store = observation.watch_store(storage.store)
        if not (catalog.is_shared or store.is_shared):
            await sweep(catalog, store)
        cache, tails = BlockCache(config.cache_bytes), Tails()
        collector = Collector(catalog, store, orphan_seconds=config.orphan_seconds)
        await stack.enter_async_context(_running(partial(follow_catalog, catalog, tails, cache)))
        if config.collect_seconds:
            await stack.enter_async_context(_running(partial(collector.run, config.collect_seconds)))
        committer = GroupCommitter(
            catalog,
            store,
            cache,
            tails,
            group_seconds=config.group_milliseconds / 1000,
            group_bytes=config.group_bytes,
            queue_bytes=config.queue_bytes,
        )
        await stack.enter_async_context(committer)
        committer = observation.watch_committer(committer)
        reader = BlockReader(catalog, store, cache)
        silence = SilenceWatch(config.lease_silence_seconds)
        await stack.enter_async_context(_running(silence.run))
        yield Backend(
            catalog,
            store,
            cache,
            tails,
            reader,
            committer,
            KnownDictionaries(catalog),
            storage.space,
            collector,
            LagGates(catalog),
            silence,
        )


@asynccontextmanager
async def _running(make_work: Callable[[], Coroutine[object, object, None]]) -> AsyncGenerator[None]:
    """Run something beside the context until it or the context ends; again, should it fail."""

    async def run() -> None:
        while True:
            try:
                return await make_work()
            except Exception:
                logger.exception("%s failed, and is started again", make_work)
            await asyncio.sleep(_RESTART_SECONDS)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
