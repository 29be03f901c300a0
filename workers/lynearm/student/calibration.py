"""What a student predicts on held-out tokens: whether it agrees with its teacher, and how sure it is.

Expected calibration error (Guo et al., 2017): positions are binned by the student's largest probability, and
|accuracy − mean confidence| is averaged over the bins, weighted by their positions. Accurate is a position
whose completion token is the student's most likely one; completions that a teacher drew at a temperature
below 1 make a student look less sure than it should be.

Shape legend: N = positions, C = positions of one chunk, V = vocabulary, K = kept entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lynearm.student.losses import Targets

BINS = 15
"""Of equal width over (0, 1], as in the paper."""


@dataclass(frozen=True, slots=True)
class PredictionSums:
    """Counts that add up over pieces and over ranks."""

    compared: int = 0
    """Positions where the teacher kept an entry."""
    agreed: int = 0
    """Of these, where both hold the same token most likely."""
    bin_positions: tuple[int, ...] = (0,) * BINS
    bin_confidence: tuple[float, ...] = (0.0,) * BINS
    """Sums of the student's largest probability."""
    bin_accurate: tuple[int, ...] = (0,) * BINS

    def __add__(self, other: PredictionSums) -> PredictionSums:
        """Both together."""
        return PredictionSums.from_values(
            [mine + theirs for mine, theirs in zip(self.values(), other.values(), strict=True)]
        )

    def values(self) -> list[float]:
        """Everything in one list, to be summed over ranks."""
        return [self.compared, self.agreed, *self.bin_positions, *self.bin_confidence, *self.bin_accurate]

    @classmethod
    def from_values(cls, values: Sequence[float]) -> PredictionSums:
        """What `values` gave, or a sum of such lists."""
        positions, confidence, accurate = (
            values[2 + part * BINS : 2 + (part + 1) * BINS] for part in range(3)
        )
        return cls(
            int(values[0]),
            int(values[1]),
            tuple(map(int, positions)),
            tuple(confidence),
            tuple(map(int, accurate)),
        )

    @property
    def agreement(self) -> float | None:
        """Part of the compared positions that agree; None without any."""
        return self.agreed / self.compared if self.compared else None

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error, 0 to 1; None without positions."""
        total = sum(self.bin_positions)
        gaps = zip(self.bin_accurate, self.bin_confidence, strict=True)
        return sum(abs(accurate - confidence) for accurate, confidence in gaps) / total if total else None


@torch.no_grad()
def count_predictions(logits_CV: Tensor, targets: Targets) -> PredictionSums:
    """Agreement and calibration of some logits.

    Args:
        logits_CV: In any type; counted in float32.
        targets: The teacher's rows.
    """
    highest_C, student_C = logits_CV.max(1)
    confidence_C = (highest_C.float() - logits_CV.float().logsumexp(1)).exp().double().cpu()
    return _count(student_C.cpu(), confidence_C, targets)


def _count(student_C: Tensor, confidence_C: Tensor, targets: Targets) -> PredictionSums:
    accurate_C = student_C == targets.sampled_ids_N.cpu()
    bin_C = (confidence_C * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
    compared = agreed = 0
    if targets.logprobs_NK.shape[1]:
        best_C1 = targets.logprobs_NK.cpu().argmax(1, keepdim=True)
        kept_C = targets.logprobs_NK.cpu().gather(1, best_C1)[:, 0] > -torch.inf
        same_C = targets.token_ids_NK.cpu().gather(1, best_C1)[:, 0] == student_C
        compared, agreed = int(kept_C.sum()), int((kept_C & same_C).sum())
    positions = torch.bincount(bin_C, minlength=BINS)
    confidence = torch.bincount(bin_C, weights=confidence_C, minlength=BINS)
    accurate = torch.bincount(bin_C[accurate_C], minlength=BINS)
    return PredictionSums(
        compared,
        agreed,
        tuple(int(one) for one in positions),
        tuple(float(one) for one in confidence),
        tuple(int(one) for one in accurate),
    )
