"""λ, the share of rollouts in what is trained on, and what it makes of other streams' weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lynearm.student.mixing import StreamPlan, WeightSchedule, parse_stream
from lynearm.wire.errors import ConfigError

_MOST_SHARE = 1 - 1e-6
"""Of the rollouts: a share of exactly one would end the other streams, and with them the run."""


def parse_share(text: str) -> WeightSchedule:
    """λ, or how it moves: as a stream's weight is written.

    Raises:
        ConfigError: if it cannot be read, or is not in 0 to 1.
    """
    try:
        share = parse_stream(f"rollouts:{text}").weights
    except ConfigError as error:
        raise ConfigError(
            f"on_policy_share is {text!r}, expected a part of the tokens",
            "write 0.5, or 0..0.5@500 to go from 0 to 0.5 until step 500",
        ) from error
    if any(not 0 <= weight <= 1 for _, weight in share.knots):
        raise ConfigError(f"on_policy_share is {text!r}, expected 0 to 1")
    return share


def mix_rollouts(
    plans: Sequence[StreamPlan], rollouts: StreamPlan, share: WeightSchedule
) -> tuple[StreamPlan, ...]:
    """All streams, with weights that give the rollouts their share.

    Exact at every step at which a weight or the share turns, and between these unless both move.

    Args:
        plans: Of the other streams.
        rollouts: Without a weight.
        share: Of the rollouts.
    """
    steps = sorted({step for one in (share, *(plan.weights for plan in plans)) for step, _ in one.knots})

    def spread(step: int, weight: float) -> float:
        total = sum(plan.weights.at(step) for plan in plans)
        part = weight / total if total > 0 else 1 / len(plans)
        return part * (1 - min(share.at(step), _MOST_SHARE))

    def schedule(plan: StreamPlan) -> WeightSchedule:
        return WeightSchedule(tuple((step, spread(step, plan.weights.at(step))) for step in steps))

    mixed = [replace(plan, weights=schedule(plan)) for plan in plans]
    weights = WeightSchedule(tuple((step, min(share.at(step), _MOST_SHARE)) for step in steps))
    return (*mixed, replace(rollouts, weights=weights))
