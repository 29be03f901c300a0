"""Codec dictionaries, as far as the service cares: how large, how many, and which a stream holds.

A dictionary is what blocks of a stream share and do not repeat. It is opaque here, and named by its digest.
"""

from __future__ import annotations

from collections import OrderedDict

from lynearm.traces.catalog import Catalog, Producer
from lynearm.wire.blocks import DIGEST_BYTES, MAX_DICTIONARY_BYTES, dictionary_digest
from lynearm.wire.errors import InvalidInputError, UnknownDictionaryError

MAX_DICTIONARIES = 64
"""Of one stream. A codec makes one for each teacher; more come from one that begins anew again and again."""

_REMEMBERED = 4096
"""Enough for 64 streams that hold as many as they may; below 1 MiB of memory."""


class KnownDictionaries:
    """Tells which dictionaries a stream holds, asking the catalog once for each that is in use.

    What was seen stays true, whoever else changes the catalog: a stream holds its dictionaries until it is
    deleted, and its id is never used again. What was not found is not remembered.

    Args:
        catalog: Knows them all.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._seen: OrderedDict[tuple[int, bytes], None] = OrderedDict()

    async def check(self, producer: Producer, sequence: int, digest: bytes) -> None:
        """Let pass a block whose dictionary is there.

        Args:
            producer: Who publishes the block, and to which stream.
            sequence: The block's number, for people.
            digest: Names the dictionary that the block needs.

        Raises:
            UnknownDictionaryError: the stream does not hold it.
        """
        key = (producer.stream_id, digest)
        if key in self._seen:
            self._seen.move_to_end(key)
            return
        if not await self._catalog.has_dictionary(producer.stream_id, digest):
            raise UnknownDictionaryError(
                f"block {sequence} needs dictionary {short_digest(digest)}, "
                f"which stream {producer.stream_name!r} does not hold",
                "put the dictionary first, then publish the block again",
            )
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)


def name_dictionary(content: bytes) -> bytes:
    """The digest under which a dictionary is kept. Takes milliseconds for a large one.

    Raises:
        InvalidInputError: it is empty or too large.
    """
    if not 1 <= len(content) <= MAX_DICTIONARY_BYTES:
        raise InvalidInputError(
            f"dictionary of {len(content)} bytes, expected 1 to {MAX_DICTIONARY_BYTES}",
            "train a smaller one" if content else "",
        )
    return dictionary_digest(content)


def check_digest(digest: bytes) -> bytes:
    """The digest, unchanged.

    Raises:
        InvalidInputError: it is not the size of a digest.
    """
    if len(digest) != DIGEST_BYTES:
        raise InvalidInputError(
            f"digest of {len(digest)} bytes, expected {DIGEST_BYTES}",
            "send the bytes of the digest, not its hexadecimal digits",
        )
    return digest


def short_digest(digest: bytes) -> str:
    """What people read of a digest."""
    return digest.hex()
