"""Divergences between two distributions over the same few buckets, and their derivatives.

Shape legend: R = rows, B = buckets: a row's kept tokens, and last its tail. Every logarithm is to base e.

The student's probability of a bucket is a sum of softmax outputs, so that all there is to know of a loss D
is g_b = ∂D/∂log q_b: with logit z_j in bucket b(j) and G = Σ_b g_b,

    ∂D/∂z_j = (q_j / q_b(j)) g_b(j) − q_j G

A multiple of q_b in g_b changes nothing, and is left out where that saves a step. Buckets that a row does
not have are at `NOTHING` in both distributions, and come out as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from lynearm.student.objective import DIVERGENCE_NAMES, DivergenceName, LossTerm

NOTHING = -1e4
"""Takes the place of log 0: its exponential is 0 in every type, and 0 times it is 0 and not NaN."""

_Divergence: TypeAlias = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def divergence(term: LossTerm, log_p_RB: Tensor, log_q_RB: Tensor) -> tuple[Tensor, Tensor]:
    """One loss of each row, and its derivative by the student's log-probabilities.

    Args:
        term: Which loss; its weight is not applied.
        log_p_RB: The teacher's; finite, see `NOTHING`.
        log_q_RB: The student's; likewise.

    Returns:
        Nats, shape [R], and g, shape [R, B].
    """
    return _DIVERGENCES[_key(term)](log_p_RB, log_q_RB, term.mix)


def _key(term: LossTerm) -> DivergenceName:
    if term.name not in DIVERGENCE_NAMES:
        raise ValueError(f"{term.name} knows no teacher's distribution")
    return term.name


def _forward_kl(log_p_RB: Tensor, log_q_RB: Tensor, _mix: float) -> tuple[Tensor, Tensor]:
    # KL(p ‖ q) = Σ p (log p − log q)
    p_RB = log_p_RB.exp()
    return (p_RB * (log_p_RB - log_q_RB)).sum(1), -p_RB


def _reverse_kl(log_p_RB: Tensor, log_q_RB: Tensor, _mix: float) -> tuple[Tensor, Tensor]:
    # KL(q ‖ p) = Σ q (log q − log p)
    g_RB = log_q_RB.exp() * (log_q_RB - log_p_RB)
    return g_RB.sum(1), g_RB


def _jsd(log_p_RB: Tensor, log_q_RB: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    # β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q (Agarwal et al. 2024, GKD)
    log_m_RB = torch.logaddexp(log_p_RB + math.log(mix), log_q_RB + math.log1p(-mix))
    g_RB = (1.0 - mix) * log_q_RB.exp() * (log_q_RB - log_m_RB)
    return (mix * log_p_RB.exp() * (log_p_RB - log_m_RB) + g_RB).sum(1), g_RB


def _skew_kl(log_p_RB: Tensor, log_q_RB: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    # KL(p ‖ m), m = α p + (1 − α) q (Ko et al. 2024, DistiLLM)
    log_part_RB = log_q_RB + math.log1p(-mix)
    log_m_RB = torch.logaddexp(log_p_RB + math.log(mix), log_part_RB)
    p_RB = log_p_RB.exp()
    return (p_RB * (log_p_RB - log_m_RB)).sum(1), -p_RB * (log_part_RB - log_m_RB).exp()


def _skew_reverse_kl(log_p_RB: Tensor, log_q_RB: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    # KL(q ‖ m), m = (1 − α) p + α q
    log_part_RB = log_q_RB + math.log(mix)
    log_m_RB = torch.logaddexp(log_p_RB + math.log1p(-mix), log_part_RB)
    q_RB, gap_RB = log_q_RB.exp(), log_q_RB - log_m_RB
    return (q_RB * gap_RB).sum(1), q_RB * (gap_RB - (log_part_RB - log_m_RB).exp())


def _sampled_kd(log_p_RB: Tensor, log_q_RB: Tensor, _mix: float) -> tuple[Tensor, Tensor]:
    # −Σ p̂ log q with p̂ = count / draws: its gradient has the mean of forward KL's. The draws' own entropy
    # is no estimate of the teacher's, so it is not subtracted.
    p_RB = log_p_RB.exp()
    return -(p_RB * log_q_RB).sum(1), -p_RB


_DIVERGENCES: dict[DivergenceName, _Divergence] = {
    "forward-kl": _forward_kl,
    "reverse-kl": _reverse_kl,
    "jsd": _jsd,
    "skew-kl": _skew_kl,
    "skew-reverse-kl": _skew_reverse_kl,
    "sampled-kd": _sampled_kd,
}
