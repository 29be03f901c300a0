"""The losses again, a row at a time over the whole vocabulary, by plain autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lynearm.student.losses import Targets
from lynearm.student.losses.teacher import LEAST_TAIL
from lynearm.student.objective import LossTerm, Objective

# N = positions, H = width, V = vocabulary, K = kept entries, B = buckets
HIDDEN, VOCAB = 6, 23

EVERY_LOSS = (
    LossTerm("forward-kl"),
    LossTerm("reverse-kl"),
    LossTerm("jsd", mix=0.5),
    LossTerm("jsd", mix=0.1),
    LossTerm("skew-kl", mix=0.1),
    LossTerm("skew-reverse-kl", mix=0.1),
    LossTerm("sampled-kd"),
    LossTerm("cross-entropy"),
    LossTerm("tail-cross-entropy"),
)


@dataclass
class Case:
    hidden_NH: Tensor
    head_VH: Tensor
    bias_V: Tensor
    targets: Targets

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden_NH, self.head_VH, self.bias_V]


def make_case(
    positions: int = 9, k: int = 4, *, padded: bool = True, seed: int = 0, sure: float = 1.0
) -> Case:
    """Random rows; every second one keeps an entry less, and with k of `VOCAB` some have no tail."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_NV = torch.log_softmax(2 * random(positions, VOCAB), -1)
    logprobs_NK, token_ids_NK = teacher_NV.topk(k, -1)
    if padded and k > 1:
        logprobs_NK[::2, -1] = -torch.inf
        token_ids_NK[::2, -1] = 0
    tail_N = (1 - logprobs_NK.exp().sum(-1)).clamp(0, 1)
    if k == VOCAB:
        tail_N[1::2] = 0.0
    sampled_N = torch.randint(0, VOCAB, (positions,), generator=generator)
    if k and positions:
        sampled_N[0] = token_ids_NK[0, 0]
    return Case(
        (sure * random(positions, HIDDEN)).requires_grad_(),
        random(VOCAB, HIDDEN).requires_grad_(),
        random(VOCAB).requires_grad_(),
        Targets(token_ids_NK, logprobs_NK, tail_N, sampled_N),
    )


def dense_loss(case: Case, objective: Objective, divisor: float) -> Tensor:
    """The weighted sum of all rows."""
    logits_NV = case.hidden_NH @ case.head_VH.T + case.bias_V
    logits_NV = logits_NV[:, : objective.vocab_size or None]
    total = 0.0 * sum((leaf.sum() for leaf in case.leaves), logits_NV.new_zeros(()))
    for row, logits_V in enumerate(logits_NV):
        weight = 1.0 if case.targets.weights_N is None else float(case.targets.weights_N[row])
        for term in objective.terms:
            total = total + weight * term.weight * dense_row(logits_V, case.targets, row, term, objective)
    return total / divisor


def dense_row(logits_V: Tensor, targets: Targets, row: int, term: LossTerm, objective: Objective) -> Tensor:
    if term.name == "cross-entropy":
        return -torch.log_softmax(logits_V, 0)[targets.sampled_ids_N[row]]
    kept = (targets.logprobs_NK[row] > -torch.inf) & (targets.token_ids_NK[row] < len(logits_V))
    ids = targets.token_ids_NK[row][kept]
    teacher_B = torch.cat([targets.logprobs_NK[row][kept].exp(), targets.tail_mass_N[row][None]])
    if float(teacher_B.sum()) == 0.0:
        return logits_V.sum() * 0.0
    student_V = torch.softmax(logits_V / objective.temperature, 0)
    outside = torch.ones(len(logits_V), dtype=torch.bool)
    outside[ids] = False
    if term.name == "tail-cross-entropy":
        drawn = () if targets.tail_ids_ND is None else targets.tail_ids_ND[row].tolist()
        drawn = [token for token in drawn if 0 <= token < len(logits_V)]
        if drawn:
            tail_mass = targets.tail_mass_N[row] / teacher_B.sum()
            return -tail_mass * (student_V[drawn] / student_V[outside].sum()).log().mean()
        token = targets.sampled_ids_N[row]
        is_draw = targets.drawn_N is None or bool(targets.drawn_N[row])
        if not is_draw or not outside[token] or not targets.tail_mass_N[row]:
            return logits_V.sum() * 0.0
        return -(student_V[token] / student_V[outside].sum()).log()
    student_B = torch.cat([student_V[ids], student_V[outside].sum()[None]])
    return dense_divergence(teacher_B / teacher_B.sum(), student_B, term, has_tail=bool(outside.any()))


def dense_divergence(p_B: Tensor, q_B: Tensor, term: LossTerm, *, has_tail: bool) -> Tensor:
    def kl(left_B: Tensor, right_B: Tensor) -> Tensor:
        present = left_B > 0
        return (left_B[present] * (left_B[present].log() - right_B[present].log())).sum()

    if term.name == "forward-kl":
        return kl(p_B, q_B)
    if term.name == "sampled-kd":
        present = p_B > 0
        return -(p_B[present] * q_B[present].log()).sum()
    if has_tail:
        p_B = torch.cat([p_B[:-1], p_B[-1:].clamp_min(LEAST_TAIL)])
    else:
        p_B, q_B = p_B[:-1], q_B[:-1]
    if term.name == "reverse-kl":
        return kl(q_B, p_B)
    if term.name == "jsd":
        m_B = term.mix * p_B + (1 - term.mix) * q_B
        return term.mix * kl(p_B, m_B) + (1 - term.mix) * kl(q_B, m_B)
    if term.name == "skew-kl":
        return kl(p_B, term.mix * p_B + (1 - term.mix) * q_B)
    assert term.name == "skew-reverse-kl"
    return kl(q_B, (1 - term.mix) * p_B + term.mix * q_B)


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(leaves)))


def is_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors) and not any(
        math.isnan(float(tensor.sum())) for tensor in tensors
    )
