"""Forward KL to the teacher's kept entries and tail, mixed with cross-entropy, from hidden states.

Shape legend: N = completion positions, C = positions of one chunk, H = hidden width, V = vocabulary,
K = entries kept per position. Probabilities are natural; every logarithm is to base e.

The teacher keeps K entries p_1..p_K of a row and one tail mass p_0 for all other tokens. The student's
q_1..q_K are its softmax at the same ids, and q_0 is the sum of its softmax everywhere else:

    KL = Σ_{k=0..K} p_k (log p_k − log q_k)

Its derivative by logit z_j, with the p summing to one:

    q_j − p_j                  for a kept j
    q_j − p_0 · q_j / q_0      for any other j

q_0 is summed over the entries outside the kept set, never taken as 1 − Σ q_k, which cancels when the
student is sure. So the whole step is one exponential over [C, V] in place, whose result, scaled by two
numbers per row and patched at K + 1 entries, is also the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

CHUNK_POSITIONS = 256
"""Positions whose logits exist at once: 50 MB at a vocabulary of 49,152 in float32."""


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
        )

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets(
            self.token_ids_NK.to(device),
            self.logprobs_NK.to(device),
            self.tail_mass_N.to(device),
            self.sampled_ids_N.to(device),
        )


@dataclass(frozen=True, slots=True)
class LossWeights:
    """How the two losses are mixed, per position."""

    kd: float = 1.0
    cross_entropy: float = 0.0


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """The loss of N positions and its parts."""

    loss: Tensor
    """Scalar, differentiable: the weighted sum over the positions, divided by `divisor`."""
    kl_N: Tensor
    """KL over kept entries and tail, nats; not differentiable."""
    cross_entropy_N: Tensor
    """Minus log q of the sampled token, nats; not differentiable."""


def distillation_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets: Targets,
    *,
    bias_V: Tensor | None = None,
    weights: LossWeights | None = None,
    divisor: float | None = None,
) -> DistillationLoss:
    """Weighted KL and cross-entropy of hidden states under an output head.

    Gradients reach `hidden_NH`, `head_VH` and `bias_V`, those of them that require one. They are worked
    out in the forward pass, chunk by chunk, so the backward pass costs nothing and [N, V] never exists.

    Args:
        hidden_NH: The states that the head is applied to.
        head_VH: Weight of the output head.
        targets: The teacher's rows.
        bias_V: Bias of the output head.
        weights: How the losses are mixed; KL alone if not given.
        divisor: What the sum is divided by; N if not given. A step of several calls gives its total.
    """
    mixed = weights or LossWeights()
    scale = 1.0 / (divisor if divisor is not None else max(1, len(targets)))
    scaled = LossWeights(mixed.kd * scale, mixed.cross_entropy * scale)
    apply = cast(_Apply, _HeadDistillation.apply)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
    return DistillationLoss(*apply(hidden_NH, head_VH, bias_V, targets, scaled))


def measure_loss(
    hidden_NH: Tensor, head_VH: Tensor, targets: Targets, *, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """KL and cross-entropy per position, shape [N] each, without gradients."""
    parts: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for start in range(0, len(targets), CHUNK_POSITIONS):
            rows = targets.rows(start, start + CHUNK_POSITIONS)
            logits_CV = _head_logits(hidden_NH[start : start + CHUNK_POSITIONS], head_VH, bias_V)
            parts.append(_losses_in_place(logits_CV, rows, None))
    if not parts:
        return hidden_NH.new_zeros(0), hidden_NH.new_zeros(0)
    kl_N, cross_entropy_N = zip(*parts, strict=True)
    return torch.cat(kl_N), torch.cat(cross_entropy_N)


_Apply: TypeAlias = Callable[
    [Tensor, Tensor, Tensor | None, Targets, LossWeights], tuple[Tensor, Tensor, Tensor]
]


class _HeadDistillation(torch.autograd.Function):
    """Loss with the gradient of the logits formed in the forward pass; see `distillation_loss`."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares it as (*args, **kwargs)
        ctx: Any,  # torch's context takes attributes
        hidden_NH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        targets: Targets,
        weights: LossWeights,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_NH = torch.zeros_like(hidden_NH) if needs_hidden else None
        grad_head_VH = torch.zeros_like(head_VH) if needs_head else None
        grad_bias_V = torch.zeros_like(bias_V) if needs_bias and bias_V is not None else None
        parts: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(targets), CHUNK_POSITIONS):
            rows = targets.rows(start, start + CHUNK_POSITIONS)
            hidden_CH = hidden_NH[start : start + CHUNK_POSITIONS]
            logits_CV = _head_logits(hidden_CH, head_VH, bias_V)
            parts.append(_losses_in_place(logits_CV, rows, weights))
            grad_CV = logits_CV.to(hidden_CH.dtype)
            if grad_hidden_NH is not None:
                torch.mm(
                    grad_CV, head_VH.to(grad_CV.dtype), out=grad_hidden_NH[start : start + CHUNK_POSITIONS]
                )
            if grad_head_VH is not None:
                grad_head_VH.addmm_(grad_CV.to(head_VH.dtype).T, hidden_CH.to(head_VH.dtype))
            if grad_bias_V is not None:
                grad_bias_V += logits_CV.sum(0).to(grad_bias_V.dtype)
        ctx.save_for_backward(grad_hidden_NH, grad_head_VH, grad_bias_V)
        kl_N = torch.cat([kl for kl, _ in parts]) if parts else hidden_NH.new_zeros(0)
        cross_entropy_N = torch.cat([ce for _, ce in parts]) if parts else hidden_NH.new_zeros(0)
        ctx.mark_non_differentiable(kl_N, cross_entropy_N)
        return weights.kd * kl_N.sum() + weights.cross_entropy * cross_entropy_N.sum(), kl_N, cross_entropy_N

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares it as (*args)
        ctx: Any,  # torch's context takes attributes
        grad_loss: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        grads = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors]
        return grads[0], grads[1], grads[2], None, None


