"""The catalog in SQLite: one file beside the blocks.

One connection writes, on its own thread: transactions queue there instead of meeting SQLITE_BUSY, and the
SQLite of many systems has a bug that concurrent writers of a WAL can hit (the WAL-reset bug, fixed in 3.51.3).
Readers have connections of their own and do not wait for commits. WAL with synchronous=FULL syncs every
commit; a commit that fails is never repeated here.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, RowMapping, create_engine, delete, event, insert, inspect, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from lynearm.traces.admission import GroupState, ProducerProgress, PublishedBlock, StreamProgress, admit, fenced, sealed
from lynearm.traces.catalog import (
    BlockLocation,
    CommitOutcome,
    DeletedStream,
    FinishedPrompt,
    NewBlock,
    Producer,
    StreamRecord,
    stream_not_found,
)
from lynearm.traces.schema import (
    SCHEMA_VERSION,
    blocks,
    finished_prompts,
    metadata,
    objects,
    producers,
    schema_version,
    streams,
)
from lynearm.traces.store import Span, StoredObject
from lynearm.v1 import trace_pb2
from lynearm.wire.errors import (
    ConfigError,
    PreconditionError,
    StorageError,
    StorageFullError,
    StreamExistsError,
)
from lynearm.wire.protobuf import spec_from_proto, spec_to_proto
from lynearm.wire.specs import StreamSpec

READ_THREADS = 2
"""Index reads are short; more threads only queue for the interpreter lock."""

_MAX_VARIABLES = 500
"""Values per IN list: SQLite compiles a statement for each length, and old builds stop at 999."""

_PROGRESS = (
    "next_offset",
    "trace_count",
    "prompt_token_count",
    "completion_token_count",
    "size_bytes",
    "finished_prompt_count",
)

T = TypeVar("T")


class SqliteCatalog:
    """A `Catalog` in a SQLite file. Make one with `open`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._write_engine = _make_engine(path, begin="BEGIN IMMEDIATE", pool_size=1)
        self._read_engine = _make_engine(path, begin="BEGIN", pool_size=READ_THREADS, pragma="query_only=ON")
        self._writer = ThreadPoolExecutor(1, "catalog-writer")
        self._readers = ThreadPoolExecutor(READ_THREADS, "catalog-reader")

    @classmethod
    async def open(cls, path: Path) -> SqliteCatalog:
        """Open the file, creating it and its tables when missing.

        Raises:
            ConfigError: a newer lynearm wrote the file.
            StorageError: the file is not a catalog or cannot be read.
        """
        catalog = cls(path)
        try:
            await catalog._write(lambda connection: _prepare_schema(connection, path))
        except BaseException:
            await catalog.close()
            raise
        return catalog

    async def create_stream(self, spec: StreamSpec, *, allow_existing: bool) -> StreamRecord:
        """See `Catalog.create_stream`."""
        return await self._write(lambda connection: _create_stream(connection, spec, allow_existing))

    async def get_stream(self, name: str) -> StreamRecord:
        """See `Catalog.get_stream`."""
        return await self._read(lambda connection: _get_stream(connection, name))

    async def list_streams(self) -> list[StreamRecord]:
        """See `Catalog.list_streams`."""
        query = select(streams).order_by(streams.c.name)
        return await self._read(lambda connection: [_record(row) for row in connection.execute(query).mappings()])

    async def seal_stream(self, name: str) -> StreamRecord:
        """See `Catalog.seal_stream`."""

        def seal(connection: Connection) -> StreamRecord:
            connection.execute(update(streams).where(streams.c.name == name).values(sealed=True))
            return _get_stream(connection, name)

        return await self._write(seal)

    async def delete_stream(self, name: str) -> DeletedStream:
        """See `Catalog.delete_stream`."""
        return await self._write(lambda connection: _delete_stream(connection, name))

    async def open_producer(self, stream_name: str, producer_id: str, epoch: int) -> Producer:
        """See `Catalog.open_producer`."""
        return await self._write(lambda connection: _open_producer(connection, stream_name, producer_id, epoch))

    async def commit(self, stored: StoredObject, blocks: Sequence[NewBlock]) -> list[CommitOutcome]:
        """See `Catalog.commit`."""
        return await self._write(lambda connection: _commit(connection, stored, blocks))

    async def find_blocks(self, stream_id: int, offset: int, count: int) -> list[BlockLocation]:
        """See `Catalog.find_blocks`."""
        return await self._read(lambda connection: _find_blocks(connection, stream_id, offset, count))

    async def list_finished_prompts(self, stream_id: int, after: int, count: int) -> list[FinishedPrompt]:
        """See `Catalog.list_finished_prompts`."""
        query = (
            select(finished_prompts.c.position, finished_prompts.c.prompt_id)
            .where(finished_prompts.c.stream_id == stream_id, finished_prompts.c.position > after)
            .order_by(finished_prompts.c.position)
            .limit(count)
        )
        return await self._read(lambda connection: [FinishedPrompt(*row) for row in connection.execute(query)])

    async def find_unreferenced(self, object_keys: Sequence[str]) -> list[str]:
        """See `Catalog.find_unreferenced`."""

        def find(connection: Connection) -> list[str]:
            known: set[str] = set()
            for chunk in _chunks(object_keys):
                known.update(connection.scalars(select(objects.c.key).where(objects.c.key.in_(chunk))))
            return [key for key in object_keys if key not in known]

        return await self._read(find)

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


