"""What the teacher said, row by row, as tensors.

Shape legend: N = completion positions, K = entries kept per position, D = tokens drawn from its tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher said at N positions."""

    token_ids_NK: Tensor
    """int64; the value where padded does not matter, as long as it is below V."""
    logprobs_NK: Tensor
    """Natural log; -inf where padded."""
    tail_mass_N: Tensor
    """Probability outside the kept entries, in [0, 1]."""
    sampled_ids_N: Tensor
    """int64: the token that the completion has at this position."""
    weights_N: Tensor | None = None
    """How much each position counts, 0 or more; None: all of them 1."""
    drawn_N: Tensor | None = None
    """bool: whether the sampled token was drawn from the row's own distribution, at the temperature at which
    it is compared; None: all of them were."""
    tail_ids_ND: Tensor | None = None
    """int64: tokens drawn from the row's distribution over what it does not keep, which stand for the tail's
    mass in equal parts; -1 where there are none, or fewer. None: no row has any."""

    def __len__(self) -> int:
        """N."""
        return int(self.sampled_ids_N.shape[0])

    def rows(self, start: int, end: int) -> Targets:
        """Positions start to end."""
        return Targets(
            self.token_ids_NK[start:end],
            self.logprobs_NK[start:end],
            self.tail_mass_N[start:end],
            self.sampled_ids_N[start:end],
            None if self.weights_N is None else self.weights_N[start:end],
            None if self.drawn_N is None else self.drawn_N[start:end],
            None if self.tail_ids_ND is None else self.tail_ids_ND[start:end],
        )

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets(
            self.token_ids_NK.to(device),
            self.logprobs_NK.to(device),
            self.tail_mass_N.to(device),
            self.sampled_ids_N.to(device),
            None if self.weights_N is None else self.weights_N.to(device),
            None if self.drawn_N is None else self.drawn_N.to(device),
            None if self.tail_ids_ND is None else self.tail_ids_ND.to(device),
        )
