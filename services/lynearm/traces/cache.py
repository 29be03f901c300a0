"""Recent blocks in memory, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict


class BlockCache:
    """Least recently used blocks leave first. Blocks are immutable, so that nothing is ever stale.

    Args:
        capacity_bytes: Bound on the sum of the blocks' sizes; 0 keeps none.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._size_bytes = 0
        self._blocks: OrderedDict[tuple[int, int], bytes | memoryview] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of the blocks held."""
        return self._size_bytes

    def get(self, stream_id: int, offset: int) -> bytes | memoryview | None:
        """The block, or None when it is not held."""
        block = self._blocks.get((stream_id, offset))
        if block is not None:
            self._blocks.move_to_end((stream_id, offset))
        return block

    def put(self, stream_id: int, offset: int, block: bytes | memoryview) -> None:
        """Hold a block, at the cost of older ones."""
        if len(block) > self._capacity_bytes or (stream_id, offset) in self._blocks:
            return
        self._blocks[stream_id, offset] = block
        self._size_bytes += len(block)
        while self._size_bytes > self._capacity_bytes:
            _, evicted = self._blocks.popitem(last=False)
            self._size_bytes -= len(evicted)

    def drop_stream(self, stream_id: int) -> None:
        """Forget every block of a deleted stream."""
        for key in [key for key in self._blocks if key[0] == stream_id]:
            self._size_bytes -= len(self._blocks.pop(key))
