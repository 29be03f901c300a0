"""Which stream the next trace comes from, where a run learns from several. Loads no torch.

    STREAM = NAME[:WEIGHT]                  maths    maths:0.7    maths:0.7..0.2@2000
    WEIGHT = NUMBER[..NUMBER@STEP]…         a straight line to each number at its step, level after the last

Weights are shares of the completion tokens that are trained on, since a loss is averaged over those: counted
in traces, a stream of long answers would weigh more than its weight says.

Rule: every stream has a credit. A trace of n completion tokens takes n from the credit of its stream and adds
to each stream its share of n; the next trace comes from the stream with the most credit, of equals the first
one. Credits sum to zero and the richest stream pays, so that no stream is ever further ahead of its share
than the tokens of its longest trace, and none further behind than that of all others together: much closer
than independent draws, whose deviation grows with the root of the number of traces.

Invariants: the choice depends on the states of the streams and on the step alone, and states go into every
checkpoint: not on time, not on which stream has data, not on the number of ranks. Nothing is random here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from lynearm.wire.errors import ConfigError, InvalidInputError
from lynearm.wire.specs import check_name
from lynearm.wire.traces import Cursor, Trace

Accepts: TypeAlias = Callable[[Trace, int], bool]
"""Whether a trace is still wanted, given the steps done: see `StreamPlan.accepts`."""

_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_WEIGHT = re.compile(rf"{_NUMBER}(?:\.\.{_NUMBER}@\d+)*")
_HOW = "write NAME[:WEIGHT], for example maths:0.7, or maths:0.7..0.2@2000 to go to 0.2 until step 2,000"

_BEGINNING = Cursor()


@dataclass(frozen=True, slots=True)
class WeightSchedule:
    """A weight that moves along straight lines between steps.

    Raises:
        ConfigError: if steps do not ascend from 0, or no weight is above 0.
    """

    knots: tuple[tuple[int, float], ...] = ((0, 1.0),)
    """Steps and the weights that they have; the first is step 0."""

    def __post_init__(self) -> None:
        """Check the knots."""
        steps = [step for step, _ in self.knots]
        if not steps or steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)):
            raise ConfigError(
                f"the weight changes at steps {steps}, expected 0 and then ascending ones", _HOW
            )
        if max(weight for _, weight in self.knots) <= 0:
            raise ConfigError("a weight is 0 throughout", "leave out a stream that is never trained on")

    def at(self, step: int) -> float:
        """The weight when `step` steps are done."""
        for (start, before), (end, after) in itertools.pairwise(self.knots):
            if step < end:
                return before + (after - before) * (step - start) / (end - start)
        return self.knots[-1][1]

    def is_over(self, step: int) -> bool:
        """Whether the weight is 0 from `step` on for good."""
        return step >= self.knots[-1][0] and self.knots[-1][1] == 0

    def __str__(self) -> str:
        """As `parse_stream` reads it."""
        first, *others = self.knots
        return f"{first[1]:g}" + "".join(f"..{weight:g}@{step}" for step, weight in others)


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """How a stream takes part in a run."""

    name: str
    weights: WeightSchedule = WeightSchedule()
    accepts: Accepts | None = None
    """Asked once for each trace when its turn comes, with the steps done by then; False drops the trace, for
    which the next one of the stream takes the turn. The answer has to depend on its arguments alone, and a
    trace that was refused once has to be refused at all later steps (as one that has become too old): a
    resumed run asks again for those that were dropped since the last trace that was trained on."""
    measured: bool = True
    """Whether held-out traces are collected from it. What the split rule holds out is never trained on."""
    endless: bool = False
    """The run does not go on for this stream alone: it ends when all others have."""


@dataclass(frozen=True, slots=True)
class StreamState:
    """How far a run is in one stream."""

    name: str
    created_unix_nano: int
    """Tells a stream from a later one of the same name."""
    epoch: int = 0
    """Pass in progress, from 0."""
    cursor: Cursor = _BEGINNING
    """Next trace of this pass."""
    furthest: Cursor = _BEGINNING
    """End of what was trained on, over all passes."""
    traces: int = 0
    """Trained on, repetitions included."""
    tokens: int = 0
    """Completion tokens trained on, repetitions included."""
    credit: float = 0.0
    """Completion tokens by which it is behind its share."""
    damaged: tuple[int, ...] = ()
    """Offsets of the blocks that were passed over, being damaged; over all passes, each once."""


def parse_stream(text: str) -> StreamPlan:
    """A stream as it is written in a configuration.

    Raises:
        ConfigError: if it cannot be read.
    """
    name, separator, weight = text.strip().partition(":")
    try:
        check_name(name)
    except InvalidInputError as error:
        raise ConfigError(error.message, error.remedy) from error
    if not separator:
        return StreamPlan(name)
    if _WEIGHT.fullmatch(weight) is None:
        raise ConfigError(f"stream {text!r}: the weight {weight!r} cannot be read", _HOW)
    first, *others = re.split(rf"\.\.(?={_NUMBER}@)", weight)
    knots = [(int(step), float(number)) for number, _, step in (one.partition("@") for one in others)]
    try:
        return StreamPlan(name, WeightSchedule(((0, float(first)), *knots)))
    except ConfigError as error:
        raise ConfigError(f"stream {text!r}: {error.message}", error.remedy) from error


def parse_streams(texts: Sequence[str]) -> tuple[StreamPlan, ...]:
    """Streams as they are written in a configuration.

    Raises:
        ConfigError: if one cannot be read, is there twice, or there is none.
    """
    plans = tuple(parse_stream(text) for text in texts)
    names = [plan.name for plan in plans]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"streams are {', '.join(texts) or 'none'}, expected each one once",
            "give at least one, and add up the weights of one that stands there twice",
        )
    return plans


def has_ended(plan: StreamPlan, state: StreamState, *, step: int, epochs: int) -> bool:
    """Whether nothing more is taken from a stream: its passes are complete, or its weight is 0 for good."""
    return state.epoch >= epochs or plan.weights.is_over(step)


def find_shares(
    plans: Sequence[StreamPlan], states: Sequence[StreamState], *, step: int, epochs: int
) -> tuple[float, ...]:
    """What each stream should contribute to what is trained on next: parts of 1; none when the run is over.

    Streams that have ended get nothing, and the weights of the others count among themselves. Where none of
    them has a weight above 0 yet, they count alike.
    """
    going = [
        not has_ended(plan, state, step=step, epochs=epochs)
        for plan, state in zip(plans, states, strict=True)
    ]
    if not any(on and not plan.endless for on, plan in zip(going, plans, strict=True)):
        return ()
    weights = [plan.weights.at(step) if on else 0.0 for on, plan in zip(going, plans, strict=True)]
    total = sum(weights)
    if total <= 0:
        weights, total = [float(on) for on in going], float(sum(going))
    return tuple(weight / total for weight in weights)


def choose_stream(states: Sequence[StreamState], shares: Sequence[float]) -> int:
    """Index of the stream that has the turn: of those with a share, the first with the most credit."""
    with_share = [index for index, share in enumerate(shares) if share > 0]
    return max(with_share, key=lambda index: states[index].credit)


def count_trace(
    states: Sequence[StreamState], index: int, *, tokens: int, after: Cursor, shares: Sequence[float]
) -> tuple[StreamState, ...]:
    """The states when a trace of a stream was trained on.

    Args:
        states: Before.
        index: Of the trace's stream.
        tokens: Completion tokens of the trace.
        after: Place of the next trace.
        shares: Those by which the stream was chosen.
    """
    counted = [
        replace(state, credit=state.credit + share * tokens) if share > 0 else state
        for state, share in zip(states, shares, strict=True)
    ]
    mine = counted[index]
    counted[index] = replace(
        mine,
        cursor=after,
        furthest=max(mine.furthest, after),
        traces=mine.traces + 1,
        tokens=mine.tokens + tokens,
        credit=mine.credit - tokens,
    )
    return tuple(counted)


def note_damaged(
    states: Sequence[StreamState], index: int, offsets: Sequence[int], *, before: Cursor | None = None
) -> tuple[StreamState, ...]:
    """The states when blocks of a stream were passed over.

    Args:
        states: Before.
        index: Of the stream.
        offsets: Of all that its reader has passed over in this pass.
        before: Only blocks before this place count: a reader is ahead of what was trained on.
    """
    passed = {offset for offset in offsets if before is None or offset < before.offset}
    damaged = tuple(sorted(passed.union(states[index].damaged)))
    return tuple(
        replace(state, damaged=damaged) if number == index and damaged != state.damaged else state
        for number, state in enumerate(states)
    )


def finish_pass(states: Sequence[StreamState], index: int) -> tuple[StreamState, ...]:
    """The states when a stream has given all traces of a pass."""
    finished = replace(states[index], epoch=states[index].epoch + 1, cursor=_BEGINNING)
    return tuple(finished if number == index else state for number, state in enumerate(states))
