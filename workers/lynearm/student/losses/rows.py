"""Losses of a few rows of logits, and their gradient in the logits' place.

Shape legend: R = rows, V = vocabulary, K = entries kept per row, B = K + 1 buckets, the tail last, S = tokens
that stand for the tail.

With the kept entries at −inf, one softmax over [R, V] gives t, the student's distribution *within* the
tail. Its log-normaliser and the few kept logits then say everything else: log q of every bucket, without
the cancellation of 1 − Σ q_k and without underflow however sure the student is. The derivative of a sum of
losses is q_j A + g_j, with A one number a row and g_j nothing but a share of the tail's outside the kept
entries (see `divergences`), so that in the tail it is t again, scaled by A q_0 + g_0: the softmax becomes
the gradient by one multiplication and K + 1 patches a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lynearm.student.losses.divergences import NOTHING, divergence
from lynearm.student.losses.targets import Targets
from lynearm.student.losses.teacher import LEAST_TAIL, kept_entries, teacher_buckets
from lynearm.student.objective import LossTerm, Objective

_FORWARD_KL = LossTerm("forward-kl")
_FORWARD = ("forward-kl", "sampled-kd")
"""Losses that a teacher's empty tail leaves finite."""


@dataclass(frozen=True, slots=True)
class RowLosses:
    """What came out of some rows, each of shape [R]."""

    loss_R: Tensor
    """Weighted sum of the objective's terms; a position's own weight is not applied."""
    kl_R: Tensor
    """Forward KL at the objective's temperature, whether or not it is a term."""
    cross_entropy_R: Tensor
    """At temperature 1, likewise."""


def row_losses(
    logits_RV: Tensor, targets: Targets, objective: Objective, scale_R: Tensor | None
) -> RowLosses:
    """Losses of each row; overwrites the logits by the gradient of Σ scale · loss.

    Args:
        logits_RV: float32 or float64, not divided by the temperature.
        targets: The teacher's rows.
        objective: The losses.
        scale_R: Weight of each row in the sum; None wants no gradient, and what is left in the logits has no
            meaning.
    """
    if objective.temperature == 1.0:
        weight = objective.cross_entropy_weight
        return _losses_at_once(logits_RV, targets, objective, scale_R, cross_entropy_weight=weight)
    # Two temperatures are two softmaxes.
    warm_RV = logits_RV / objective.temperature
    warm_scale_R = None if scale_R is None else scale_R / objective.temperature
    warm = _losses_at_once(warm_RV, targets, objective, warm_scale_R, cross_entropy_weight=0.0)
    weight = objective.cross_entropy_weight
    cross_entropy_R = _cross_entropy(logits_RV, targets, None if scale_R is None else weight * scale_R)
    if scale_R is not None:
        logits_RV += warm_RV
    return RowLosses(warm.loss_R + weight * cross_entropy_R, warm.kl_R, cross_entropy_R)


def _losses_at_once(
    logits_RV: Tensor,
    targets: Targets,
    objective: Objective,
    scale_R: Tensor | None,
    *,
    cross_entropy_weight: float,
) -> RowLosses:
    """The divergences, and the cross-entropy of the same softmax."""
    vocab_size = logits_RV.shape[1]
    is_kept_RK = kept_entries(targets, vocab_size)
    # An id that is no token here is as good as padding: any id in range will do.
    ids_RK = targets.token_ids_NK.clamp_max(vocab_size - 1)
    sampled_R1 = targets.sampled_ids_N[:, None]
    log_p_RB = teacher_buckets(
        targets,
        is_kept_RK,
        dtype=logits_RV.dtype,
        vocab_size=vocab_size,
        exponent=objective.teacher_temperature / objective.temperature,
    )
    sampled_logit_R = logits_RV.gather(1, sampled_R1)[:, 0]
    standing = None
    if objective.tail_cross_entropy_weight:
        standing = _stand_for_tail(logits_RV, targets, ids_RK, is_kept_RK, log_p_RB[:, -1].exp())
    log_sums_RB = _tail_softmax(logits_RV, ids_RK, is_kept_RK)
    log_total_R = log_sums_RB.logsumexp(1)
    log_q_RB = (log_sums_RB - log_total_R[:, None]).clamp_min(NOTHING)
    cross_entropy_R = log_total_R - sampled_logit_R

    kl_R, kl_slope_RB = divergence(_FORWARD_KL, log_p_RB, log_q_RB)
    loss_R = cross_entropy_weight * cross_entropy_R
    slope_RB = torch.zeros_like(log_q_RB)
    for term in objective.divergences:
        if term.name == "forward-kl":
            value_R, one_slope_RB = kl_R, kl_slope_RB
        else:
            floored_RB = log_p_RB if term.name in _FORWARD else _with_least_tail(log_p_RB, log_q_RB)
            value_R, one_slope_RB = divergence(term, floored_RB, log_q_RB)
        loss_R = loss_R + term.weight * value_R
        slope_RB += term.weight * one_slope_RB
    token_weight_R = torch.full_like(cross_entropy_R, cross_entropy_weight)
    if standing is not None:
        # −log(q(token) / q_0): slope 1 on the tail's bucket, and as much cross-entropy.
        weights_RS = objective.tail_cross_entropy_weight * standing.weights_RS
        gap_RS = torch.where(weights_RS > 0, log_sums_RB[:, -1:] - standing.logits_RS, 0.0)
        loss_R = loss_R + (weights_RS * gap_RS).sum(1)
        slope_RB[:, -1] += weights_RS.sum(1)
        token_weight_R += weights_RS.sum(1)
    if scale_R is not None:
        # A q + g for each bucket.
        grad_RB = (token_weight_R[:, None] - slope_RB.sum(1, keepdim=True)) * log_q_RB.exp() + slope_RB
        grad_RB *= scale_R[:, None]
        logits_RV *= grad_RB[:, -1:]
        logits_RV.scatter_add_(1, ids_RK, torch.where(is_kept_RK, grad_RB[:, :-1], 0.0))
        if cross_entropy_weight:
            logits_RV.scatter_add_(1, sampled_R1, -cross_entropy_weight * scale_R[:, None])
        if standing is not None:
            shares_RS = objective.tail_cross_entropy_weight * scale_R[:, None] * standing.weights_RS
            logits_RV.scatter_add_(1, standing.ids_RS, -shares_RS)
    return RowLosses(loss_R, kl_R, cross_entropy_R)