def _head_logits(hidden_CH: Tensor, head_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits in float32 or better, in memory of their own."""
    logits_CV = hidden_CH @ head_VH.to(hidden_CH.dtype).T
    if bias_V is not None:
        logits_CV += bias_V.to(logits_CV.dtype)
    return logits_CV.float() if logits_CV.dtype in (torch.bfloat16, torch.float16) else logits_CV


def _losses_in_place(
    logits_CV: Tensor, targets: Targets, weights: LossWeights | None
) -> tuple[Tensor, Tensor]:
    """KL and cross-entropy per row; overwrites the logits by the gradient of the weighted sum.

    Without weights, what is left in `logits_CV` has no meaning.
    """
    ids_CK, sampled_C1 = targets.token_ids_NK, targets.sampled_ids_N[:, None]
    kept_CK, tail_C, log_kept_CK, log_tail_C = _teacher_distribution(targets, logits_CV.dtype)

    sampled_logit_C = logits_CV.gather(1, sampled_C1)[:, 0]
    kept_logits_CK = logits_CV.gather(1, ids_CK)
    max_C1 = logits_CV.amax(1, keepdim=True)
    exp_CV = logits_CV.sub_(max_C1).exp_()
    is_kept_CK = targets.logprobs_NK > -torch.inf
    kept_exp_CK = exp_CV.gather(1, ids_CK) * is_kept_CK
    exp_CV.scatter_add_(1, ids_CK, -kept_exp_CK)  # exactly zero at kept entries: x + (−x)
    tail_exp_C = exp_CV.sum(1)
    total_C = tail_exp_C + kept_exp_CK.sum(1)

    log_total_C = total_C.log() + max_C1[:, 0]
    smallest = torch.finfo(exp_CV.dtype).tiny
    student_log_tail_C = tail_exp_C.clamp_min(smallest).log() - total_C.log()
    gap_CK = torch.where(is_kept_CK, log_kept_CK - (kept_logits_CK - log_total_C[:, None]), 0.0)
    kl_C = (kept_CK * gap_CK).sum(1) + torch.where(
        tail_C > 0, tail_C * (log_tail_C - student_log_tail_C), 0.0
    )
    cross_entropy_C = log_total_C - sampled_logit_C
    if weights is not None:
        tail_scale_C = (
            weights.kd + weights.cross_entropy
        ) / total_C - weights.kd * tail_C / tail_exp_C.clamp_min(smallest)
        exp_CV *= tail_scale_C[:, None]
        kept_grad_CK = (weights.kd + weights.cross_entropy) * kept_exp_CK / total_C[
            :, None
        ] - weights.kd * kept_CK
        exp_CV.scatter_add_(1, ids_CK, kept_grad_CK)
        exp_CV.scatter_add_(1, sampled_C1, torch.full_like(total_C, -weights.cross_entropy)[:, None])
    return kl_C, cross_entropy_C


def _teacher_distribution(targets: Targets, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kept probabilities [C, K], tail [C] and their logs, summing to one.

    Rounding, in the teacher's normaliser and in the codec, leaves sums up to 1e-4 above or below one:
    without normalising, a student equal to its teacher would have a KL that is not zero, or below it.
    """
    kept_CK = targets.logprobs_NK.to(dtype).exp()
    tail_C = targets.tail_mass_N.to(dtype).clamp(0.0, 1.0)
    log_sum_C = (kept_CK.sum(1) + tail_C).clamp_min(torch.finfo(dtype).tiny).log()
    log_kept_CK = targets.logprobs_NK.to(dtype) - log_sum_C[:, None]
    log_tail_C = tail_C.log() - log_sum_C
    return log_kept_CK.exp(), log_tail_C.exp(), log_kept_CK, log_tail_C
