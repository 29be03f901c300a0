"""Codec dictionaries for asyncio: fetched before a block is decoded, since decoding cannot wait."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lynearm.wire.blocks import split_block
from lynearm.wire.dictionaries import DictionaryReader
from lynearm.wire.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from lynearm.client.async_trace_client import AsyncTraceClient


class AsyncDictionaries:
    """The dictionaries of one stream. Made by `AsyncTraceClient.dictionaries`.

    `decode_block(block, dictionaries=await dictionaries.reader_for(block))`; in a thread, where the loop has
    more to do, since decoding takes milliseconds.

    Args:
        client: Of the service that keeps the stream; must stay open.
        stream: Name of the stream.
        wait: For a service that is away, as long as it takes; otherwise say so.
    """

    def __init__(self, client: AsyncTraceClient, stream: str, *, wait: bool = False) -> None:
        self._client = client
        self._stream = stream
        self._wait = wait
        self._fetching = asyncio.Lock()
        self._fetched: dict[bytes, bytes] = {}
        self._reader = DictionaryReader(self._recall)

    async def reader_for(self, block: bytes | memoryview) -> DictionaryReader:
        """What `decode_block` needs for this block; of tasks that miss the same dictionary, one fetches it.

        Raises:
            LynearmError: as for `AsyncTraceClient.get_dictionary`.
            CorruptBlockError: if the block has no header, or its dictionary is none.
        """
        digest = split_block(block)[0].dictionary_digest
        if not digest:
            return self._reader
        async with self._fetching:
            try:
                self._reader.get(digest)
            except _NotFetchedError:
                self._fetched = {digest: await self._fetch(digest)}
                self._reader.get(digest)
        return self._reader

    async def _fetch(self, digest: bytes) -> bytes:
        while True:
            try:
                return await self._client.get_dictionary(self._stream, digest)
            except ServiceUnavailableError:
                if not self._wait:
                    raise
            await self._client.wait_until_ready()

    def _recall(self, digest: bytes) -> bytes:
        try:
            return self._fetched[digest]
        except KeyError:
            raise _NotFetchedError from None


class _NotFetchedError(Exception):
    """The reader does not hold the dictionary, nor are its bytes here."""
