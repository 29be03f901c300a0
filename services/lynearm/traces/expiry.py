"""The catalog's transactions by which blocks and objects go: the other half of `transactions`.

Invariants:

- Blocks expire from the first one on, so that what a stream keeps is one range of offsets.
- The row of an object goes in the transaction that removes the last block which points at it; the object
  itself is deleted after that transaction.
- A publish that is repeated gets its first offset again, even when its block has expired: of the last
  `REMEMBERED_BLOCKS` of each producer's newest epoch, enough stays to compare with.
- An object that no row names may be garbage, or about to be committed by a server that is slow or frozen.
  Only one of both can insert the object's row, whose key is unique: the commit, or who condemns the object.
  So a condemned object can never be committed any more, whatever any clock says. Its row stays, without
  blocks, as the proof; it takes some 50 bytes, and only servers that were killed leave such objects.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import takewhile

from sqlalchemy import (
    ColumnElement,
    Connection,
    Exists,
    RowMapping,
    Table,
    delete,
    insert,
    select,
    update,
)

from lynearm.traces.catalog import ExpiredBlocks
from lynearm.traces.schema import blocks, consumers, expired_blocks, objects, producers, streams
from lynearm.traces.statements import chunks

REMEMBERED_BLOCKS = 8192
"""Of each producer. Twice what one call may hold unacknowledged: older ones cannot be sent again."""


def expire_blocks(connection: Connection, stream_id: int, now_unix_nano: int, limit: int) -> ExpiredBlocks:
    """See `Catalog.expire_blocks`."""
    this_stream = streams.c.id == stream_id
    stream = connection.execute(select(streams).where(this_stream).with_for_update(key_share=True)).mappings()
    row = stream.one_or_none()
    if row is None:
        return ExpiredBlocks(0, 0, 0, ())
    expired = _expired_prefix(connection, row, now_unix_nano, limit)
    if not expired:
        return ExpiredBlocks(row["first_offset"], 0, 0, ())
    first_offset = expired[-1]["offset"] + 1
    size_bytes = sum(block["size_bytes"] for block in expired)
    gone = (blocks.c.stream_id == stream_id) & (blocks.c.offset < first_offset)
    _remember(connection, stream_id, gone)
    connection.execute(delete(blocks).where(gone))
    left = {"first_offset": first_offset, "retained_bytes": row["retained_bytes"] - size_bytes}
    connection.execute(update(streams).where(this_stream).values(left))
    keys = release_objects(connection, {block["object_id"] for block in expired})
    return ExpiredBlocks(first_offset, len(expired), size_bytes, tuple(keys))


def release_objects(connection: Connection, object_ids: Iterable[int]) -> list[str]:
    """Remove the rows of those objects that no block points at any more; returns their keys.

    The rows are locked before blocks are looked for: of two transactions that take the last blocks of an
    object at the same time, the second one then sees what the first one took.
    """
    keys: list[str] = []
    for chunk in chunks(sorted(object_ids)):
        given = objects.c.id.in_(chunk)
        connection.execute(select(objects.c.id).where(given).order_by(objects.c.id).with_for_update()).all()
        unused = given & ~_has_blocks()
        keys += connection.scalars(select(objects.c.key).where(unused))
        connection.execute(delete(objects).where(unused))
    return keys


def find_unreferenced(connection: Connection, object_keys: Sequence[str]) -> list[str]:
    """See `Catalog.find_unreferenced`."""
    known = _find_objects(connection, object_keys)
    return [key for key in object_keys if not known.get(key)]


def condemn_objects(connection: Connection, object_keys: Sequence[str]) -> list[str]:
    """See `Catalog.condemn_objects`."""
    known = _find_objects(connection, object_keys)
    # Ascending, so that of two servers that condemn the same objects one waits for the other.
    unknown = sorted(set(object_keys) - known.keys())
    if unknown:
        now = time.time_ns()
        connection.execute(insert(objects), [{"key": key, "created_unix_nano": now} for key in unknown])
    return [key for key in object_keys if not known.get(key)]


def _remember(connection: Connection, stream_id: int, gone: ColumnElement[bool]) -> None:
    """Keep what identifies the blocks that a producer may still send again, and no others."""
    columns = [column.name for column in expired_blocks.columns]
    sendable = (
        select(*(blocks.c[name] for name in columns))
        .join(producers, producers.c.id == blocks.c.producer_key)
        .where(gone, _may_be_sent_again(blocks))
    )
    connection.execute(insert(expired_blocks).from_select(columns, sendable))
    of_producer = producers.c.id == expired_blocks.c.producer_key
    needed = select(producers.c.id).where(of_producer, _may_be_sent_again(expired_blocks)).exists()
    connection.execute(delete(expired_blocks).where(expired_blocks.c.stream_id == stream_id, ~needed))


def _may_be_sent_again(of: Table) -> ColumnElement[bool]:
    oldest = producers.c.last_sequence - REMEMBERED_BLOCKS
    return (of.c.epoch == producers.c.epoch) & (of.c.sequence > oldest)


def _find_objects(connection: Connection, object_keys: Sequence[str]) -> dict[str, bool]:
    """Whether blocks point at each object that has a row."""
    return {
        row.key: bool(row.has_blocks)
        for chunk in chunks(object_keys)
        for row in connection.execute(
            select(objects.c.key, _has_blocks().label("has_blocks")).where(objects.c.key.in_(chunk))
        )
    }


def _has_blocks() -> Exists:
    return select(blocks.c.object_id).where(blocks.c.object_id == objects.c.id).exists()


def _expired_prefix(
    connection: Connection, stream: RowMapping, now_unix_nano: int, limit: int
) -> list[RowMapping]:
    """The oldest blocks that the stream's retention gives up; `limit` at most."""
    max_bytes: int = stream["max_bytes"]
    max_age_seconds: int = stream["max_age_seconds"]
    read_below = _read_below(connection, stream["id"], stream["read_by"].split())
    oldest = (
        select(blocks.c.offset, blocks.c.size_bytes, blocks.c.object_id, objects.c.created_unix_nano)
        .join(objects, objects.c.id == blocks.c.object_id)
        .where(blocks.c.stream_id == stream["id"])
        .order_by(blocks.c.offset)
        .limit(limit)
    )
    kept_bytes: int = stream["retained_bytes"]

    def has_expired(block: RowMapping) -> bool:
        nonlocal kept_bytes
        # The newest block stays, or a stream of one large block would hold nothing.
        too_much: bool = 0 < max_bytes < kept_bytes and block["offset"] + 1 < stream["next_offset"]
        age_seconds: float = (now_unix_nano - block["created_unix_nano"]) / 1e9
        kept_bytes -= block["size_bytes"]
        return too_much or 0 < max_age_seconds < age_seconds or block["offset"] < read_below

    if not (max_bytes or max_age_seconds or read_below):
        return []
    return list(takewhile(has_expired, connection.execute(oldest).mappings()))


def _read_below(connection: Connection, stream_id: int, names: Sequence[str]) -> int:
    """Offset below which every block has been read by all of these consumers; 0 where some have no cursor."""
    if not names:
        return 0
    # A cursor says that the blocks below its offset have been read.
    query = select(consumers.c.offset).where(
        consumers.c.stream_id == stream_id, consumers.c.name.in_(set(names))
    )
    offsets = list(connection.scalars(query))
    return min(offsets) if len(offsets) == len(set(names)) else 0