@dataclass(frozen=True, slots=True)
class _TailTokens:
    """Tokens outside of the rows' entries that show what the tails are made of."""

    ids_RS: Tensor
    """Below V."""
    logits_RS: Tensor
    """The student's."""
    weights_RS: Tensor
    """0 for those that stand for nothing, whatever they are."""


def _stand_for_tail(
    logits_RV: Tensor, targets: Targets, ids_RK: Tensor, is_kept_RK: Tensor, tail_mass_R: Tensor
) -> _TailTokens:
    """What stands for the tails: tokens drawn from them; where there are none, the completion's own.

    Draws share the tail's mass: so the cross-entropy of a tail is weighed in the KL of the whole. The written
    token was drawn from all of the row: it falls into the tail as often as that has mass, and then weighs 1.

    Args:
        logits_RV: The student's.
        targets: The rows. A draw beyond V, from the padding of a teacher's wider head, is none.
        ids_RK: Below V.
        is_kept_RK: Which of them are kept entries.
        tail_mass_R: The teacher's, normalised as its buckets are.
    """
    sampled_R1 = targets.sampled_ids_N[:, None]
    is_kept_R1 = ((ids_RK == sampled_R1) & is_kept_RK).any(1, keepdim=True)
    stands_R1 = ~is_kept_R1 & (targets.tail_mass_N > 0)[:, None]
    if targets.drawn_N is not None:
        stands_R1 &= targets.drawn_N[:, None]
    ids_RS, weights_RS = sampled_R1, stands_R1.to(tail_mass_R.dtype)
    if targets.tail_ids_ND is not None:
        is_draw_RD = (targets.tail_ids_ND >= 0) & (targets.tail_ids_ND < logits_RV.shape[1])
        count_R1 = is_draw_RD.sum(1, keepdim=True)
        share_R1 = tail_mass_R[:, None] / count_R1.clamp_min(1)
        ids_RS = torch.cat((sampled_R1, torch.where(is_draw_RD, targets.tail_ids_ND, 0)), 1)
        weights_RS = torch.cat((weights_RS * (count_R1 == 0), is_draw_RD * share_R1), 1)
    return _TailTokens(ids_RS, logits_RV.gather(1, ids_RS), weights_RS)


def _tail_softmax(logits_RV: Tensor, ids_RK: Tensor, is_kept_RK: Tensor) -> Tensor:
    """Softmax over what is not kept, in place, 0 at the kept entries.

    Returns:
        [R, B]: the kept logits, -inf where padded, and the tail's log-sum-exp, -inf where it is empty.
    """
    kept_RK = torch.where(is_kept_RK, logits_RV.gather(1, ids_RK), -torch.inf)
    # Adding leaves alone what padding points at.
    logits_RV.scatter_add_(1, ids_RK, torch.where(is_kept_RK, -torch.inf, 0.0).to(logits_RV.dtype))
    largest_R = logits_RV.amax(1)
    _softmax_in_place(logits_RV)
    log_tail_R = largest_R - logits_RV.amax(1).log()
    if ids_RK.shape[1] >= logits_RV.shape[1]:
        # Only then may a row keep the whole vocabulary, and its softmax be of nothing.
        is_empty_R = largest_R == -torch.inf
        logits_RV.masked_fill_(is_empty_R[:, None], 0.0)
        log_tail_R = torch.where(is_empty_R, -torch.inf, log_tail_R)
    return torch.cat((kept_RK, log_tail_R[:, None]), 1)


def _cross_entropy(logits_RV: Tensor, targets: Targets, scale_R: Tensor | None) -> Tensor:
    """Cross-entropy of each row, [R]; overwrites the logits by the gradient."""
    sampled_R1 = targets.sampled_ids_N[:, None]
    sampled_R = logits_RV.gather(1, sampled_R1)[:, 0]
    largest_R = logits_RV.amax(1)
    _softmax_in_place(logits_RV)
    log_total_R = largest_R - logits_RV.amax(1).log()
    if scale_R is not None:
        logits_RV *= scale_R[:, None]
        logits_RV.scatter_add_(1, sampled_R1, -scale_R[:, None])
    return log_total_R - sampled_R


def _softmax_in_place(logits_RV: Tensor) -> None:
    # One kernel that goes over a row while it is in the cache; torch has no public spelling of it in place.
    # Of other layouts it would make a copy: those that are laid out the other way round are given as such.
    if logits_RV.T.is_contiguous():
        torch.ops.aten._softmax.out(logits_RV.T, 0, False, out=logits_RV.T)  # pyright: ignore
    else:
        torch.ops.aten._softmax.out(logits_RV, 1, False, out=logits_RV)  # pyright: ignore


def _with_least_tail(log_p_RB: Tensor, log_q_RB: Tensor) -> Tensor:
    least = torch.log(torch.tensor(LEAST_TAIL, dtype=log_p_RB.dtype, device=log_p_RB.device))
    tail_R1 = log_p_RB[:, -1:].maximum(torch.where(log_q_RB[:, -1:] > NOTHING, least, NOTHING))
    return torch.cat((log_p_RB[:, :-1], tail_R1), 1)
