"""The mixture: shares that keep to the weights, and an order that depends on states alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lynearm.student.mixing import (
    StreamPlan,
    StreamState,
    WeightSchedule,
    choose_stream,
    count_trace,
    find_shares,
    finish_pass,
    has_ended,
    parse_stream,
    parse_streams,
)
from lynearm.wire.errors import ConfigError
from lynearm.wire.traces import Cursor


def begin(plans: tuple[StreamPlan, ...]) -> tuple[StreamState, ...]:
    return tuple(StreamState(plan.name, 1) for plan in plans)


def draw(
    plans: tuple[StreamPlan, ...], states: tuple[StreamState, ...], lengths: list[int], step: int = 0
) -> tuple[int, tuple[StreamState, ...]]:
    """Draw one trace, whose length is the stream's next of an endless row."""
    shares = find_shares(plans, states, step=step, epochs=1)
    index = choose_stream(states, shares)
    taken = states[index].traces
    tokens = random.Random(f"{index}/{taken}").randint(1, lengths[index])
    return index, count_trace(states, index, tokens=tokens, after=Cursor(taken + 1), shares=shares)


@pytest.mark.parametrize("weights", [("a:0.7", "b:0.3"), ("a", "b"), ("a:5", "b:1", "c:2", "d:0.01")])
def test_shares_of_tokens_stay_within_a_trace_of_the_weights(weights: tuple[str, ...]) -> None:
    plans = parse_streams(weights)
    states = begin(plans)
    lengths = [10, 300, 40, 7]
    shares = find_shares(plans, states, step=0, epochs=1)
    longest = max(lengths)
    for _ in range(3000):
        _, states = draw(plans, states, lengths)
        total = sum(state.tokens for state in states)
        for index, (state, share) in enumerate(zip(states, shares, strict=True)):
            ahead = state.tokens - share * total
            assert ahead <= lengths[index]
            assert -ahead <= (len(plans) - 1) * longest
            assert state.credit == pytest.approx(-ahead, abs=1e-6)


def test_the_order_goes_on_from_any_state() -> None:
    plans = parse_streams(("a:0.7..0.1@40", "b:0.3", "c:0..0.5@60"))
    states, lengths = begin(plans), [30, 12, 25]
    history: list[tuple[int, tuple[StreamState, ...]]] = []
    for number in range(400):
        index, states = draw(plans, states, lengths, step=number // 4)
        history.append((index, states))
    for start in (0, 17, 250):
        states = history[start][1]
        for number in range(start + 1, 400):
            index, states = draw(plans, states, lengths, step=number // 4)
            assert (index, states) == history[number]


def test_streams_of_equal_traces_take_turns_from_the_first() -> None:
    plans = parse_streams(("a:3", "b:1"))
    states = begin(plans)
    order: list[int] = []
    for _ in range(9):
        shares = find_shares(plans, states, step=0, epochs=1)
        order.append(choose_stream(states, shares))
        states = count_trace(states, order[-1], tokens=8, after=Cursor(), shares=shares)
    assert order == [0, 1, 0, 0, 0, 1, 0, 0, 0]


def test_one_stream_needs_no_credit() -> None:
    plans = parse_streams(("only:0.123",))
    states = begin(plans)
    for _ in range(100):
        _, states = draw(plans, states, [977])
        assert states[0].credit == 0


def test_a_stream_that_has_ended_leaves_its_share_to_the_others() -> None:
    plans = parse_streams(("a:0.5", "b:0.3", "c:0.2"))
    states = begin(plans)
    assert find_shares(plans, states, step=0, epochs=1) == pytest.approx((0.5, 0.3, 0.2))
    states = finish_pass(states, 0)
    assert find_shares(plans, states, step=0, epochs=1) == pytest.approx((0.0, 0.6, 0.4))
    assert find_shares(plans, states, step=0, epochs=2) == pytest.approx((0.5, 0.3, 0.2))
    states = finish_pass(finish_pass(states, 1), 2)
    assert find_shares(plans, states, step=0, epochs=1) == ()


def test_a_pass_that_ends_begins_again_at_the_start() -> None:
    state = StreamState(
        "a", 1, cursor=Cursor(9, 3), furthest=Cursor(9, 3), traces=40, tokens=400, credit=-2.5
    )
    (finished,) = finish_pass((state,), 0)
    assert finished == replace(state, epoch=1, cursor=Cursor())


def test_a_run_does_not_go_on_for_endless_streams_alone() -> None:
    plans = (StreamPlan("book"), StreamPlan("own words", endless=True))
    states = begin(plans)
    assert find_shares(plans, states, step=0, epochs=1) == (0.5, 0.5)
    assert find_shares(plans, finish_pass(states, 0), step=0, epochs=1) == ()
    assert find_shares(plans, finish_pass(states, 1), step=0, epochs=1) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("maths", [1.0, 1.0, 1.0, 1.0]),
        ("maths:.25", [0.25, 0.25, 0.25, 0.25]),
        ("maths:0.7..0.2@1000", [0.7, 0.45, 0.2, 0.2]),
        ("maths:1..0@500..2@1000", [1.0, 0.0, 2.0, 2.0]),
        ("maths:3..3@500..0@750", [3.0, 3.0, 0.0, 0.0]),
    ],
)
def test_weights_follow_their_schedule(text: str, weights: list[float]) -> None:
    plan = parse_stream(text)
    assert plan.name == "maths"
    assert [plan.weights.at(step) for step in (0, 500, 1000, 9999)] == pytest.approx(weights)
    assert parse_stream(f"maths:{plan.weights}") == plan


def test_a_weight_that_falls_to_nothing_ends_a_stream_and_one_that_rises_does_not() -> None:
    falling, rising = parse_streams(("a:1..0@100", "b:0..1@100"))
    state = StreamState("a", 1)
    assert [has_ended(falling, state, step=step, epochs=1) for step in (0, 99, 100, 101)] == [
        False,
        False,
        True,
        True,
    ]
    assert not has_ended(rising, state, step=0, epochs=1)
    both = (state, StreamState("b", 1))
    assert find_shares((falling, rising), both, step=0, epochs=1) == (1.0, 0.0)
    assert find_shares((falling, rising), both, step=100, epochs=1) == (0.0, 1.0)
    # Where it is the only one left, a stream whose time has not come yet is not waited for.
    assert find_shares((falling, rising), finish_pass(both, 0), step=0, epochs=1) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ((), "streams are none"),
        (("a", "b", "a:0.5"), "expected each one once"),
        (("A",), "stream name 'A'"),
        (("a:",), "weight ''"),
        (("a:0",), "0 throughout"),
        (("a:0..0@9",), "0 throughout"),
        (("a:-1",), "weight '-1'"),
        (("a:nan",), "weight 'nan'"),
        (("a:1..2",), "weight '1..2'"),
        (("a:1@5",), "weight '1@5'"),
        (("a:1->2@5",), "weight '1->2@5'"),
        (("a:1..2@9..3@9",), "ascending"),
        (("a:1..2@0",), "ascending"),
    ],
)
def test_streams_that_cannot_be_read_are_refused(texts: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        parse_streams(texts)


def test_a_schedule_begins_at_step_0() -> None:
    with pytest.raises(ConfigError, match="expected 0"):
        WeightSchedule(((5, 1.0),))
