"""Batches planned from blocks without decoding them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lynearm.client import ReceivedBlock
from lynearm.datasets.batch_sequence import PlannedBatch, StreamPosition, batch_sequence
from lynearm.wire.blocks import BlockHeader, checksum, join_block
from lynearm.wire.sharding import Shard, ShardPlan

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)
PLANS = st.builds(
    ShardPlan,
    global_batch_size=st.integers(1, 12),
    seed=st.none() | st.integers(0, 99),
    window_batches=st.integers(1, 4),
)


def block_of(offset: int, trace_count: int) -> ReceivedBlock:
    header = BlockHeader(2, "exact", trace_count, trace_count, trace_count, 1, checksum(b"x"))
    return ReceivedBlock(offset, memoryview(join_block(header, b"x")), 0)


def run(
    sizes: list[int], plan: ShardPlan, shard: Shard | None = None, start: StreamPosition | None = None
) -> list[PlannedBatch]:
    start = StreamPosition() if start is None else start
    blocks = [block_of(offset, size) for offset, size in enumerate(sizes) if offset >= start.offset]
    return list(batch_sequence(blocks, plan, Shard() if shard is None else shard, start))


def numbers(sizes: list[int], batch: PlannedBatch) -> list[int]:
    """The traces of a batch by their place in the stream."""
    return [sum(sizes[: example.offset]) + example.index for example in batch.examples]


@given(sizes=SIZES, plan=PLANS)
def test_every_trace_is_in_one_batch_however_they_are_packed(sizes: list[int], plan: ShardPlan) -> None:
    total = sum(sizes)
    batches = run(sizes, plan)
    assert [batch.step for batch in batches] == list(range(-(-total // plan.global_batch_size)))
    together = [numbers(sizes, batch) for batch in batches]
    assert together == [numbers([1] * total, batch) for batch in run([1] * total, plan)]
    assert sorted(n for one in together for n in one) == list(range(total))
    assert [batch.global_size for batch in batches] == [len(one) for one in together]
    if plan.seed is None:
        assert [n for one in together for n in one] == list(range(total))


@given(sizes=SIZES, plan=PLANS)
def test_each_batch_says_where_the_next_is_found(sizes: list[int], plan: ShardPlan) -> None:
    batches = run(sizes, plan)
    for done, batch in enumerate(batches, 1):
        assert run(sizes, plan, start=batch.after) == batches[done:]


@given(sizes=SIZES, plan=PLANS, world_size=st.integers(1, 5))
def test_the_parts_of_all_ranks_are_the_batch(sizes: list[int], plan: ShardPlan, world_size: int) -> None:
    ranks = [run(sizes, plan, Shard(rank, world_size)) for rank in range(world_size)]
    for whole, *parts in zip(run(sizes, plan), *ranks, strict=True):
        assert [n for part in parts for n in numbers(sizes, part)] == numbers(sizes, whole)
        assert {(part.step, part.global_size, part.after) for part in parts} == {
            (whole.step, whole.global_size, whole.after)
        }


def test_in_the_streams_order_reading_begins_at_the_next_trace() -> None:
    plan = ShardPlan(4, window_batches=100)  # a window is for shuffling, and means nothing without a seed
    assert [batch.after for batch in run([3, 3, 3], plan)] == [
        StreamPosition(1, 1, 1),
        StreamPosition(2, 2, 2),
        StreamPosition(3, 3, 0),
    ]
