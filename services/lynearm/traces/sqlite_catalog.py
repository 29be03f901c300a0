"""The catalog in SQLite: one file beside the blocks.

One connection writes, on its own thread: transactions queue there instead of meeting SQLITE_BUSY, and the
SQLite of many systems has a bug that concurrent writers of a WAL can hit (the WAL-reset bug, fixed in
3.51.3). Readers have connections of their own and do not wait for commits. WAL with synchronous=FULL syncs
every commit; a commit that fails is never repeated here.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from lynearm.traces import migrations, transactions
from lynearm.traces.catalog import (
    BlockLocation,
    CommitOutcome,
    DeletedStream,
    FinishedPrompt,
    LabelledOffset,
    NewBlock,
    Producer,
    StreamRecord,
)
from lynearm.traces.consumer_records import NO_BOUND, MaxLag
from lynearm.traces.sql_queue import SqlQueue
from lynearm.traces.store import StoredObject
from lynearm.wire.errors import StorageError, StorageFullError
from lynearm.wire.specs import StreamSpec

READ_THREADS = 2
"""Index reads are short; more threads only queue for the interpreter lock."""

T = TypeVar("T")


class SqliteCatalog(SqlQueue):
    """A `Catalog` in a SQLite file. Make one with `open`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._write_engine = _make_engine(path, begin="BEGIN IMMEDIATE", pool_size=1)
        self._read_engine = _make_engine(
            path, begin="BEGIN", pool_size=READ_THREADS, pragmas=("query_only=ON",)
        )
        self._writer = ThreadPoolExecutor(1, "catalog-writer")
        self._readers = ThreadPoolExecutor(READ_THREADS, "catalog-reader")

    @classmethod
    async def open(cls, path: Path) -> SqliteCatalog:
        """Open the file, creating it and its tables when missing; an older version's is brought up to date.

        Raises:
            ConfigError: a later version of lynearm wrote the file.
            StorageError: the file is not a catalog or cannot be read.
        """
        catalog = cls(path)
        try:
            await catalog._write(lambda connection: migrations.prepare_schema(connection, str(path)))
        except BaseException:
            await catalog.close()
            raise
        return catalog

    async def create_stream(
        self, spec: StreamSpec, *, allow_existing: bool, max_lag: MaxLag = NO_BOUND
    ) -> StreamRecord:
        """See `Catalog.create_stream`."""
        return await self._write(
            lambda connection: transactions.create_stream(connection, spec, allow_existing, max_lag)
        )

    async def get_stream(self, name: str) -> StreamRecord:
        """See `Catalog.get_stream`."""
        return await self._read(lambda connection: transactions.get_stream(connection, name))

    async def list_streams(self) -> list[StreamRecord]:
        """See `Catalog.list_streams`."""
        return await self._read(transactions.list_streams)

    async def seal_stream(self, name: str) -> StreamRecord:
        """See `Catalog.seal_stream`."""
        return await self._write(lambda connection: transactions.seal_stream(connection, name))

    async def delete_stream(self, name: str) -> DeletedStream:
        """See `Catalog.delete_stream`."""
        return await self._write(lambda connection: transactions.delete_stream(connection, name))

    async def open_producer(self, stream_name: str, producer_id: str, epoch: int) -> Producer:
        """See `Catalog.open_producer`."""
        return await self._write(
            lambda connection: transactions.open_producer(connection, stream_name, producer_id, epoch)
        )

    async def commit(self, stored: StoredObject, blocks: Sequence[NewBlock]) -> list[CommitOutcome]:
        """See `Catalog.commit`."""
        return await self._write(lambda connection: transactions.commit(connection, stored, blocks))

    async def find_blocks(self, stream_id: int, offset: int, count: int) -> list[BlockLocation]:
        """See `Catalog.find_blocks`."""
        return await self._read(
            lambda connection: transactions.find_blocks(connection, stream_id, offset, count)
        )

    async def find_labels(self, stream_id: int, offset: int, count: int) -> list[LabelledOffset]:
        """See `Catalog.find_labels`."""
        return await self._read(
            lambda connection: transactions.find_labels(connection, stream_id, offset, count)
        )

    async def list_finished_prompts(self, stream_id: int, after: int, count: int) -> list[FinishedPrompt]:
        """See `Catalog.list_finished_prompts`."""
        return await self._read(
            lambda connection: transactions.list_finished_prompts(connection, stream_id, after, count)
        )

    async def put_dictionary(self, stream_name: str, digest: bytes, content: bytes) -> None:
        """See `Catalog.put_dictionary`."""
        await self._write(
            lambda connection: transactions.put_dictionary(connection, stream_name, digest, content)
        )

    async def get_dictionary(self, stream_name: str, digest: bytes) -> bytes:
        """See `Catalog.get_dictionary`."""
        return await self._read(
            lambda connection: transactions.get_dictionary(connection, stream_name, digest)
        )

    async def has_dictionary(self, stream_id: int, digest: bytes) -> bool:
        """See `Catalog.has_dictionary`."""
        return await self._read(lambda connection: transactions.has_dictionary(connection, stream_id, digest))

    async def find_unreferenced(self, object_keys: Sequence[str]) -> list[str]:
        """See `Catalog.find_unreferenced`."""
        return await self._read(lambda connection: transactions.find_unreferenced(connection, object_keys))

    async def close(self) -> None:
        """See `Catalog.close`."""
        for executor in (self._readers, self._writer):
            await asyncio.to_thread(executor.shutdown)
        for engine in (self._read_engine, self._write_engine):
            await asyncio.to_thread(engine.dispose)

    async def _write(self, work: Callable[[Connection], T]) -> T:
        return await self._run(self._writer, self._write_engine, work)

    async def _read(self, work: Callable[[Connection], T]) -> T:
        return await self._run(self._readers, self._read_engine, work)

    async def _run(self, executor: ThreadPoolExecutor, engine: Engine, work: Callable[[Connection], T]) -> T:
        def transaction() -> T:
            with engine.begin() as connection:
                return work(connection)

        try:
            return await asyncio.get_running_loop().run_in_executor(executor, transaction)
        except DBAPIError as error:
            raise _storage_error(error, self._path) from error


def _make_engine(path: Path, *, begin: str, pool_size: int, pragmas: tuple[str, ...] = ()) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        pool_size=pool_size,
        max_overflow=0,
        connect_args={"check_same_thread": False, "timeout": 60},
    )
    settings = ("journal_mode=WAL", "synchronous=FULL", "fullfsync=ON", "foreign_keys=ON", *pragmas)

    def set_up(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
        # Python's own transaction control begins too late; `begin_transaction` does it instead.
        connection.isolation_level = None
        for setting in settings:
            connection.execute(f"PRAGMA {setting}").close()

    def begin_transaction(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", set_up)
    event.listen(engine, "begin", begin_transaction)
    return engine


def _storage_error(error: DBAPIError, path: Path) -> StorageFullError | StorageError:
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return StorageFullError(f"no room left for the catalog {path}", "free space, then try again")
    return StorageError(f"catalog {path}: {error.orig}", "look at the server's disk and log")
