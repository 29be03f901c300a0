"""The transaction that lets the blocks of some groups enter the catalog: the one commit point.

As the catalog's other transactions do, it leaves begin and commit to its caller, and locks streams, producers
and objects in the order that `transactions` names.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Column, Connection, Select, bindparam, insert, select, update

from lynearm.traces import failpoints
from lynearm.traces.admission import GroupState, ProducerProgress, PublishedBlock, StreamProgress, admit
from lynearm.traces.catalog import CommitOutcome, NewBlock, WrittenGroup, blocks_of
from lynearm.traces.schema import blocks, expired_blocks, finished_prompts, objects, producers, streams
from lynearm.traces.statements import chunks
from lynearm.traces.store import Span
from lynearm.traces.transactions import PROGRESS
from lynearm.traces.work_transactions import load_work, store_work
from lynearm.wire.errors import ServiceUnavailableError

# Made once: SQLAlchemy takes as long to put a statement together as to run it.
_UPDATE_STREAM = update(streams).where(streams.c.id == bindparam("row_id"))
_UPDATE_PRODUCER = update(producers).where(producers.c.id == bindparam("row_id"))
_FIND_OBJECT = select(objects.c.id).where(objects.c.key == bindparam("object_key"))
_INSERT_OBJECT = insert(objects).returning(objects.c.id)
_INSERT_BLOCKS = insert(blocks)


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A block that enters the catalog."""

    block: NewBlock
    offset: int
    object_key: str
    span: Span
    """Where it lies in the object."""


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
    columns = (streams.c.id, streams.c.sealed, *(streams.c[name] for name in PROGRESS))
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
        values = {column: getattr(progress, column) for column in PROGRESS}
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
