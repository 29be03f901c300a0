"""Batches cut from blocks without decoding them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynearm.client import ReceivedBlock
from lynearm.datasets.global_batches import BatchCutter, GlobalBatch
from lynearm.datasets.shards import Shard
from lynearm.wire.blocks import BlockHeader, checksum, join_block
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.traces import Cursor

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def block_of(offset: int, trace_count: int) -> ReceivedBlock:
    header = BlockHeader(2, "exact", trace_count, trace_count, trace_count, 1, checksum(b"x"))
    return ReceivedBlock(offset, memoryview(join_block(header, b"x")), 0)


def cut(sizes: list[int], batch_size: int, start: Cursor | None = None, index: int = 0) -> list[GlobalBatch]:
    start = Cursor() if start is None else start
    cutter = BatchCutter(batch_size, start=start, index=index)
    batches = [
        batch
        for offset, size in enumerate(sizes)
        if offset >= start.offset
        for batch in cutter.add(block_of(offset, size))
    ]
    rest = cutter.rest()
    return batches if rest is None else [*batches, rest]


def numbers(sizes: list[int], batch: GlobalBatch, part: slice | None = None) -> list[int]:
    """The traces of a batch by their place in the stream."""
    pieces = batch.pieces if part is None else batch.part(part)
    return [sum(sizes[: piece.offset]) + at for piece in pieces for at in range(piece.start, piece.end)]


@given(sizes=SIZES, batch_size=st.integers(1, 12))
def test_batches_are_the_stream_however_it_is_packed(sizes: list[int], batch_size: int) -> None:
    total = sum(sizes)
    expected = [list(range(at, min(at + batch_size, total))) for at in range(0, total, batch_size)]
    batches = cut(sizes, batch_size)
    assert [numbers(sizes, batch) for batch in batches] == expected
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert [batch.size for batch in batches] == [len(one) for one in expected]


@given(sizes=SIZES, batch_size=st.integers(1, 12))
def test_each_batch_says_where_the_next_begins(sizes: list[int], batch_size: int) -> None:
    batches = cut(sizes, batch_size)
    for done, batch in enumerate(batches, 1):
        again = cut(sizes, batch_size, batch.after, done)
        assert [(one.index, one.pieces, one.after) for one in again] == [
            (one.index, one.pieces, one.after) for one in batches[done:]
        ]
    assert batches[-1].after == Cursor(len(sizes), 0)


@given(sizes=SIZES, batch_size=st.integers(1, 12), world_size=st.integers(1, 5))
def test_the_parts_of_all_ranks_are_the_batch(sizes: list[int], batch_size: int, world_size: int) -> None:
    for batch in cut(sizes, batch_size * world_size):
        parts = [
            numbers(sizes, batch, Shard(rank, world_size).slice_of(batch.size)) for rank in range(world_size)
        ]
        assert [number for part in parts for number in part] == numbers(sizes, batch)
        lengths = {len(part) for part in parts}
        assert max(lengths) - min(lengths) <= (0 if batch.size == batch_size * world_size else 1)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_is_none_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(InvalidInputError, match="ranks count from 0"):
        Shard(rank, world_size)


@pytest.mark.parametrize(("batch_size", "proposal"), [(10, "12"), (1, "4"), (0, "4"), (-3, "4")])
def test_a_batch_that_ranks_cannot_share_is_refused(batch_size: int, proposal: str) -> None:
    with pytest.raises(InvalidInputError, match=f"make it {proposal}$"):
        Shard(0, 4).check_batch_size(batch_size)
