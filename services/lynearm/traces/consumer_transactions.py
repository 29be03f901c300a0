"""The SQL of consumers: stored cursors, what lies behind them, and lag bounds.

Rows that are read to be changed are locked, streams before consumers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, RowMapping, delete, func, insert, select, update

from lynearm.traces.consumer_records import (
    MAX_CONSUMERS,
    NO_BOUND,
    ConsumerRecord,
    Lag,
    LagState,
    MaxLag,
    consumer_not_found,
)
from lynearm.traces.schema import blocks, consumers, streams
from lynearm.traces.transactions import get_stream, lock_stream
from lynearm.wire.errors import CursorBackwardsError, OffsetNotFoundError, PreconditionError
from lynearm.wire.traces import Cursor


def set_max_lag(connection: Connection, stream_name: str, max_lag: MaxLag) -> None:
    """See `ConsumerCatalog.set_max_lag`."""
    stream_id = get_stream(connection, stream_name).stream_id
    values = {"max_lag_blocks": max_lag.blocks, "max_lag_traces": max_lag.traces}
    connection.execute(update(streams).where(streams.c.id == stream_id).values(values))


def read_lag(connection: Connection, stream_id: int) -> LagState:
    """See `ConsumerCatalog.read_lag`."""
    columns = (streams.c.max_lag_blocks, streams.c.max_lag_traces)
    is_open = (streams.c.id == stream_id) & ~streams.c.sealed
    stream = connection.execute(select(*columns).where(is_open)).one_or_none()
    if stream is None:
        return LagState(NO_BOUND, "", Lag())
    max_lag = MaxLag(stream.max_lag_blocks, stream.max_lag_traces)
    slowest = _slowest(connection, stream_id) if max_lag != NO_BOUND else None
    if slowest is None:
        return LagState(max_lag, "", Lag())
    cursor = Cursor(slowest["offset"], slowest["trace_index"])
    return LagState(max_lag, slowest["name"], _lag(connection, stream_id, cursor))


def commit_cursor(
    connection: Connection, stream_name: str, consumer: str, cursor: Cursor, *, allow_backwards: bool
) -> ConsumerRecord:
    """See `ConsumerCatalog.commit_cursor`."""
    stream_id = get_stream(connection, stream_name).stream_id
    stored = _find_to_change(connection, stream_id, consumer)
    if stored is None:
        # Of two that make the consumer, the second finds it; and the stream may be gone by now.
        stream_id = lock_stream(connection, stream_name).stream_id
        stored = _find_to_change(connection, stream_id, consumer)
    cursor = _checked(connection, stream_id, stream_name, cursor)
    values = {
        "offset": cursor.offset,
        "trace_index": cursor.trace_index,
        "updated_unix_nano": time.time_ns(),
    }
    if stored is None:
        _check_count(connection, stream_id, stream_name)
        row = {"stream_id": stream_id, "name": consumer} | values
        connection.execute(insert(consumers).values(row))
    else:
        found = Cursor(stored["offset"], stored["trace_index"])
        if not allow_backwards and (cursor.offset, cursor.trace_index) < (found.offset, found.trace_index):
            raise CursorBackwardsError(
                f"consumer {consumer!r} of stream {stream_name!r} is at {_shown(found)}, "
                f"and would move back to {_shown(cursor)}",
                "does another process read under this name? to read again on purpose, say allow_backwards",
            )
        connection.execute(update(consumers).where(_is_consumer(stream_id, consumer)).values(values))
    return get_consumer(connection, stream_name, consumer)


def get_consumer(connection: Connection, stream_name: str, consumer: str) -> ConsumerRecord:
    """See `ConsumerCatalog.get_consumer`."""
    stream_id = get_stream(connection, stream_name).stream_id
    found = _list(connection, stream_id, stream_name, consumers.c.name == consumer)
    if not found:
        raise consumer_not_found(stream_name, consumer)
    return found[0]


def list_consumers(connection: Connection, stream_name: str) -> list[ConsumerRecord]:
    """See `ConsumerCatalog.list_consumers`."""
    stream_id = get_stream(connection, stream_name).stream_id
    return _list(connection, stream_id, stream_name)


def delete_consumer(connection: Connection, stream_name: str, consumer: str) -> None:
    """See `ConsumerCatalog.delete_consumer`."""
    stream_id = get_stream(connection, stream_name).stream_id
    if not connection.execute(delete(consumers).where(_is_consumer(stream_id, consumer))).rowcount:
        raise consumer_not_found(stream_name, consumer)


def _is_consumer(stream_id: int, name: str) -> ColumnElement[bool]:
    return (consumers.c.stream_id == stream_id) & (consumers.c.name == name)


def _find_to_change(connection: Connection, stream_id: int, name: str) -> RowMapping | None:
    query = select(consumers).where(_is_consumer(stream_id, name)).with_for_update()
    return connection.execute(query).mappings().one_or_none()


def _list(
    connection: Connection, stream_id: int, stream_name: str, *conditions: ColumnElement[bool]
) -> list[ConsumerRecord]:
    query = select(consumers).where(consumers.c.stream_id == stream_id, *conditions)
    rows: Sequence[RowMapping] = connection.execute(query).mappings().all()
    found: list[ConsumerRecord] = []
    for row in rows:
        cursor = Cursor(row["offset"], row["trace_index"])
        lag = _lag(connection, stream_id, cursor)
        found.append(ConsumerRecord(stream_name, row["name"], cursor, lag, row["updated_unix_nano"]))
    # Not in the query: databases order text by the customs of some country.
    return sorted(found, key=lambda record: record.name)


def _slowest(connection: Connection, stream_id: int) -> RowMapping | None:
    order = (consumers.c.offset, consumers.c.trace_index, consumers.c.name)
    query = select(consumers).where(consumers.c.stream_id == stream_id).order_by(*order).limit(1)
    return connection.execute(query).mappings().one_or_none()


def _lag(connection: Connection, stream_id: int, cursor: Cursor) -> Lag:
    sums = [func.coalesce(func.sum(blocks.c[column]), 0) for column in ("trace_count", "size_bytes")]
    behind = (blocks.c.stream_id == stream_id) & (blocks.c.offset >= cursor.offset)
    # PostgreSQL gives sums as decimals.
    count, traces, size_bytes = map(int, connection.execute(select(func.count(), *sums).where(behind)).one())
    return Lag(count, max(0, traces - cursor.trace_index), size_bytes)


def _checked(connection: Connection, stream_id: int, stream_name: str, cursor: Cursor) -> Cursor:
    """The cursor; at the end of a block, the same position as the beginning of the next."""
    this = (blocks.c.stream_id == stream_id) & (blocks.c.offset == cursor.offset)
    count = connection.scalar(select(blocks.c.trace_count).where(this))
    if count is None:
        next_offset = connection.scalar(select(streams.c.next_offset).where(streams.c.id == stream_id))
        # A block that is not there below the end was collected: it counts as used.
        if cursor.offset < (next_offset or 0) or (cursor.offset == next_offset and not cursor.trace_index):
            return Cursor(cursor.offset, 0)
    elif cursor.trace_index < count:
        return cursor
    elif cursor.trace_index == count:
        return Cursor(cursor.offset + 1, 0)
    raise OffsetNotFoundError(
        f"stream {stream_name!r} is not as long as cursor {_shown(cursor)}",
        "was the stream created anew? then begin at offset 0",
    )


def _check_count(connection: Connection, stream_id: int, stream_name: str) -> None:
    of_stream = consumers.c.stream_id == stream_id
    count = connection.scalar(select(func.count()).select_from(consumers).where(of_stream)) or 0
    if count >= MAX_CONSUMERS:
        raise PreconditionError(
            f"stream {stream_name!r} has {count} consumers, at most {MAX_CONSUMERS} may be",
            "delete those that nobody reads under any more",
        )


def _shown(cursor: Cursor) -> str:
    return f"{cursor.offset}:{cursor.trace_index}"
