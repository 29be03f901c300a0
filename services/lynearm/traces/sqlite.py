"""A catalog's database in SQLite: one file, for one server.

One connection writes, on its own thread: transactions queue there instead of meeting SQLITE_BUSY, and the
SQLite of many systems has a bug that concurrent writers of a WAL can hit (the WAL-reset bug, fixed in
3.51.3). Readers have connections of their own and do not wait for commits. WAL with synchronous=FULL syncs
every commit; a commit that fails is never repeated here.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from lynearm.traces.catalog import StreamChange
from lynearm.wire.errors import StorageError, StorageFullError

READ_THREADS = 2
"""Index reads are short; more threads only queue for the interpreter lock."""

T = TypeVar("T")


class SqliteDatabase:
    """A `Database` in a SQLite file, which is made when missing; its directory exists.

    Args:
        path: The file. One server at a time may use it, which it does not check.
    """

    is_shared = False

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._write_engine = _make_engine(path, begin="BEGIN IMMEDIATE", pool_size=1)
        self._read_engine = _make_engine(
            path, begin="BEGIN", pool_size=READ_THREADS, pragmas=("query_only=ON",)
        )
        self._writer = ThreadPoolExecutor(1, "catalog-writer")
        self._readers = ThreadPoolExecutor(READ_THREADS, "catalog-reader")

    async def write(self, work: Callable[[Connection], T]) -> T:
        """See `Database.write`."""
        return await self._run(self._writer, self._write_engine, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """See `Database.read`."""
        return await self._run(self._readers, self._read_engine, work)

    def lock_schema(self, connection: Connection) -> None:
        """See `Database.lock_schema`; every writing transaction has the file to itself."""

    def announce(self, connection: Connection, changes: Sequence[StreamChange]) -> None:
        """See `Database.announce`; there is nobody to tell."""

    async def listen(self) -> AsyncIterator[StreamChange | None]:
        """See `Database.listen`: every change is this server's own, which knows of it."""
        nothing: tuple[StreamChange, ...] = ()
        for change in nothing:
            yield change

    async def close(self) -> None:
        """See `Database.close`."""
        for executor in (self._readers, self._writer):
            await asyncio.to_thread(executor.shutdown)
        for engine in (self._read_engine, self._write_engine):
            await asyncio.to_thread(engine.dispose)

    async def _run(self, executor: ThreadPoolExecutor, engine: Engine, work: Callable[[Connection], T]) -> T:
        def transaction() -> T:
            with engine.begin() as connection:
                return work(connection)

        try:
            return await asyncio.get_running_loop().run_in_executor(executor, transaction)
        except DBAPIError as error:
            raise _storage_error(error, self.where) from error


def _make_engine(path: Path, *, begin: str, pool_size: int, pragmas: tuple[str, ...] = ()) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
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


def _storage_error(error: DBAPIError, where: str) -> StorageFullError | StorageError:
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return StorageFullError(f"no room left for the catalog {where}", "free space, then try again")
    return StorageError(f"catalog {where}: {error.orig}", "look at the server's disk and log")
