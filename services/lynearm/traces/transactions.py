"""The catalog's transactions in SQL: what each does with a connection inside its transaction.

Nothing here knows a database by name, a thread or an event loop; the caller begins and commits.

Where transactions run side by side, at READ COMMITTED, row locks keep them apart; SQLite, whose writers
queue, leaves the locks out. Whatever changes a stream first locks its row, then rows of producers, then
rows of objects, and several of a kind ascending by id: so nobody waits in a circle, and what is read after
the stream's lock stays true until the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import (
    Column,
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

from lynearm.traces import failpoints
from lynearm.traces.admission import (
    GroupState,
    ProducerProgress,
    PublishedBlock,
    StreamProgress,
    admit,
    fenced,
    sealed,
)
from lynearm.traces.catalog import (
    BlockLocation,
    CommitOutcome,
    DeletedStream,
    FinishedPrompt,
    LabelledOffset,
    NewBlock,
    Producer,
    StreamChange,
    StreamRecord,
    WrittenGroup,
    blocks_of,
    stream_not_found,
)
from lynearm.traces.consumer_records import NO_BOUND, MaxLag
from lynearm.traces.dictionaries import MAX_DICTIONARIES, short_digest
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
from lynearm.traces.work_transactions import delete_jobs, load_work, store_work
from lynearm.v1 import trace_pb2
from lynearm.wire.errors import (
    DictionaryConflictError,
    DictionaryLimitError,
    DictionaryNotFoundError,
    PreconditionError,
    ServiceUnavailableError,
    StreamExistsError,
)
from lynearm.wire.protobuf import StreamInfo, spec_from_proto, spec_to_proto
from lynearm.wire.retention import Retention
from lynearm.wire.specs import StreamSpec

_PROGRESS = (
    "next_offset",
    "trace_count",
    "prompt_token_count",
    "completion_token_count",
    "size_bytes",
    "finished_prompt_count",
    "retained_bytes",
)

_DICTIONARIES = ("dictionary_count", "dictionary_bytes")
_MAX_LAG = ("max_lag_blocks", "max_lag_traces")

# What every commit and every read of blocks runs, made once: SQLAlchemy takes as long to put a statement
# together as to run it.
_UPDATE_STREAM = update(streams).where(streams.c.id == bindparam("row_id"))
_UPDATE_PRODUCER = update(producers).where(producers.c.id == bindparam("row_id"))
_FIND_OBJECT = select(objects.c.id).where(objects.c.key == bindparam("object_key"))
_INSERT_OBJECT = insert(objects).returning(objects.c.id)
_INSERT_BLOCKS = insert(blocks)
_FIND_BLOCKS = (
    select(blocks.c.offset, objects.c.key, blocks.c.position, blocks.c.size_bytes, blocks.c.checksum)
    .join(objects, objects.c.id == blocks.c.object_id)
    .where(blocks.c.stream_id == bindparam("of_stream"), blocks.c.offset >= bindparam("from_offset"))
    .order_by(blocks.c.offset)
    .limit(bindparam("count"))
)


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A block that enters the catalog."""

    block: NewBlock
    offset: int
    object_key: str
    span: Span
    """Where it lies in the object."""


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
            **dict.fromkeys(_PROGRESS, 0),
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


def commit(connection: Connection, groups: Sequence[WrittenGroup]) -> list[CommitOutcome]:
    """See `Catalog.commit`."""
    every_block = blocks_of(groups)
    state = _load_state(connection, every_block)
    outcomes = admit(every_block, state)
    if state.admitted:
        places = [(group.stored.key, span) for group in groups for span in group.stored.spans]
        admitted = [_Admitted(every_block[index], offset, *places[index]) for index, offset in state.admitted]
        # Ascending, as those who condemn objects go.
        keys = sorted({block.object_key for block in admitted})
        for key in keys:
            _check_object(connection, key)
        _store_state(connection, every_block, state)
        _insert_blocks(connection, admitted, {key: _insert_object(connection, key) for key in keys})
        failpoints.reach("catalog.before_commit")
    return outcomes


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


