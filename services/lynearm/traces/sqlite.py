"""A catalog's database in SQLite: one file, for one server, or for several of one machine.

One connection writes, on its own thread: transactions queue there instead of meeting SQLITE_BUSY, and the
SQLite of many systems has a bug that concurrent writers of a WAL can hit (the WAL-reset bug, fixed in
3.51.3). Servers that share a file therefore take turns: a lock that the system gives back when its holder
dies is held around each writing transaction. Readers have connections of their own and do not wait for
commits. WAL with synchronous=FULL syncs every commit; a commit that fails is never repeated here.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from lynearm.traces.catalog import StreamChange
from lynearm.wire.errors import CatalogUnavailableError, StorageError, StorageFullError

READ_THREADS = 2
"""Index reads are short; more threads only queue for the interpreter lock."""

POLL_SECONDS = 0.2
"""Between two readings of a shared catalog for what other servers committed: one query over the streams in
use."""

TURN_SECONDS = 60.0
"""Longest wait for the other servers of a shared file."""

T = TypeVar("T")


class SqliteDatabase:
    """A `Database` in a SQLite file, which is made when missing; its directory exists.

    Args:
        path: The file. Without `shared`, one server at a time may use it, which it does not check.
        shared: Other servers of this machine use it, all of them with this set.

    Raises:
        StorageError: the file by which they take turns cannot be made.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.where = str(path)
        self.is_shared = shared
        self._turns = _Turns(path.with_name(f"{path.name}.turn")) if shared else None
        self._write_engine = _make_engine(path, begin="BEGIN IMMEDIATE", pool_size=1)
        self._read_engine = _make_engine(
            path, begin="BEGIN", pool_size=READ_THREADS, pragmas=("query_only=ON",)
        )
        self._writer = ThreadPoolExecutor(1, "catalog-writer")
        self._readers = ThreadPoolExecutor(READ_THREADS, "catalog-reader")

    async def write(self, work: Callable[[Connection], T]) -> T:
        """See `Database.write`."""

        def transaction() -> T:
            with self._turns or nullcontext(), self._write_engine.begin() as connection:
                return work(connection)

        return await self._run(self._writer, transaction)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """See `Database.read`."""

        def transaction() -> T:
            with self._read_engine.begin() as connection:
                return work(connection)

        return await self._run(self._readers, transaction)

    async def settle(self) -> None:
        """See `Database.settle`.

        A process may have been killed between writing a commit and syncing it. SQLite then takes the commit
        for done when it opens the file, but syncs it only with the next one, or with a checkpoint.
        """

        def checkpoint() -> None:
            # Outside a transaction, where SQLAlchemy's connections never are.
            with self._turns or nullcontext(), closing(self._write_engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA wal_checkpoint(FULL)")

        await self._run(self._writer, checkpoint)

    def lock_schema(self, connection: Connection) -> None:
        """See `Database.lock_schema`; every writing transaction has the file to itself."""

    def announce(self, connection: Connection, changes: Sequence[StreamChange]) -> None:
        """See `Database.announce`; who listens looks by itself."""

    async def listen(self) -> AsyncIterator[StreamChange | None]:
        """See `Database.listen`; a server that is alone knows of every change, which is its own."""
        while self.is_shared:
            yield None
            await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        """See `Database.close`."""
        for executor in (self._readers, self._writer):
            await asyncio.to_thread(executor.shutdown)
        for engine in (self._read_engine, self._write_engine):
            await asyncio.to_thread(engine.dispose)
        if self._turns:
            self._turns.close()

    async def _run(self, executor: ThreadPoolExecutor, transaction: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, transaction)
        except (DBAPIError, sqlite3.Error) as error:
            raise _storage_error(error, self.where) from error


class _Turns:
    """Lets one server write at a time: a context that is entered by one thread of each server."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}", "choose another place for the catalog") from error

    def __enter__(self) -> None:
        deadline = time.monotonic() + TURN_SECONDS
        while True:
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise CatalogUnavailableError(
                        f"another server has written to the catalog for {TURN_SECONDS:g} s ({self._path})",
                        "see whether one of the servers hangs, and end it",
                    ) from error
            # Not exactly as long as the other server pauses between two commits.
            time.sleep(random.uniform(0.0002, 0.002))

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._descriptor)


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


def _storage_error(error: DBAPIError | sqlite3.Error, where: str) -> StorageFullError | StorageError:
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return StorageFullError(f"no room left for the catalog {where}", "free space, then try again")
    return StorageError(f"catalog {where}: {cause}", "look at the server's disk and log")
