"""What a student is asked, pass after pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lynearm.rollouts.prompts import PromptCycle, RolloutPrompt
from lynearm.wire.splits import SplitRule


class Source:
    """Prompts that may become more."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.passes = 0

    def __call__(self) -> Iterator[RolloutPrompt]:
        self.passes += 1
        for number in range(self.count):
            yield RolloutPrompt(f"p{number}", np.arange(1, number + 2, dtype=np.int32))


def names(prompts: list[RolloutPrompt]) -> str:
    return " ".join(prompt.prompt_id for prompt in prompts)


def make(source: Source, *, fraction: float = 0.0, max_tokens: int = 100, skip: int = 0) -> PromptCycle:
    return PromptCycle(source, rule=SplitRule(fraction), max_tokens=max_tokens, skip=skip)


def test_prompts_come_in_order_over_and_over() -> None:
    cycle = make(Source(3))
    assert names(cycle.take(2)) == "p0 p1"
    assert cycle.position == 2
    assert names(cycle.take(6)) == "p2 p0 p1 p2 p0 p1"
    assert cycle.position == 2


def test_a_process_goes_on_where_another_was() -> None:
    first = make(Source(5))
    first.take(8)
    assert names(make(Source(5), skip=first.position).take(3)) == names(first.take(3)) == "p3 p4 p0"


def test_prompts_that_came_meanwhile_are_asked_in_the_next_pass() -> None:
    source = Source(0)
    cycle = make(source)
    assert cycle.take(2) == []
    source.count = 1
    assert names(cycle.take(2)) == "p0 p0"
    source.count = 3
    assert names(cycle.take(3)) == "p0 p1 p2"


def test_held_out_and_long_prompts_are_left_out() -> None:
    rule = SplitRule(0.5)
    kept = [f"p{number}" for number in range(20) if not rule.holds_out_prompt(f"p{number}", {})]
    assert 0 < len(kept) < 20
    assert names(make(Source(20), fraction=0.5).take(len(kept))) == " ".join(kept)
    assert names(make(Source(20), max_tokens=2).take(3)) == "p0 p1 p0"
    assert make(Source(3), fraction=0.5, max_tokens=0).take(4) == []
