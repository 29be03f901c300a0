"""The teacher's side of a loss: its kept entries and tail as one distribution, at the loss's temperature.

Shape legend: R = rows, K = entries kept per row, B = K + 1 buckets, the tail last, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lynearm.student.losses.divergences import NOTHING
from lynearm.student.losses.targets import Targets

LEAST_TAIL = 1e-7
"""Smallest tail mass while a student may have tokens outside the kept ones: what float32 can tell from a
sum of one. Without it a single token there would cost reverse KL infinitely much."""


def kept_entries(targets: Targets, vocab_size: int) -> Tensor:
    """Which entries are not padding and are tokens of the student, bool [R, K]."""
    return (targets.logprobs_NK > -torch.inf) & (targets.token_ids_NK < vocab_size)


def teacher_buckets(
    targets: Targets, is_kept_RK: Tensor, *, dtype: torch.dtype, vocab_size: int, exponent: float = 1.0
) -> Tensor:
    """Log-probabilities of a row's kept entries and its tail, [R, B]; they sum to one.

    Rounding, in the teacher's normaliser and in the codec, leaves sums up to 1e-4 above or below one:
    without normalising, a student equal to its teacher would have a KL that is not zero, or below it. A row
    that says nothing at all, with no entry and no tail, is taken as all tail: it costs nothing.

    Args:
        targets: The rows.
        is_kept_RK: From `kept_entries`; the others are at `NOTHING`.
        dtype: Of the result.
        vocab_size: Of the student: over so many tokens, less the kept ones, the tail is spread.
        exponent: The teacher's temperature over the wanted one; see `retemper`.
    """
    log_kept_RK = torch.where(is_kept_RK, targets.logprobs_NK.to(dtype), -torch.inf)
    log_tail_R = targets.tail_mass_N.to(dtype).clamp(0.0, 1.0).log()
    if exponent != 1.0:
        log_kept_RK, log_tail_R = retemper(log_kept_RK, log_tail_R, exponent, vocab_size=vocab_size)
    log_p_RB = torch.cat((log_kept_RK, log_tail_R[:, None]), 1)
    silent_R1 = log_p_RB.amax(1, keepdim=True) == -torch.inf
    log_p_RB[:, -1:] = torch.where(silent_R1, 0.0, log_p_RB[:, -1:])
    return (log_p_RB - log_p_RB.logsumexp(1, keepdim=True)).clamp_min(NOTHING)


def retemper(
    log_kept_RK: Tensor, log_tail_R: Tensor, exponent: float, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The unnormalised logs of p^exponent over kept entries and tail.

    Over kept entries that is exact. The tail's own sum, of the tokens' probabilities to that power, is not
    known from the mass; it lies between two bounds, and their geometric mean is taken: the mass spread
    evenly over all n tokens, n^(1−r) m^r, and the mass on as few tokens as can be, each as probable as the
    least kept one, m · p_K^(r−1). The error is measured in `docs/losses.md`.

    Args:
        log_kept_RK: -inf where padded.
        log_tail_R: -inf for an empty tail.
        exponent: r, the temperature that the logs are at over the wanted one.
        vocab_size: V.
    """
    count_R = (log_kept_RK > -torch.inf).sum(1)
    others_R = (vocab_size - count_R).clamp_min(1).to(log_tail_R.dtype)
    even_R = (1.0 - exponent) * others_R.log() + exponent * log_tail_R
    least_R = (
        torch.where(log_kept_RK > -torch.inf, log_kept_RK, torch.inf).amin(1)
        if log_kept_RK.shape[1]
        else log_tail_R
    )
    # No token outside is more probable than the least kept one, nor than all of them together.
    least_R = torch.minimum(least_R, log_tail_R)
    few_R = log_tail_R + (exponent - 1.0) * least_R
    mean_R = torch.where(log_tail_R > -torch.inf, (even_R + few_R) / 2, -torch.inf)
    return exponent * log_kept_RK, mean_R
