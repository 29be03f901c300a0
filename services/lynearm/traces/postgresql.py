"""A catalog's database in PostgreSQL, for any number of servers.

Transactions run at READ COMMITTED and are kept apart by the row locks of `transactions`. What fails falls
into three kinds, told apart honestly:

- It is certain that nothing was committed, and trying again may help (a deadlock, a lost race for a unique
  key, a pooled connection that had died): the transaction is run again, a few times.
- It is certain that nothing was committed: a typed error.
- The connection was lost while the commit was on its way: nobody knows. It is never repeated here; the
  caller gets CatalogUnavailableError, and a publisher sends its blocks again under the same sequence numbers.

Every wait is bounded, here and in the database: a server that freezes in a transaction is thrown out by the
database, which frees its locks, before anybody else runs out of patience.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from lynearm.traces.catalog import StreamChange
from lynearm.traces.postgresql_errors import database_error, describe, may_repeat
from lynearm.traces.postgresql_listen import ANNOUNCE, encode_change, listen
from lynearm.wire.errors import ConfigError, LynearmError, MissingDependencyError

logger = logging.getLogger(__name__)

WRITE_THREADS = 4
"""Commits come one at a time from each server; the rest is for what users ask for meanwhile."""

READ_THREADS = 4

TRIES = 5
"""Of a transaction that certainly left nothing."""

_CONNECT_DEFAULTS: dict[str, str | int] = {
    "application_name": "lynearm",
    "client_encoding": "utf8",
    "connect_timeout": 10,
    # A database machine that vanished is noticed in 25 s instead of hours.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}

_SESSION_SETTINGS: dict[str, str] = {
    "lock_timeout": "20s",
    "statement_timeout": "120s",
    # Below lock_timeout: who froze with locks loses them before others give up waiting.
    "idle_in_transaction_session_timeout": "15s",
    # The same from the database's side: a server machine that vanished does not keep its locks.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}

_SCHEMA_LOCK = int.from_bytes(b"lynearm")

T = TypeVar("T")


class PostgresDatabase:
    """A `Database` in PostgreSQL.

    Args:
        url: postgresql://user@host:port/database, with the parameters of libpq as its query; what it
            leaves out, the password above all, comes from libpq's environment and files.

    Raises:
        ConfigError: the URL cannot be understood, or, when it is first used, the database's encoding is not
            UTF-8. Its password is in no message.
        MissingDependencyError: psycopg is not installed.
    """

    is_shared = True

    def __init__(self, url: str) -> None:
        self._engine, self._connect_options = _make_engine(url)
        self.where = describe(self._engine.url)
        self._writers = ThreadPoolExecutor(WRITE_THREADS, "catalog-writer")
        self._readers = ThreadPoolExecutor(READ_THREADS, "catalog-reader")

    async def write(self, work: Callable[[Connection], T]) -> T:
        """See `Database.write`."""
        return await asyncio.get_running_loop().run_in_executor(self._writers, self._transact, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """See `Database.read`."""
        read = partial(self._transact, work, reading=True)
        return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    async def settle(self) -> None:
        """See `Database.settle`; PostgreSQL shows nothing that its log does not hold durably."""

    def lock_schema(self, connection: Connection) -> None:
        """See `Database.lock_schema`."""
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})

    def announce(self, connection: Connection, changes: Sequence[StreamChange]) -> None:
        """See `Database.announce`."""
        if changes:
            connection.execute(ANNOUNCE, {"payloads": [encode_change(change) for change in changes]})

    def listen(self) -> AsyncIterator[StreamChange | None]:
        """See `Database.listen`."""
        return listen(self._connect_options, self.where)

    async def close(self) -> None:
        """See `Database.close`."""
        for executor in (self._readers, self._writers):
            await asyncio.to_thread(executor.shutdown)
        await asyncio.to_thread(self._engine.dispose)

    def _transact(self, work: Callable[[Connection], T], *, reading: bool = False) -> T:
        for left in range(TRIES - 1, -1, -1):
            attempt = _Attempt(reading=reading)
            try:
                return attempt.run(self._engine, work)
            except DBAPIError as error:
                if not left or not may_repeat(error, committing=attempt.committing):
                    raise self._typed_error(error, attempt) from error
                logger.debug("catalog %s: once more, after %s", self.where, type(error.orig).__name__)
            time.sleep(random.uniform(0, 0.1))
        raise AssertionError("the last try returns or raises")

    def _typed_error(self, error: DBAPIError, attempt: _Attempt) -> LynearmError:
        return database_error(error, self._engine.url, committing=attempt.committing)


class _Attempt:
    """One run of a transaction."""

    def __init__(self, *, reading: bool) -> None:
        self._reading = reading
        self.committing = False
        """Whether the commit was sent: from then on a lost connection leaves the outcome unknown."""

    def run(self, engine: Engine, work: Callable[[Connection], T]) -> T:
        with engine.connect() as connection, connection.begin() as transaction:
            result = work(connection)
            self.committing = not self._reading
            transaction.commit()
            return result


def _make_engine(url: str) -> tuple[Engine, dict[str, Any]]:
    """An engine, and what psycopg connects with: of many types, hence Any."""
    from sqlalchemy import make_url

    try:
        parsed = make_url(url).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError):
        # Not `from error`, whose text may hold the whole URL.
        raise ConfigError(
            "the catalog's URL cannot be understood",
            "write postgresql://user@host:port/database; % and @ in a password are %25 and %40",
        ) from None
    options = {key: value for key, value in _CONNECT_DEFAULTS.items() if key not in parsed.query}
    try:
        engine = create_engine(
            parsed,
            isolation_level="READ COMMITTED",
            pool_size=WRITE_THREADS + READ_THREADS,
            max_overflow=0,
            connect_args=options,
            # Statements carry prompt ids and specs, which belong in no log.
            hide_parameters=True,
        )
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "a catalog in PostgreSQL needs psycopg", "pip install 'lynearm[cluster]'"
        ) from error
    event.listen(engine, "connect", _set_up)
    _, named = engine.dialect.create_connect_args(parsed)
    return engine, {**named, **options}


def _set_up(connection: Any, _: ConnectionPoolEntry) -> None:
    # Any: SQLAlchemy hands over the driver's own connection.
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        # In another one, a prompt id that has no place in it would fail every block of its commit.
        raise ConfigError(
            f"the catalog's database cannot hold any text: its encoding is {encoding}, expected UTF8",
            "make it with `createdb --template=template0 --encoding=UTF8`",
        )
    for name, value in _SESSION_SETTINGS.items():
        connection.execute("SELECT set_config(%s, %s, false)", (name, value))
    # Acknowledged means durable, whatever the database's default is; stronger settings stay.
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) "
        "WHERE current_setting('synchronous_commit') = 'off'"
    )
    connection.commit()
