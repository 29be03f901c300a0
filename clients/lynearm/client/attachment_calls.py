"""The calls about attachments of streams: what each sends, and what its answer means; no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.client.calls import Call
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.blocks import MAX_ATTACHMENT_BYTES
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.specs import check_name


@dataclass(frozen=True, slots=True)
class AttachmentInfo:
    """An attachment of a stream, without its content."""

    name: str
    size_bytes: int
    updated_unix_nano: int
    """When it was put last."""


def put_attachment(stream: str, name: str, content: bytes) -> Call[None]:
    """PutAttachment."""
    # Checked here too: above 4 MiB gRPC would speak of a limit of its own.
    if not 1 <= len(content) <= MAX_ATTACHMENT_BYTES:
        raise InvalidInputError(
            f"attachment of {len(content)} bytes, expected 1 to {MAX_ATTACHMENT_BYTES}", "split it"
        )
    request = pb.PutAttachmentRequest(
        stream=check_name(stream), name=check_name(name, what="attachment"), content=content
    )
    return Call("PutAttachment", request, pb.PutAttachmentResponse, _read_nothing)


def get_attachment(stream: str, name: str) -> Call[bytes]:
    """GetAttachment."""
    request = pb.GetAttachmentRequest(stream=check_name(stream), name=check_name(name, what="attachment"))
    return Call("GetAttachment", request, pb.GetAttachmentResponse, _read_content)


def list_attachments(stream: str) -> Call[list[AttachmentInfo]]:
    """ListAttachments."""
    request = pb.ListAttachmentsRequest(stream=check_name(stream))
    return Call("ListAttachments", request, pb.ListAttachmentsResponse, _read_list)


def _read_nothing(_answer: pb.PutAttachmentResponse) -> None:
    return None


def _read_content(answer: pb.GetAttachmentResponse) -> bytes:
    return answer.content


def _read_list(answer: pb.ListAttachmentsResponse) -> list[AttachmentInfo]:
    return [AttachmentInfo(one.name, one.size_bytes, one.updated_unix_nano) for one in answer.attachments]
