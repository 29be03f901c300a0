"""What every call of one server works on: the catalog, the blocks, and what is kept of both in memory."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lynearm.traces.catalog import Catalog, StreamRecord, stream_not_found
from lynearm.traces.commit import GroupCommitter
from lynearm.traces.config import ServeConfig
from lynearm.traces.current_call import note_tail
from lynearm.traces.dictionaries import KnownDictionaries
from lynearm.traces.observation import UNWATCHED, Observation
from lynearm.traces.reader import BlockCache, BlockReader
from lynearm.traces.sqlite_catalog import SqliteCatalog
from lynearm.traces.store import BlockStore, LocalBlockStore, sync_directory
from lynearm.traces.tail import StreamTail, Tails
from lynearm.wire.errors import LynearmError, PreconditionError, StorageError

logger = logging.getLogger(__name__)


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
        for key in deleted.object_keys:
            try:
                await self.store.delete(key)
            except LynearmError as error:
                logger.warning("object %s stays until the next start: %s", key, error)


@asynccontextmanager
async def open_backend(config: ServeConfig, observation: Observation = UNWATCHED) -> AsyncGenerator[Backend]:
    """Take the data directory, with nothing in it but what was committed; on leaving, commit and let go.

    Args:
        config: Where it is.
        observation: Who watches.

    Raises:
        PreconditionError: another server uses the directory.
        ConfigError: a later version of lynearm wrote it.
        StorageError: it cannot be used.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(lock_directory(config.data_dir))
        catalog = await SqliteCatalog.open(config.data_dir / "catalog.sqlite3")
        stack.push_async_callback(catalog.close)
        store = LocalBlockStore(config.data_dir / "blocks")
        stack.push_async_callback(store.close)
        await _sweep(catalog, store)
        catalog, store = observation.watch_catalog(catalog), observation.watch_store(store)
        cache, tails = BlockCache(config.cache_bytes), Tails()
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
        yield Backend(catalog, store, cache, tails, reader, committer, KnownDictionaries(catalog))


@contextmanager
def lock_directory(path: Path) -> Generator[None]:
    """Own a directory, created when missing, until the context or the process ends.

    Raises:
        PreconditionError: another process owns it.
        StorageError: it cannot be created or written.
    """
    try:
        _make_directory(path)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise StorageError(f"data directory {path}: {error.strerror}", "choose another directory") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreconditionError(
                f"data directory {path} is used by another trace server",
                "stop that one, or choose another directory",
            ) from error
        yield
    finally:
        os.close(descriptor)


def _make_directory(path: Path) -> None:
    path = path.absolute()
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


async def _sweep(catalog: Catalog, store: BlockStore) -> None:
    """Delete the objects that no row points at: groups whose commit never happened."""
    count = 0
    async for keys in store.list_keys():
        for key in await catalog.find_unreferenced(keys):
            await store.delete(key)
            count += 1
    if count:
        logger.info("deleted %d objects that were never committed", count)