def put_dictionary(connection: Connection, stream_name: str, digest: bytes, content: bytes) -> None:
    """See `Catalog.put_dictionary`."""
    stream = lock_stream(connection, stream_name)
    held = connection.scalar(select(dictionaries.c.content).where(_is_dictionary(stream.stream_id, digest)))
    if held is not None:
        if bytes(held) != content:
            raise DictionaryConflictError(
                f"stream {stream_name!r} holds another dictionary {short_digest(digest)}",
                "train it on other traces: one in 4 billion has the digest of another",
            )
        return
    if stream.info.sealed:
        raise sealed(stream_name)
    if stream.info.dictionary_count >= MAX_DICTIONARIES:
        raise DictionaryLimitError(
            f"stream {stream_name!r} holds {stream.info.dictionary_count} dictionaries, "
            f"expected at most {MAX_DICTIONARIES}",
            "encode with one that it holds, or publish to another stream",
        )
    connection.execute(
        insert(dictionaries).values(stream_id=stream.stream_id, digest=digest, content=content)
    )
    grown = {
        "dictionary_count": stream.info.dictionary_count + 1,
        "dictionary_bytes": stream.info.dictionary_bytes + len(content),
    }
    connection.execute(update(streams).where(streams.c.id == stream.stream_id).values(grown))


def get_dictionary(connection: Connection, stream_name: str, digest: bytes) -> bytes:
    """See `Catalog.get_dictionary`."""
    stream_id = get_stream(connection, stream_name).stream_id
    content = connection.scalar(select(dictionaries.c.content).where(_is_dictionary(stream_id, digest)))
    if content is None:
        raise DictionaryNotFoundError(
            f"stream {stream_name!r} holds no dictionary {short_digest(digest)}",
            "put it there, or take the digest from the header of one of the stream's blocks",
        )
    return bytes(content)


def has_dictionary(connection: Connection, stream_id: int, digest: bytes) -> bool:
    """See `Catalog.has_dictionary`."""
    found = select(dictionaries.c.stream_id).where(_is_dictionary(stream_id, digest))
    return connection.scalar(found) is not None


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
        **{column: row[column] for column in (*_PROGRESS, *_DICTIONARIES, *_MAX_LAG)},
    )
    return StreamRecord(row["id"], info)


def _is_dictionary(stream_id: int, digest: bytes) -> ColumnElement[bool]:
    return (dictionaries.c.stream_id == stream_id) & (dictionaries.c.digest == digest)


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


def _load_state(connection: Connection, group: Sequence[NewBlock]) -> GroupState:
    state = GroupState(
        streams=_load_streams(connection, {block.producer.stream_id for block in group}),
        producers=_load_producers(connection, {block.producer.key for block in group}),
        published={},
        finished=set(),
        work=load_work(connection, group),
    )
    _load_published(connection, group, state)
    _load_finished(connection, group, state)
    return state


def _load_streams(connection: Connection, stream_ids: Iterable[int]) -> dict[int, StreamProgress]:
    columns = (streams.c.id, streams.c.sealed, *(streams.c[name] for name in _PROGRESS))
    return {key: StreamProgress(*rest) for key, *rest in _lock_rows(connection, columns, stream_ids)}


def _load_producers(connection: Connection, keys: Iterable[int]) -> dict[int, ProducerProgress]:
    columns = (producers.c.id, producers.c.epoch, producers.c.last_sequence)
    return {
        key: ProducerProgress(epoch, last_sequence)
        for key, epoch, last_sequence in _lock_rows(connection, columns, keys)
    }


def _lock_rows(
    connection: Connection, columns: Sequence[Column[Any]], ids: Iterable[int]
) -> Iterator[tuple[Any, ...]]:
    """The rows of these ids, the first column, locked ascending."""
    query = _lock_query(tuple(columns))
    for chunk in chunks(sorted(ids)):
        yield from (tuple(row) for row in connection.execute(query, {"ids": chunk}))


@cache
def _lock_query(columns: tuple[Column[Any], ...]) -> Select[Any]:
    key = columns[0]
    of_ids = key.in_(bindparam("ids", expanding=True))
    return select(*columns).where(of_ids).order_by(key).with_for_update(key_share=True)


