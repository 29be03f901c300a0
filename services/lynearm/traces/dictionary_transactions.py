"""The catalog's transactions on the codec dictionaries of a stream; see `transactions`."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, insert, select, update

from lynearm.traces.admission import sealed
from lynearm.traces.dictionaries import MAX_DICTIONARIES, short_digest
from lynearm.traces.schema import dictionaries, streams
from lynearm.traces.transactions import get_stream, lock_stream
from lynearm.wire.errors import DictionaryConflictError, DictionaryLimitError, DictionaryNotFoundError


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


def _is_dictionary(stream_id: int, digest: bytes) -> ColumnElement[bool]:
    return (dictionaries.c.stream_id == stream_id) & (dictionaries.c.digest == digest)
