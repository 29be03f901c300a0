"""Attachments of streams, for asyncio."""

from __future__ import annotations

from lynearm.client import attachment_calls
from lynearm.client.attachment_calls import AttachmentInfo
from lynearm.client.sending import AsyncSendCall


class AsyncAttachmentClient:
    """`AttachmentClient`, awaited; `AsyncTraceClient.attachments`.

    Args:
        send: Sends calls.
    """

    def __init__(self, send: AsyncSendCall) -> None:
        self._send = send

    async def put(self, stream: str, name: str, content: bytes) -> None:
        """As `AttachmentClient.put`."""
        await self._send(attachment_calls.put_attachment(stream, name, content))

    async def get(self, stream: str, name: str) -> bytes:
        """As `AttachmentClient.get`."""
        return await self._send(attachment_calls.get_attachment(stream, name))

    async def list(self, stream: str) -> list[AttachmentInfo]:
        """As `AttachmentClient.list`."""
        return await self._send(attachment_calls.list_attachments(stream))
