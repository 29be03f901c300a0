"""The catalog's transactions in SQL: what each does with a connection inside its transaction.

Nothing here knows a database by name, a thread or an event loop; the caller begins and commits.

Where transactions run side by side, at READ COMMITTED, row locks keep them apart; SQLite, whose writers
queue, leaves the locks out. Whatever changes a stream first locks its row, then rows of producers, then
rows of objects, and several of a kind ascending by id: so nobody waits in a circle, and what is read after
the stream's lock stays true until the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    bindparam,
    delete,
    false,
    func,
    insert,
    select,
    update,
)

from lynearm.traces.admission import fenced, sealed
from lynearm.traces.catalog import (
    BlockLocation,
    DeletedStream,
    FinishedPrompt,
    LabelledOffset,
    Producer,
    StreamChange,
    StreamRecord,
    stream_not_found,
)
from lynearm.traces.consumer_records import NO_BOUND, MaxLag
from lynearm.traces.expiry import release_objects
from lynearm.traces.schema import (
    attachments,
    block_store,
    blocks,
    consumers,
    dictionaries,
    expired_blocks,
    finished_prompts,
    objects,
    producers,
    streams,
)
from lynearm.traces.statements import chunks, inserted_key
from lynearm.traces.store import Span
from lynearm.traces.work_transactions import delete_jobs
from lynearm.v1 import trace_pb2
from lynearm.wire.errors import PreconditionError, StreamExistsError
from lynearm.wire.protobuf import StreamInfo, spec_from_proto, spec_to_proto
from lynearm.wire.retention import Retention
from lynearm.wire.specs import StreamSpec

PROGRESS = (
    "next_offset",
    "trace_count",
    "prompt_token_count",
    "completion_token_count",
    "size_bytes",
    "finished_prompt_count",
    "retained_bytes",
)
"""What a commit moves on: columns and fields of `StreamInfo`, and all of `StreamProgress` but its first."""

_DICTIONARIES = ("dictionary_count", "dictionary_bytes")
_MAX_LAG = ("max_lag_blocks", "max_lag_traces")

# Made once, for every read of blocks: SQLAlchemy takes as long to put a statement together as to run it.
_FIND_BLOCKS = (
    select(blocks.c.offset, objects.c.key, blocks.c.position, blocks.c.size_bytes, blocks.c.checksum)
    .join(objects, objects.c.id == blocks.c.object_id)
    .where(blocks.c.stream_id == bindparam("of_stream"), blocks.c.offset >= bindparam("from_offset"))
    .order_by(blocks.c.offset)
    .limit(bindparam("count"))
)


def get_stream(connection: Connection, name: str) -> StreamRecord:
    """See `Catalog.get_stream`."""
    return _record(_stream_row(connection, select(streams).where(_is_named(name)), name))


def list_streams(connection: Connection) -> list[StreamRecord]:
    """See `Catalog.list_streams`."""
    records = [_record(row) for row in connection.execute(select(streams)).mappings()]
    # Not in the query: databases order text by the customs of some country.
    return sorted(records, key=lambda record: record.name)


def find_progress(connection: Connection, stream_ids: Sequence[int]) -> dict[int, StreamChange]:
    """See `Catalog.find_progress`."""
    columns = (streams.c.id, streams.c.name, streams.c.next_offset, streams.c.sealed)
    return {
        row.id: StreamChange(row.id, row.name, row.next_offset, "sealed" if row.sealed else "open")
        for chunk in chunks(stream_ids)
        for row in connection.execute(select(*columns).where(streams.c.id.in_(chunk)))
    }


def count_streams(connection: Connection, besides: str) -> int:
    """See `Catalog.count_streams`."""
    return connection.scalar(select(func.count()).select_from(streams).where(streams.c.name != besides)) or 0


def seal_stream(connection: Connection, name: str) -> StreamRecord:
    """See `Catalog.seal_stream`."""
    connection.execute(update(streams).where(_is_named(name)).values(sealed=True))
    return get_stream(connection, name)


def set_retention(connection: Connection, name: str, retention: Retention) -> StreamRecord:
    """See `Catalog.set_retention`."""
    values = {
        "max_age_seconds": retention.max_age_seconds,
        "max_bytes": retention.max_bytes,
        "read_by": " ".join(retention.consumers),
    }
    connection.execute(update(streams).where(_is_named(name)).values(values))
    return get_stream(connection, name)


def create_stream(
    connection: Connection, spec: StreamSpec, allow_existing: bool, max_lag: MaxLag = NO_BOUND
) -> StreamRecord:
    """See `Catalog.create_stream`."""
    row = connection.execute(select(streams).where(streams.c.name == spec.name)).mappings().one_or_none()
    if row is not None:
        existing = _record(row)
        same = existing.info.spec == spec
        if allow_existing and same:
            return existing
        raise StreamExistsError(
            f"stream {spec.name!r} exists {'already' if same else 'with another spec'}",
            "choose another name, or delete it",
        )
    connection.execute(
        insert(streams).values(
            name=spec.name,
            spec=spec_to_proto(spec).SerializeToString(deterministic=True),
            sealed=False,
            created_unix_nano=time.time_ns(),
            max_lag_blocks=max_lag.blocks,
            max_lag_traces=max_lag.traces,
            **dict.fromkeys(PROGRESS, 0),
        )
    )
    return get_stream(connection, spec.name)


def delete_stream(connection: Connection, name: str) -> DeletedStream:
    """See `Catalog.delete_stream`."""
    stream_id = lock_stream(connection, name).stream_id
    of_stream = select(blocks.c.object_id).where(blocks.c.stream_id == stream_id).distinct()
    touched = list(connection.scalars(of_stream))
    delete_jobs(connection, stream_id)
    for table in (finished_prompts, blocks, expired_blocks, producers, dictionaries, attachments, consumers):
        connection.execute(delete(table).where(table.c.stream_id == stream_id))
    connection.execute(delete(streams).where(streams.c.id == stream_id))
    return DeletedStream(stream_id, tuple(release_objects(connection, touched)))


def open_producer(connection: Connection, stream_name: str, producer_id: str, epoch: int) -> Producer:
    """See `Catalog.open_producer`."""
    stream = lock_stream(connection, stream_name)
    identity = (producers.c.stream_id == stream.stream_id) & (producers.c.producer_id == producer_id)
    row = connection.execute(select(producers).where(identity)).mappings().one_or_none()
    if epoch:
        newest = row["epoch"] if row is not None else 0
        if epoch < newest:
            raise fenced(producer_id, epoch, newest)
        if row is None or epoch > newest:
            raise PreconditionError(
                f"producer {producer_id!r} of stream {stream_name!r} never had epoch {epoch}",
                "the stream was created anew: open with epoch 0",
            )
        key, last_sequence = row["id"], row["last_sequence"]
    else:
        if stream.info.sealed:
            raise sealed(stream_name)
        key, epoch = _take_next_epoch(connection, stream.stream_id, producer_id, row)
        last_sequence = 0
    return Producer(
        key=key,
        stream_id=stream.stream_id,
        stream_name=stream_name,
        producer_id=producer_id,
        epoch=epoch,
        next_sequence=last_sequence + 1,
        codec_mode=stream.info.spec.codec.mode,
    )


def find_blocks(connection: Connection, stream_id: int, offset: int, count: int) -> list[BlockLocation]:
    """See `Catalog.find_blocks`."""
    of_range = {"of_stream": stream_id, "from_offset": offset, "count": count}
    return [
        BlockLocation(row.offset, row.key, Span(row.position, row.size_bytes), int.from_bytes(row.checksum))
        for row in connection.execute(_FIND_BLOCKS, of_range)
    ]


def find_labels(connection: Connection, stream_id: int, offset: int, count: int) -> list[LabelledOffset]:
    """See `Catalog.find_labels`."""
    query = (
        select(blocks.c.offset, blocks.c.labels)
        .where(blocks.c.stream_id == stream_id, blocks.c.offset >= offset)
        .order_by(blocks.c.offset)
        .limit(count)
    )
    return [LabelledOffset(offset, bytes(labels or b"")) for offset, labels in connection.execute(query)]


def list_finished_prompts(
    connection: Connection, stream_id: int, after: int, count: int
) -> list[FinishedPrompt]:
    """See `Catalog.list_finished_prompts`."""
    query = (
        select(finished_prompts.c.position, finished_prompts.c.prompt_id)
        .where(finished_prompts.c.stream_id == stream_id, finished_prompts.c.position > after)
        .order_by(finished_prompts.c.position)
        .limit(count)
    )
    return [FinishedPrompt(row.position, row.prompt_id) for row in connection.execute(query)]


def adopt_store(connection: Connection, identity: str, is_empty: bool) -> str | None:
    """See `Catalog.adopt_store`."""
    found = connection.scalar(select(block_store.c.identity))
    if found is not None:
        return str(found)
    # A catalog of before stores had identities has streams.
    if not is_empty and connection.scalar(select(streams.c.id).limit(1)) is None:
        return None
    connection.execute(insert(block_store).values(id=1, identity=identity))
    return identity


def _is_named(name: str) -> ColumnElement[bool]:
    # No stream has such a name, and PostgreSQL takes no text with NUL, not even to compare with.
    return streams.c.name == name if "\0" not in name else false()


def _stream_row(connection: Connection, query: Select[Any], name: str) -> RowMapping:
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise stream_not_found(name)
    return row


def lock_stream(connection: Connection, name: str) -> StreamRecord:
    """A stream, whose row stays locked until the transaction ends."""
    query = select(streams).where(_is_named(name)).with_for_update()
    return _record(_stream_row(connection, query, name))


def _record(row: RowMapping) -> StreamRecord:
    info = StreamInfo(
        spec=spec_from_proto(trace_pb2.StreamSpec.FromString(row["spec"])),
        sealed=row["sealed"],
        created_unix_nano=row["created_unix_nano"],
        first_offset=row["first_offset"],
        retention=Retention(row["max_age_seconds"], row["max_bytes"], tuple(row["read_by"].split())),
        **{column: row[column] for column in (*PROGRESS, *_DICTIONARIES, *_MAX_LAG)},
    )
    return StreamRecord(row["id"], info)


def _take_next_epoch(
    connection: Connection, stream_id: int, producer_id: str, row: RowMapping | None
) -> tuple[int, int]:
    if row is not None:
        epoch = row["epoch"] + 1
        connection.execute(
            update(producers).where(producers.c.id == row["id"]).values(epoch=epoch, last_sequence=0)
        )
        return row["id"], epoch
    values = {"stream_id": stream_id, "producer_id": producer_id, "epoch": 1, "last_sequence": 0}
    return inserted_key(connection, insert(producers).values(values).returning(producers.c.id)), 1
