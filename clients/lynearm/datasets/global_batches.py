"""Cuts the blocks of a stream into global batches, by the counts in their headers: nothing is decoded.

Invariant: which traces make up which batch depends on their order in the stream, on the first of them and on
the batch size alone, not on how they were packed into blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.client import ReceivedBlock
from lynearm.wire.blocks import split_block
from lynearm.wire.traces import Cursor


@dataclass(frozen=True, slots=True)
class Piece:
    """Some consecutive traces of one block."""

    offset: int
    block: memoryview
    start: int
    """Index of the first trace."""
    end: int
    """One past the index of the last."""


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The traces of one step of all ranks together, still in their blocks."""

    index: int
    """How many batches came before, from the beginning of the sequence."""
    pieces: tuple[Piece, ...]
    after: Cursor
    """Of the first trace of the next batch."""

    @property
    def size(self) -> int:
        """How many traces there are."""
        return sum(piece.end - piece.start for piece in self.pieces)

    def part(self, part: slice) -> tuple[Piece, ...]:
        """Some of the traces; only the blocks that hold them."""
        pieces: list[Piece] = []
        before = 0
        for piece in self.pieces:
            start = max(piece.start, piece.start + part.start - before)
            end = min(piece.end, piece.start + part.stop - before)
            if start < end:
                pieces.append(Piece(piece.offset, piece.block, start, end))
            before += piece.end - piece.start
        return tuple(pieces)


class BatchCutter:
    """Takes blocks in offset order, gives batches.

    Args:
        batch_size: Traces of a batch; the last may hold fewer.
        start: The first trace.
        index: Of the first batch.
    """

    def __init__(self, batch_size: int, *, start: Cursor, index: int = 0) -> None:
        self._batch_size = batch_size
        self._start = start
        self._index = index
        self._pieces: list[Piece] = []
        self._missing = batch_size

    def add(self, received: ReceivedBlock) -> list[GlobalBatch]:
        """Take the next block; the batches that it completes."""
        count = split_block(received.block)[0].trace_count
        at = self._start.trace_index if received.offset == self._start.offset else 0
        batches: list[GlobalBatch] = []
        while at < count:
            end = min(count, at + self._missing)
            self._pieces.append(Piece(received.offset, received.block, at, end))
            self._missing -= end - at
            at = end
            if not self._missing:
                batches.append(self._complete())
        return batches

    def rest(self) -> GlobalBatch | None:
        """The traces that did not fill a batch; None without any."""
        return self._complete() if self._pieces else None

    def _complete(self) -> GlobalBatch:
        last = self._pieces[-1]
        is_block_done = last.end == split_block(last.block)[0].trace_count
        after = Cursor(last.offset + 1, 0) if is_block_done else Cursor(last.offset, last.end)
        batch = GlobalBatch(self._index, tuple(self._pieces), after)
        self._index += 1
        self._pieces, self._missing = [], self._batch_size
        return batch
