"""The catalog in a SQL database: each method is one of `transactions`, run by a `Database`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self, TypeVar

from sqlalchemy import Connection

from lynearm.traces import (
    attachments,
    commit_transaction,
    dictionary_transactions,
    expiry,
    migrations,
    transactions,
)
from lynearm.traces.catalog import (
    AttachmentRecord,
    BlockLocation,
    CommitOutcome,
    CommittedBlock,
    DeletedStream,
    ExpiredBlocks,
    FinishedPrompt,
    LabelledOffset,
    NewBlock,
    Producer,
    StreamChange,
    StreamRecord,
    WrittenGroup,
    blocks_of,
)
from lynearm.traces.consumer_records import NO_BOUND, MaxLag
from lynearm.traces.database import Database
from lynearm.traces.sql_queue import SqlQueue
from lynearm.wire.retention import Retention
from lynearm.wire.specs import StreamSpec

T = TypeVar("T")


class SqlCatalog(SqlQueue):
    """A `Catalog` in a SQL database. Make one with `open`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    async def open(cls, database: Database) -> Self:
        """Take a database, creating its tables when missing; an older version's are brought up to date.

        The catalog owns the database from here on, and has closed it when this raises.

        Raises:
            ConfigError: a later version of lynearm wrote it.
            StorageError: it is not a catalog or cannot be read.
            CatalogUnavailableError: it cannot be reached.
        """
        catalog = cls(database)
        try:
            await catalog._write(catalog._prepare_schema)
            await database.settle()
        except BaseException:
            await catalog.close()
            raise
        return catalog

    @property
    def is_shared(self) -> bool:
        """See `Catalog.is_shared`."""
        return self._database.is_shared

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

    async def count_streams(self, *, besides: str) -> int:
        """See `Catalog.count_streams`."""
        return await self._read(lambda connection: transactions.count_streams(connection, besides))

    async def seal_stream(self, name: str) -> StreamRecord:
        """See `Catalog.seal_stream`."""
        return await self._write(lambda connection: self._seal_stream(connection, name))

    async def delete_stream(self, name: str) -> DeletedStream:
        """See `Catalog.delete_stream`."""
        return await self._write(lambda connection: self._delete_stream(connection, name))

    async def open_producer(self, stream_name: str, producer_id: str, epoch: int) -> Producer:
        """See `Catalog.open_producer`."""
        return await self._write(
            lambda connection: transactions.open_producer(connection, stream_name, producer_id, epoch)
        )

    async def commit(self, groups: Sequence[WrittenGroup]) -> list[CommitOutcome]:
        """See `Catalog.commit`."""
        return await self._write(lambda connection: self._commit(connection, groups))

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
            lambda connection: dictionary_transactions.put_dictionary(
                connection, stream_name, digest, content
            )
        )

    async def get_dictionary(self, stream_name: str, digest: bytes) -> bytes:
        """See `Catalog.get_dictionary`."""
        return await self._read(
            lambda connection: dictionary_transactions.get_dictionary(connection, stream_name, digest)
        )

    async def put_attachment(self, stream_name: str, name: str, content: bytes) -> None:
        """See `Catalog.put_attachment`."""
        await self._write(
            lambda connection: attachments.put_attachment(connection, stream_name, name, content)
        )

    async def get_attachment(self, stream_name: str, name: str) -> bytes:
        """See `Catalog.get_attachment`."""
        return await self._read(lambda connection: attachments.get_attachment(connection, stream_name, name))

    async def list_attachments(self, stream_name: str) -> list[AttachmentRecord]:
        """See `Catalog.list_attachments`."""
        return await self._read(lambda connection: attachments.list_attachments(connection, stream_name))

    async def has_dictionary(self, stream_id: int, digest: bytes) -> bool:
        """See `Catalog.has_dictionary`."""
        return await self._read(
            lambda connection: dictionary_transactions.has_dictionary(connection, stream_id, digest)
        )

    async def find_unreferenced(self, object_keys: Sequence[str]) -> list[str]:
        """See `Catalog.find_unreferenced`."""
        return await self._read(lambda connection: expiry.find_unreferenced(connection, object_keys))

    async def set_retention(self, name: str, retention: Retention) -> StreamRecord:
        """See `Catalog.set_retention`."""
        return await self._write(lambda connection: transactions.set_retention(connection, name, retention))

    async def expire_blocks(self, stream_id: int, now_unix_nano: int, limit: int) -> ExpiredBlocks:
        """See `Catalog.expire_blocks`."""
        return await self._write(
            lambda connection: expiry.expire_blocks(connection, stream_id, now_unix_nano, limit)
        )

    async def condemn_objects(self, object_keys: Sequence[str]) -> list[str]:
        """See `Catalog.condemn_objects`."""
        return await self._write(lambda connection: expiry.condemn_objects(connection, object_keys))

    async def adopt_store(self, identity: str, *, is_empty: bool) -> str | None:
        """See `Catalog.adopt_store`."""
        return await self._write(lambda connection: transactions.adopt_store(connection, identity, is_empty))

    async def find_progress(self, stream_ids: Sequence[int]) -> dict[int, StreamChange]:
        """See `Catalog.find_progress`."""
        return await self._read(lambda connection: transactions.find_progress(connection, stream_ids))

    def listen(self) -> AsyncIterator[StreamChange | None]:
        """See `Catalog.listen`."""
        return self._database.listen()

    async def close(self) -> None:
        """See `Catalog.close`."""
        await self._database.close()

    async def _write(self, work: Callable[[Connection], T]) -> T:
        return await self._database.write(work)

    async def _read(self, work: Callable[[Connection], T]) -> T:
        return await self._database.read(work)

    def _prepare_schema(self, connection: Connection) -> None:
        self._database.lock_schema(connection)
        migrations.prepare_schema(connection, self._database.where)

    def _commit(self, connection: Connection, groups: Sequence[WrittenGroup]) -> list[CommitOutcome]:
        outcomes = commit_transaction.commit(connection, groups)
        self._database.announce(connection, _advances(blocks_of(groups), outcomes))
        return outcomes

    def _seal_stream(self, connection: Connection, name: str) -> StreamRecord:
        record = transactions.seal_stream(connection, name)
        change = StreamChange(record.stream_id, name, record.info.next_offset, "sealed")
        self._database.announce(connection, [change])
        return record

    def _delete_stream(self, connection: Connection, name: str) -> DeletedStream:
        deleted = transactions.delete_stream(connection, name)
        self._database.announce(connection, [StreamChange(deleted.stream_id, name, 0, "deleted")])
        return deleted


def _advances(blocks: Sequence[NewBlock], outcomes: Sequence[CommitOutcome]) -> list[StreamChange]:
    """One change for each stream that got further."""
    changes: dict[int, StreamChange] = {}
    for block, outcome in zip(blocks, outcomes, strict=True):
        if isinstance(outcome, CommittedBlock) and outcome.is_new:
            producer = block.producer
            change = StreamChange(producer.stream_id, producer.stream_name, outcome.offset + 1, "open")
            changes[producer.stream_id] = change
    return list(changes.values())
