"""Attachments: small things about a stream that are no traces, which the service keeps with it."""

from __future__ import annotations

from lynearm.client import attachment_calls
from lynearm.client.attachment_calls import AttachmentInfo
from lynearm.client.sending import SendCall


class AttachmentClient:
    """The attachments of one service's streams; `TraceClient.attachments`. Threads may share it.

    Args:
        send: Sends calls.
    """

    def __init__(self, send: SendCall) -> None:
        self._send = send

    def put(self, stream: str, name: str, content: bytes) -> None:
        """Keep something about a stream under a name, in place of what was there; durable on return.

        Args:
            stream: Name of the stream.
            name: As stream names.
            content: 1 byte to 3 MiB.

        Raises:
            StreamNotFoundError: there is no such stream.
            StreamSealedError: the stream is sealed.
            LimitError: the stream holds 256 others.
            InvalidInputError: the name is not allowed, or the content is empty or too large.
        """
        self._send(attachment_calls.put_attachment(stream, name, content))

    def get(self, stream: str, name: str) -> bytes:
        """An attachment, as it was put last.

        Raises:
            StreamNotFoundError, AttachmentNotFoundError: there is no such stream or attachment.
        """
        return self._send(attachment_calls.get_attachment(stream, name))

    def list(self, stream: str) -> list[AttachmentInfo]:
        """All attachments of a stream, ascending by name.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        return self._send(attachment_calls.list_attachments(stream))