def _load_published(connection: Connection, group: Sequence[NewBlock], state: GroupState) -> None:
    for block in group:
        producer = state.producers.get(block.producer.key)
        if producer is None or block.producer.epoch != producer.epoch:
            continue
        if block.sequence > producer.last_sequence:
            continue
        for table in (blocks, expired_blocks):
            row = connection.execute(
                select(table.c.offset, table.c.size_bytes, table.c.checksum).where(
                    table.c.producer_key == block.producer.key,
                    table.c.epoch == producer.epoch,
                    table.c.sequence == block.sequence,
                )
            ).one_or_none()
            if row is not None:
                known = PublishedBlock(row.offset, row.size_bytes, int.from_bytes(row.checksum))
                state.published[block.producer.key, block.sequence] = known
                break


def _load_finished(connection: Connection, group: Sequence[NewBlock], state: GroupState) -> None:
    prompts_by_stream: dict[int, set[str]] = {}
    for block in group:
        of_stream = prompts_by_stream.setdefault(block.producer.stream_id, set())
        of_stream.update(block.finished_prompt_ids)
        of_stream.update(prompt.prompt_id for work in block.finished_work for prompt in work.prompts)
    for stream_id, prompt_ids in prompts_by_stream.items():
        for chunk in chunks(prompt_ids):
            found = connection.scalars(
                select(finished_prompts.c.prompt_id).where(
                    finished_prompts.c.stream_id == stream_id, finished_prompts.c.prompt_id.in_(chunk)
                )
            )
            state.finished.update((stream_id, prompt_id) for prompt_id in found)


def _store_state(connection: Connection, group: Sequence[NewBlock], state: GroupState) -> None:
    admitted = [group[index] for index, _ in state.admitted]
    for stream_id in {block.producer.stream_id for block in admitted}:
        progress = state.streams[stream_id]
        values = {column: getattr(progress, column) for column in _PROGRESS}
        connection.execute(_UPDATE_STREAM, {**values, "row_id": stream_id})
    for key in {block.producer.key for block in admitted}:
        last = state.producers[key].last_sequence
        connection.execute(_UPDATE_PRODUCER, {"last_sequence": last, "row_id": key})
    store_work(connection, state.work)


def _check_object(connection: Connection, key: str) -> None:
    if connection.scalar(_FIND_OBJECT, {"object_key": key}) is not None:
        raise ServiceUnavailableError(
            f"object {key} was collected as garbage before its blocks were committed",
            "publish again; and see why this server was so slow",
        )


def _insert_object(connection: Connection, key: str) -> int:
    values = {"key": key, "created_unix_nano": time.time_ns()}
    return int(connection.execute(_INSERT_OBJECT, values).scalar_one())


def _insert_blocks(
    connection: Connection, admitted: Sequence[_Admitted], object_ids: Mapping[str, int]
) -> None:
    connection.execute(_INSERT_BLOCKS, [_block_row(one, object_ids[one.object_key]) for one in admitted])
    finished: list[dict[str, Any]] = [
        {"stream_id": one.block.producer.stream_id, "prompt_id": prompt_id, "offset": one.offset}
        for one in admitted
        for prompt_id in one.block.finished_prompt_ids
    ]
    if finished:
        connection.execute(insert(finished_prompts), finished)


def _block_row(admitted: _Admitted, object_id: int) -> dict[str, Any]:
    block = admitted.block
    return {
        "stream_id": block.producer.stream_id,
        "offset": admitted.offset,
        "object_id": object_id,
        "position": admitted.span.position,
        "size_bytes": block.facts.size_bytes,
        "checksum": block.facts.checksum.to_bytes(8),
        "trace_count": block.facts.trace_count,
        "prompt_token_count": block.facts.prompt_token_count,
        "completion_token_count": block.facts.completion_token_count,
        "producer_key": block.producer.key,
        "epoch": block.producer.epoch,
        "sequence": block.sequence,
        "labels": block.labels or None,
    }
