"""How servers on one PostgreSQL tell each other of commits: LISTEN and NOTIFY.

A notification leaves the database when its transaction has committed, and only then; so what it says is in
the catalog. One that is lost, with the connection or on the way through a pooler that does not pass them
on, is made good by the None that `listen` gives at least every `POLL_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import text

from lynearm.traces.catalog import StreamChange

if TYPE_CHECKING:
    from psycopg import AsyncConnection

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Between two readings of the catalog, for what no notification told: one query over the streams in use."""

# Catalogs in different schemas of one database have different tables, and so channels.
_CHANNEL = "'lynearm_' || 'streams'::regclass::oid"

ANNOUNCE = text(f"SELECT pg_notify({_CHANNEL}, payload) FROM unnest(CAST(:payloads AS text[])) AS payload")
"""Sends `payloads`, a list of texts, when its transaction commits."""


def encode_change(change: StreamChange) -> str:
    """A change as the payload of a notification."""
    return f"{change.stream_id} {change.next_offset} {change.state} {change.stream_name}"


def decode_change(payload: str) -> StreamChange | None:
    """The change in a payload; None where it is none: any user of the database may notify."""
    try:
        stream_id, next_offset, state, name = payload.split(" ")
        if state not in ("open", "sealed", "deleted"):
            return None
        return StreamChange(int(stream_id), name, int(next_offset), cast("Any", state))
    except ValueError:
        return None


async def listen(options: Mapping[str, Any], where: str) -> AsyncIterator[StreamChange | None]:
    """See `Catalog.listen`.

    Args:
        options: What psycopg connects with.
        where: The database, for people.
    """
    import psycopg

    while True:
        try:
            connection = await psycopg.AsyncConnection.connect(**options, autocommit=True)
            async with connection:
                await _subscribe(connection)
                logger.debug("listening to catalog %s", where)
                while True:
                    # First, and again and again: the catalog is read after it is listened to.
                    yield None
                    async for notification in connection.notifies(timeout=POLL_SECONDS):
                        yield decode_change(notification.payload)
        except psycopg.Error as error:
            # Never the whole error: libpq's may name what it tried to connect with.
            logger.warning("listening to catalog %s broke off: %s", where, type(error).__name__)
        yield None
        await asyncio.sleep(POLL_SECONDS)


async def _subscribe(connection: AsyncConnection[Any]) -> None:
    from psycopg import sql

    row = await (await connection.execute(f"SELECT {_CHANNEL}")).fetchone()
    channel = str(row[0]) if row else ""
    await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
