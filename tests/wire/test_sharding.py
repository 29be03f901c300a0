"""Global batches and the ranks' slices of them: the same sequence whatever the number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynearm.wire.errors import InvalidInputError
from lynearm.wire.sharding import Shard, ShardPlan, shard_examples

plans = st.builds(
    ShardPlan,
    global_batch_size=st.integers(1, 9),
    seed=st.none() | st.integers(0, 2**64 - 1),
    window_batches=st.integers(1, 5),
)
counts = st.integers(0, 150)

GOLDEN_ORDER = [2, 6, 9, 0, 10, 5, 3, 8, 4, 11, 7, 1]
"""Computed by an implementation of its own, in plain integers."""


def sequence(plan: ShardPlan, count: int, world_size: int, *, first_step: int = 0) -> dict[int, list[int]]:
    """By step: the examples of all ranks, in the order of the ranks."""
    found: dict[int, list[int]] = {}
    for rank in range(world_size):
        examples = range(plan.first_example(first_step), count)
        for batch in shard_examples(examples, plan, Shard(rank, world_size), first_step=first_step):
            found.setdefault(batch.step, []).extend(batch.examples)
    return found


@settings(deadline=None)
@given(plans, counts, st.integers(1, 12))
def test_the_sequence_is_the_same_for_any_world_size(plan: ShardPlan, count: int, world_size: int) -> None:
    assert sequence(plan, count, world_size) == sequence(plan, count, 1)


@settings(deadline=None)
@given(plans, counts)
def test_every_example_comes_once_and_in_its_window(plan: ShardPlan, count: int) -> None:
    steps = sequence(plan, count, 3)
    assert sorted(example for batch in steps.values() for example in batch) == list(range(count))
    for step, batch in steps.items():
        assert {example // plan.window_size for example in batch} == {plan.window_of(step)}


@settings(deadline=None)
@given(plans, counts, st.integers(0, 40), st.integers(1, 7), st.integers(1, 7))
def test_a_run_goes_on_at_any_step_with_another_world_size(
    plan: ShardPlan, count: int, step: int, before: int, after: int
) -> None:
    whole = sequence(plan, count, before)
    rest = sequence(plan, count, after, first_step=step)
    assert rest == {number: batch for number, batch in whole.items() if number >= step}


@settings(deadline=None)
@given(plans, counts, st.integers(1, 12))
def test_ranks_get_equal_numbers_of_steps_and_shares(plan: ShardPlan, count: int, world_size: int) -> None:
    ranks = [
        list(shard_examples(range(count), plan, Shard(rank, world_size), drop_last=True))
        for rank in range(world_size)
    ]
    for of_step in zip(*ranks, strict=True):
        assert len({batch.step for batch in of_step}) == 1
        sizes = [len(batch.examples) for batch in of_step]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == of_step[0].global_size == plan.global_batch_size


@settings(deadline=None)
@given(plans, st.integers(0, 400), st.integers(0, 400))
def test_examples_that_come_later_do_not_change_full_windows(plan: ShardPlan, count: int, more: int) -> None:
    full = count // plan.window_size * plan.window_batches
    early, late = sequence(plan, count, 2), sequence(plan, count + more, 2)
    assert [early[step] for step in range(full)] == [late[step] for step in range(full)]


def test_without_a_seed_the_order_is_the_streams() -> None:
    plan = ShardPlan(4, window_batches=3)
    assert sequence(plan, 10, 2) == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9]}


def test_the_shuffle_never_changes() -> None:
    """A checkpoint of an earlier version must go on with the same examples."""
    plan = ShardPlan(4, seed=7, window_batches=3)
    assert plan.order(0, 12) == GOLDEN_ORDER
    assert plan.order(1, 12) != GOLDEN_ORDER
    assert ShardPlan(4, seed=8, window_batches=3).order(0, 12) != GOLDEN_ORDER


def test_the_shuffle_reaches_every_place_about_equally_often() -> None:
    plan = ShardPlan(8, seed=1)
    places = [plan.order(window, 8).index(0) for window in range(4000)]
    assert all(400 < places.count(place) < 600 for place in range(8))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"global_batch_size": 1, "window_batches": 0}, "window_batches is 0"),
        ({"global_batch_size": 1, "seed": -1}, "seed is -1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(fields: dict[str, int], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        ShardPlan(**fields)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_cannot_be_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(InvalidInputError, match="rank"):
        Shard(rank, world_size)
