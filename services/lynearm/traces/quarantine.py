"""Blocks that are not what was committed: named once in the log, counted, and never delivered.

Nothing is moved or deleted: what the disk returned once it may return right another time, and an object may
be put back from a copy. So each read checks again, and a block that is right again leaves the quarantine.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

from lynearm.traces.catalog import BlockLocation, StreamRecord
from lynearm.wire.errors import CorruptBlockError

logger = logging.getLogger(__name__)

_REMEMBERED = 1 << 16
"""Damaged blocks that are told apart; a disk that returns more of them is beyond counting."""


class Quarantine:
    """The damaged blocks that this server has met."""

    def __init__(self) -> None:
        self._damaged: OrderedDict[tuple[int, int], None] = OrderedDict()

    @property
    def block_count(self) -> int:
        """How many blocks are damaged, as far as reads have shown."""
        return len(self._damaged)

    def add(self, stream: StreamRecord, location: BlockLocation, found_bytes: int) -> CorruptBlockError:
        """Note a block that was read and is damaged.

        Args:
            stream: Whose block it is.
            location: Where it lies.
            found_bytes: How many bytes of it are there.

        Returns:
            What to tell a reader.
        """
        key = (stream.stream_id, location.offset)
        error = CorruptBlockError(
            f"block {location.offset} of stream {stream.name!r} is damaged on disk "
            f"(object {location.object_key}, {location.span.length} bytes at {location.span.position}"
            f"{_shortage(location, found_bytes)})",
            f"restore the object from a copy, or continue from offset {location.offset + 1}",
        )
        if key not in self._damaged:
            logger.error("%s", error)
            self._damaged[key] = None
            if len(self._damaged) > _REMEMBERED:
                self._damaged.popitem(last=False)
        return error

    def release(self, stream: StreamRecord, offset: int) -> None:
        """Note that a block was read and is right."""
        if self._damaged and self._damaged.pop((stream.stream_id, offset), self) is None:
            logger.warning("block %d of stream %r is readable again", offset, stream.name)

    def drop_stream(self, stream_id: int) -> None:
        """Forget the blocks of a deleted stream."""
        for key in [key for key in self._damaged if key[0] == stream_id]:
            del self._damaged[key]


def _shortage(location: BlockLocation, found_bytes: int) -> str:
    return f", of which {found_bytes} can be read" if found_bytes < location.span.length else ""
