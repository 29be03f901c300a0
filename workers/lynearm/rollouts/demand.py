"""How many rollouts are wanted now, so that the trainer does not wait and nothing is written in vain.

A rollout is used some steps after it was written: those that wait before it are used first. What would be too
old by then is not written before there are newer weights, since the teacher's tokens are what costs. Nothing
here is exact, and nothing has to be: the trainer looks at each trace's own step when its turn comes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_PRIOR_STEPS = 4
"""As so many steps the expectation counts beside what is seen."""


@dataclass(slots=True)
class Demand:
    """What a rollout process knows of the trainer's appetite."""

    max_staleness: int
    """Steps that a rollout may be behind the weights that it is used with."""
    expected_per_step: float
    """Rollouts that a step should take."""
    ahead: int
    """Rollouts that may be under way or wait."""
    wave: int
    """Rollouts that are best written together."""
    first_step: int
    """Steps that the trainer had done at first."""
    step: int
    """Steps that it has done."""
    waiting: int = 0
    """Rollouts in the stream that it has not looked at at first, and those published since."""
    under_way: int = 0
    """Written, or being written, and not in the stream yet."""
    taken: int = 0
    """Of `waiting`, those that it has looked at meanwhile."""
    stale: int = 0
    """Of these, those that were too old."""

    @property
    def outstanding(self) -> int:
        """Rollouts that come before the next one."""
        return max(0, self.waiting - self.taken) + self.under_way

    @property
    def per_step(self) -> float:
        """Rollouts that a step takes: what is expected, corrected by what is seen."""
        steps = max(0, self.step - self.first_step)
        return (self.expected_per_step * _PRIOR_STEPS + self.taken - self.stale) / (_PRIOR_STEPS + steps)

    def wanted(self, weights_step: int) -> int:
        """Rollouts to write now with these weights; 0 to wait for room, or for newer weights.

        Args:
            weights_step: Steps that made the engine's weights.
        """
        room = self.ahead - self.outstanding
        steps_left = self.max_staleness - (self.step - weights_step) + 1
        fresh = math.floor(steps_left * self.per_step - self.outstanding)
        if self.outstanding == 0 and steps_left > 0:
            # The trainer waits, or soon will: a step may take more than the average.
            fresh = max(fresh, 1)
        wanted = min(room, fresh, self.wave)
        # Small waves waste the engine; they are for a trainer that has nothing left.
        return wanted if wanted == self.wave or (wanted > 0 and self.outstanding == 0) else 0

    def is_too_old(self, weights_step: int) -> bool:
        """Whether rollouts of these weights could not be used any more, were there no others before them."""
        return self.step - weights_step > self.max_staleness