def _make_engine(path: Path, *, begin: str, pool_size: int, pragma: str = "") -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        pool_size=pool_size,
        max_overflow=0,
        connect_args={"check_same_thread": False, "timeout": 60},
    )

    def set_up(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
        # Python's own transaction control begins too late; `begin_transaction` does it instead.
        connection.isolation_level = None
        pragmas = ["journal_mode=WAL", "synchronous=FULL", "fullfsync=ON", "foreign_keys=ON"]
        for setting in [*pragmas, pragma] if pragma else pragmas:
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


def _prepare_schema(connection: Connection, path: Path) -> None:
    if not inspect(connection).has_table(schema_version.name):
        metadata.create_all(connection)
        connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
    found = connection.scalar(select(schema_version.c.version))
    if found != SCHEMA_VERSION:
        raise ConfigError(
            f"catalog {path} has schema version {found}, expected {SCHEMA_VERSION}",
            "use the lynearm that wrote it, or another data directory",
        )


def _record(row: RowMapping) -> StreamRecord:
    return StreamRecord(
        stream_id=row["id"],
        spec=spec_from_proto(trace_pb2.StreamSpec.FromString(row["spec"])),
        sealed=row["sealed"],
        created_unix_nano=row["created_unix_nano"],
        **{column: row[column] for column in _PROGRESS},
    )


def _get_stream(connection: Connection, name: str) -> StreamRecord:
    row = connection.execute(select(streams).where(streams.c.name == name)).mappings().one_or_none()
    if row is None:
        raise stream_not_found(name)
    return _record(row)


def _create_stream(connection: Connection, spec: StreamSpec, allow_existing: bool) -> StreamRecord:
    row = connection.execute(select(streams).where(streams.c.name == spec.name)).mappings().one_or_none()
    if row is not None:
        existing = _record(row)
        if allow_existing and existing.spec == spec:
            return existing
        difference = "with another spec" if existing.spec != spec else "already"
        raise StreamExistsError(f"stream {spec.name!r} exists {difference}", "choose another name, or delete it")
    connection.execute(
        insert(streams).values(
            name=spec.name,
            spec=spec_to_proto(spec).SerializeToString(deterministic=True),
            sealed=False,
            created_unix_nano=time.time_ns(),
            **dict.fromkeys(_PROGRESS, 0),
        )
    )
    return _get_stream(connection, spec.name)


def _delete_stream(connection: Connection, name: str) -> DeletedStream:
    stream_id = _get_stream(connection, name).stream_id
    of_stream = select(blocks.c.object_id).where(blocks.c.stream_id == stream_id).distinct()
    touched = list(connection.scalars(of_stream))
    for table in (finished_prompts, blocks, producers):
        connection.execute(delete(table).where(table.c.stream_id == stream_id))
    connection.execute(delete(streams).where(streams.c.id == stream_id))
    keys: list[str] = []
    for chunk in _chunks(touched):
        in_use = select(blocks.c.object_id).where(blocks.c.object_id == objects.c.id).exists()
        unused = objects.c.id.in_(chunk) & ~in_use
        keys += connection.scalars(select(objects.c.key).where(unused))
        connection.execute(delete(objects).where(unused))
    return DeletedStream(stream_id, tuple(keys))


def _open_producer(connection: Connection, stream_name: str, producer_id: str, epoch: int) -> Producer:
    stream = _get_stream(connection, stream_name)
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
        if stream.sealed:
            raise sealed(stream_name)
        key, epoch = _take_next_epoch(connection, stream.stream_id, producer_id, row)
        last_sequence = 0
    return Producer(key, stream.stream_id, stream_name, producer_id, epoch, last_sequence + 1)


def _take_next_epoch(
    connection: Connection, stream_id: int, producer_id: str, row: RowMapping | None
) -> tuple[int, int]:
    if row is not None:
        epoch = row["epoch"] + 1
        connection.execute(update(producers).where(producers.c.id == row["id"]).values(epoch=epoch, last_sequence=0))
        return row["id"], epoch
    values = {"stream_id": stream_id, "producer_id": producer_id, "epoch": 1, "last_sequence": 0}
    return _inserted_key(connection, insert(producers).values(values).returning(producers.c.id)), 1


def _commit(connection: Connection, stored: StoredObject, group: Sequence[NewBlock]) -> list[CommitOutcome]:
    state = _load_state(connection, group)
    outcomes = admit(group, state)
    if state.admitted:
        _store_state(connection, group, state)
        _insert_blocks(connection, stored, group, state.admitted)
    return outcomes


def _load_state(connection: Connection, group: Sequence[NewBlock]) -> GroupState:
    stream_ids = {block.producer.stream_id for block in group}
    keys = {block.producer.key for block in group}
    columns = (streams.c.id, streams.c.sealed, *(streams.c[name] for name in _PROGRESS))
    state = GroupState(
        streams={
            key: StreamProgress(*rest)
            for chunk in _chunks(stream_ids)
            for key, *rest in connection.execute(select(*columns).where(streams.c.id.in_(chunk)))
        },
        producers={
            key: ProducerProgress(epoch, last)
            for chunk in _chunks(keys)
            for key, epoch, last in connection.execute(
                select(producers.c.id, producers.c.epoch, producers.c.last_sequence).where(producers.c.id.in_(chunk))
            )
        },
        published={},
        finished=set(),
    )
    _load_published(connection, group, state)
    _load_finished(connection, group, state)
    return state


def _load_published(connection: Connection, group: Sequence[NewBlock], state: GroupState) -> None:
    for block in group:
        producer = state.producers.get(block.producer.key)
        if producer is None or block.producer.epoch != producer.epoch or block.sequence > producer.last_sequence:
            continue
        row = connection.execute(
            select(blocks.c.offset, blocks.c.size_bytes, blocks.c.checksum).where(
                blocks.c.producer_key == block.producer.key,
                blocks.c.epoch == producer.epoch,
                blocks.c.sequence == block.sequence,
            )
        ).one_or_none()
        if row is not None:
            known = PublishedBlock(row.offset, row.size_bytes, int.from_bytes(row.checksum))
            state.published[block.producer.key, block.sequence] = known


def _load_finished(connection: Connection, group: Sequence[NewBlock], state: GroupState) -> None:
    prompts_by_stream: dict[int, set[str]] = {}
    for block in group:
        prompts_by_stream.setdefault(block.producer.stream_id, set()).update(block.finished_prompt_ids)
    for stream_id, prompt_ids in prompts_by_stream.items():
        for chunk in _chunks(prompt_ids):
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
        connection.execute(update(streams).where(streams.c.id == stream_id).values(values))
    for key in {block.producer.key for block in admitted}:
        last = state.producers[key].last_sequence
        connection.execute(update(producers).where(producers.c.id == key).values(last_sequence=last))


def _insert_blocks(
    connection: Connection, stored: StoredObject, group: Sequence[NewBlock], admitted: Sequence[tuple[int, int]]
) -> None:
    object_id = _inserted_key(connection, insert(objects).values(key=stored.key).returning(objects.c.id))
    rows: list[dict[str, Any]] = []
    finished: list[dict[str, Any]] = []
    for index, offset in admitted:
        block, span = group[index], stored.spans[index]
        stream_id = block.producer.stream_id
        rows.append(
            {
                "stream_id": stream_id,
                "offset": offset,
                "object_id": object_id,
                "position": span.position,
                "size_bytes": block.facts.size_bytes,
                "checksum": block.facts.checksum.to_bytes(8),
                "trace_count": block.facts.trace_count,
                "prompt_token_count": block.facts.prompt_token_count,
                "completion_token_count": block.facts.completion_token_count,
                "producer_key": block.producer.key,
                "epoch": block.producer.epoch,
                "sequence": block.sequence,
            }
        )
        finished += (
            {"stream_id": stream_id, "prompt_id": prompt_id, "offset": offset}
            for prompt_id in block.finished_prompt_ids
        )
    connection.execute(insert(blocks), rows)
    if finished:
        connection.execute(insert(finished_prompts), finished)


def _find_blocks(connection: Connection, stream_id: int, offset: int, count: int) -> list[BlockLocation]:
    query = (
        select(blocks.c.offset, objects.c.key, blocks.c.position, blocks.c.size_bytes, blocks.c.checksum)
        .join(objects, objects.c.id == blocks.c.object_id)
        .where(blocks.c.stream_id == stream_id, blocks.c.offset >= offset)
        .order_by(blocks.c.offset)
        .limit(count)
    )
    return [
        BlockLocation(row.offset, row.key, Span(row.position, row.size_bytes), int.from_bytes(row.checksum))
        for row in connection.execute(query)
    ]


def _inserted_key(connection: Connection, statement: Any) -> int:
    # Any: SQLAlchemy's type of INSERT … RETURNING names private generics.
    return int(connection.execute(statement).scalar_one())


def _chunks(values: Iterable[T]) -> Iterator[list[T]]:
    remaining = list(values)
    for start in range(0, len(remaining), _MAX_VARIABLES):
        yield remaining[start : start + _MAX_VARIABLES]
