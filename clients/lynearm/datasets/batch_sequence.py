"""The global batches of a stream, by the counts in its blocks' headers: nothing is decoded here.

Invariant: which traces make up which batch depends on their order in the stream and on the plan alone: not on
how they were packed into blocks, on ranks, or on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from lynearm.client import ReceivedBlock
from lynearm.wire.blocks import split_block
from lynearm.wire.sharding import Shard, ShardPlan, shard_examples
from lynearm.wire.traces import Cursor


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """Where a sequence of batches goes on: the same for all ranks."""

    step: int = 0
    """Of the next batch."""
    offset: int = 0
    """Block at which reading must begin for it: that of the first trace of its window."""
    trace_index: int = 0
    """Of that trace in the block."""


@dataclass(frozen=True, slots=True)
class Example:
    """A trace that is still in its block."""

    offset: int
    index: int
    block: memoryview


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """What one rank does in one step."""

    step: int
    examples: tuple[Example, ...]
    global_size: int
    """Traces of the step over all ranks."""
    after: StreamPosition


def batch_sequence(
    blocks: Iterable[ReceivedBlock], plan: ShardPlan, shard: Shard, start: StreamPosition
) -> Iterator[PlannedBatch]:
    """A rank's part of the batches of a stream.

    Args:
        blocks: In offset order, from `start.offset` on.
        plan: How the stream is cut into batches.
        shard: Which part is wanted.
        start: Where to begin: a `PlannedBatch.after` of the same plan, or the beginning of a sequence.
    """
    if plan.seed is None:  # in the stream's order, no batch needs more than itself
        plan = replace(plan, window_batches=1)
    reading = _Reading(blocks, Cursor(start.offset, start.trace_index))
    window, window_start = plan.window_of(start.step), reading.cursor
    end = window_start
    for batch in shard_examples(reading, plan, shard, first_step=start.step):
        if plan.window_of(batch.step) != window:
            window, window_start = plan.window_of(batch.step), end
        end = reading.cursor  # exactly the traces of this window have been read
        then = window_start if plan.window_of(batch.step + 1) == window else end
        after = StreamPosition(batch.step + 1, then.offset, then.trace_index)
        yield PlannedBatch(batch.step, tuple(batch.examples), batch.global_size, after)


class _Reading:
    """The traces of blocks from a cursor on, and the cursor after what was given."""

    def __init__(self, blocks: Iterable[ReceivedBlock], start: Cursor) -> None:
        self.cursor = start
        self._examples = self._read(blocks, start)

    def __iter__(self) -> Iterator[Example]:
        return self._examples

    def _read(self, blocks: Iterable[ReceivedBlock], start: Cursor) -> Iterator[Example]:
        for received in blocks:
            count = split_block(received.block)[0].trace_count
            first = start.trace_index if received.offset == start.offset else 0
            for index in range(first, count):
                is_last = index + 1 == count
                self.cursor = Cursor(received.offset + is_last, 0 if is_last else index + 1)
                yield Example(received.offset, index, received.block)
