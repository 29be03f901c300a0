"""How many rollouts are written when, against a trainer that takes them."""

from __future__ import annotations

import pytest

from lynearm.rollouts.demand import Demand


def make(**changes: float) -> Demand:
    values = {"max_staleness": 8, "expected_per_step": 2.0, "ahead": 8, "wave": 4, "first_step": 0, "step": 0}
    return Demand(**{**values, **changes})  # type: ignore[arg-type]  # fields by name


def test_whole_waves_are_written_until_enough_are_ahead() -> None:
    demand = make()
    assert demand.wanted(0) == 4
    demand.under_way = 4
    assert demand.wanted(0) == 4
    demand.under_way, demand.waiting = 4, 4
    assert demand.wanted(0) == 0
    demand.taken = 3
    assert demand.wanted(0) == 0
    demand.taken = 4
    assert demand.wanted(0) == 4


def test_nothing_is_written_that_would_be_too_old_before_its_turn() -> None:
    demand = make(first_step=7, step=7)
    # Weights of step 0 may be used until step 8: for two more steps, which take four rollouts.
    assert demand.wanted(0) == 4
    demand.waiting = 4
    assert demand.wanted(0) == 0
    assert demand.wanted(4) == 4
    demand.step = 9
    assert demand.is_too_old(0)
    assert not demand.is_too_old(1)
    demand.waiting = 0
    assert demand.wanted(0) == 0


def test_the_rate_is_learnt_from_the_trainer() -> None:
    demand = make(step=100)
    demand.waiting = demand.taken = 400
    assert demand.per_step == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize(
    ("max_staleness", "refresh_every"), [(0, 1), (1, 1), (1, 2), (3, 4), (16, 1), (16, 4)]
)
@pytest.mark.parametrize("per_step", [0.25, 1.0, 5.0])
def test_no_trainer_waits_for_ever(max_staleness: int, per_step: float, refresh_every: int) -> None:
    """A trainer that hands weights over every few steps, and one writer: each step comes to its rollouts."""
    demand = make(max_staleness=max_staleness, expected_per_step=per_step, ahead=6, wave=3)
    stream: list[int] = []  # steps of the weights
    handed, owed, written = 0, 0.0, 0
    for step in range(60):
        demand.step = step
        owed += per_step
        for _ in range(200):
            fresh = [one for one in stream if step - one <= max_staleness]
            demand.taken += len(stream) - len(fresh)
            stream = fresh
            if owed < 1:
                break
            if stream:
                stream.pop(0)
                demand.taken += 1
                owed -= 1
                continue
            if step - handed >= refresh_every:
                handed = step
            count = demand.wanted(handed)
            stream += [handed] * count
            demand.waiting += count
            written += count
        else:
            pytest.fail(f"step {step} waits for ever")
    # What is thrown away is little, even where a rollout lives for one step only.
    assert written <= 60 * per_step * 1.6 + 6
