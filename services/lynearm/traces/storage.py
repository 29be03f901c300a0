"""Opens the catalog and the block store that a configuration names, and refuses those that do not fit."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lynearm.traces.catalog import Catalog
from lynearm.traces.config import ServeConfig, local_path
from lynearm.traces.free_space import FreeSpace
from lynearm.traces.sql_catalog import SqlCatalog
from lynearm.traces.store import BlockStore, LocalBlockStore, sync_directory
from lynearm.wire.errors import PreconditionError, StorageError

logger = logging.getLogger(__name__)

_IDENTITY = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Storage:
    """Where a server keeps everything."""

    catalog: Catalog
    store: BlockStore
    space: FreeSpace
    """Of the disk that the catalog is on."""


@asynccontextmanager
async def open_storage(config: ServeConfig) -> AsyncGenerator[Storage]:
    """Take catalog and blocks; on leaving, let go.

    What is on this machine is locked, against others or with them; what is elsewhere is not.

    Raises:
        PreconditionError: another server uses them, the catalog's blocks are in another store, or the blocks
            are those of another catalog.
        ConfigError: a URL cannot be understood, the store cannot serve several servers, or a later version
            of lynearm wrote the catalog.
        StorageError: they cannot be used.
        CatalogUnavailableError, StoreUnavailableError: they cannot be reached.
    """
    async with AsyncExitStack() as stack:
        catalog = await _open_catalog(config, stack)
        store = await _open_store(config, stack, shared_catalog=catalog.is_shared)
        await _check_pair(catalog, store)
        yield Storage(catalog, store, _space_of(_catalog_path(config), config))


async def _open_catalog(config: ServeConfig, stack: AsyncExitStack) -> SqlCatalog:
    path = _catalog_path(config)
    if path is None:
        # Here, so that SQLite alone needs no driver of PostgreSQL.
        from lynearm.traces.postgresql import PostgresDatabase

        catalog = await SqlCatalog.open(PostgresDatabase(config.catalog))
    else:
        from lynearm.traces.sqlite import SqliteDatabase

        # The lock of the data directory covers all that is in it.
        name = f"{path.name}.lock" if config.catalog else "lock"
        stack.enter_context(lock_directory(path.parent, name=name, shared=config.shared))
        catalog = await SqlCatalog.open(SqliteDatabase(path, shared=config.shared))
    stack.push_async_callback(catalog.close)
    return catalog


def _catalog_path(config: ServeConfig) -> Path | None:
    return local_path(config.catalog) if config.catalog else config.data_dir / "catalog.sqlite3"


def _space_of(path: Path | None, config: ServeConfig) -> FreeSpace:
    """The watermark of what is at a path; of what is elsewhere, its own machine takes care."""
    return FreeSpace(Path(), 0) if path is None else FreeSpace(path.parent, config.min_free_bytes)


async def _open_store(config: ServeConfig, stack: AsyncExitStack, *, shared_catalog: bool) -> BlockStore:
    store: BlockStore
    path = local_path(config.blocks) if config.blocks else config.data_dir / "blocks"
    if path is None:
        from lynearm.traces.object_store import ObjectBlockStore

        store = await ObjectBlockStore.open(config.blocks, several_writers=shared_catalog)
    else:
        if shared_catalog and not config.shared:
            make_directory(path.parent)
            logger.warning(
                "blocks are in %s, while other servers may use the catalog too: all must be on this machine, "
                "or reach that directory under whatever path; an object store serves any",
                path,
            )
        elif config.blocks or config.catalog:
            # Else the lock of the data directory covers both.
            lock = lock_directory(path.parent, name=f"{path.name}.lock", shared=config.shared)
            stack.enter_context(lock)
        store = LocalBlockStore(path, _space_of(path, config))
    stack.push_async_callback(store.close)
    return store


async def _check_pair(catalog: Catalog, store: BlockStore) -> None:
    """Refuse a store without the catalog's blocks: another bucket, or the same path on another machine.

    And one with the blocks of another catalog, of which this one would make garbage: its own was lost, or is
    on a disk that is not mounted.
    """
    identity = await store.identity()
    if not _IDENTITY.fullmatch(identity):
        raise StorageError(
            f"block store {store.where} says that it is {identity[:40]!r}, expected 32 hexadecimal digits",
            "restore what the store said before from a copy of it",
        )
    expected = await catalog.adopt_store(identity, is_empty=False)
    # Only a new catalog asks: listing a large store takes its time.
    if expected is None and await _is_empty(store):
        expected = await catalog.adopt_store(identity, is_empty=True)
    if expected is None:
        raise PreconditionError(
            f"the catalog is new, and block store {store.where} holds the blocks of another",
            "name the catalog that these blocks belong to, or restore it from a copy; to begin anew, name an "
            "empty store as --blocks",
        )
    if identity != expected:
        raise PreconditionError(
            f"the catalog's blocks are in another store than {store.where} "
            f"(which is {identity}, expected {expected})",
            "name the store that the catalog began with as --blocks, or begin with both empty",
        )


async def _is_empty(store: BlockStore) -> bool:
    async with aclosing(cast("AsyncGenerator[list[str]]", store.list_keys())) as batches:
        async for keys in batches:
            if keys:
                return False
    return True


@contextmanager
def lock_directory(path: Path, *, name: str = "lock", shared: bool = False) -> Generator[None]:
    """Own a directory, created when missing, until the context or the process ends.

    Args:
        path: The directory.
        name: Of the file in it that is locked.
        shared: Own it together with others who say so too.

    Raises:
        PreconditionError: another process owns it.
        StorageError: it cannot be created or written.
    """
    try:
        make_directory(path)
        descriptor = os.open(path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise StorageError(f"data directory {path}: {error.strerror}", "choose another directory") from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreconditionError(
                f"data directory {path} is used by another trace server",
                "stop that one, choose another directory, or start both with --shared",
            ) from error
        yield
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory with those above it, durably.

    Raises:
        OSError: it cannot be made.
    """
    path = path.absolute()
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)
