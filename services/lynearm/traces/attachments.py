"""Attachments: small things about a stream that are no traces, such as what was measured inside its teacher.

They are opaque here. Each has a name, under which whoever writes it replaces it; the last one written stays.
"""

from __future__ import annotations

import time

from sqlalchemy import Connection, delete, func, insert, select

from lynearm.traces.admission import sealed
from lynearm.traces.catalog import AttachmentRecord
from lynearm.traces.schema import attachments
from lynearm.traces.transactions import get_stream, lock_stream
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.blocks import MAX_ATTACHMENT_BYTES
from lynearm.wire.errors import AttachmentNotFoundError, InvalidInputError, LimitError
from lynearm.wire.specs import check_name

MAX_ATTACHMENTS = 256
"""Of one stream."""


def check_attachment(name: str, content: bytes) -> None:
    """Let pass what may be kept.

    Raises:
        InvalidInputError: the name is not allowed, or the content is empty or too large.
    """
    check_name(name, what="attachment")
    if not 1 <= len(content) <= MAX_ATTACHMENT_BYTES:
        raise InvalidInputError(
            f"attachment {name!r} of {len(content)} bytes, expected 1 to {MAX_ATTACHMENT_BYTES}",
            "split it" if content else "",
        )


def put_attachment(connection: Connection, stream_name: str, name: str, content: bytes) -> None:
    """See `Catalog.put_attachment`."""
    stream = lock_stream(connection, stream_name)
    if stream.info.sealed:
        raise sealed(stream_name)
    is_it = (attachments.c.stream_id == stream.stream_id) & (attachments.c.name == name)
    replaced = connection.execute(delete(attachments).where(is_it)).rowcount
    count = connection.scalar(
        select(func.count()).select_from(attachments).where(attachments.c.stream_id == stream.stream_id)
    )
    if not replaced and (count or 0) >= MAX_ATTACHMENTS:
        raise LimitError(
            f"stream {stream_name!r} holds {count} attachments, expected at most {MAX_ATTACHMENTS}",
            "put it under a name that it holds",
        )
    connection.execute(
        insert(attachments).values(
            stream_id=stream.stream_id,
            name=name,
            size_bytes=len(content),
            updated_unix_nano=time.time_ns(),
            content=content,
        )
    )


def get_attachment(connection: Connection, stream_name: str, name: str) -> bytes:
    """See `Catalog.get_attachment`."""
    stream_id = get_stream(connection, stream_name).stream_id
    is_it = (attachments.c.stream_id == stream_id) & (attachments.c.name == name)
    content = connection.scalar(select(attachments.c.content).where(is_it))
    if content is None:
        raise AttachmentNotFoundError(f"stream {stream_name!r} has no attachment {name!r}")
    return bytes(content)


def list_attachments(connection: Connection, stream_name: str) -> list[AttachmentRecord]:
    """See `Catalog.list_attachments`."""
    stream_id = get_stream(connection, stream_name).stream_id
    query = (
        select(attachments.c.name, attachments.c.size_bytes, attachments.c.updated_unix_nano)
        .where(attachments.c.stream_id == stream_id)
        .order_by(attachments.c.name)
    )
    return [AttachmentRecord(*row) for row in connection.execute(query)]


def attachment_to_proto(record: AttachmentRecord) -> pb.Attachment:
    """The message of an attachment."""
    return pb.Attachment(
        name=record.name, size_bytes=record.size_bytes, updated_unix_nano=record.updated_unix_nano
    )
