"""Losses from hidden states and an output head, in chunks: [N, V] never exists.

Shape legend: N = completion positions, C = positions of one chunk, H = hidden width, V = vocabulary.

The gradient of the logits is worked out where the logits were, right after them, and at once multiplied
into the gradients of states and head. So the backward pass costs nothing; what costs is the three matrix
products, and the few times that [C, V] goes through memory. On a CPU, logits of up to H positions are made in
the place of the head's gradient, where that is made anew (see `in_place`): the peak is the gradient itself.
What happens to the logits is in `logit_chunks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from lynearm.student.losses.accumulation import check_accumulates
from lynearm.student.losses.head_gradients import HeadGradients, OutputHead
from lynearm.student.losses.logit_chunks import LookAt, head_losses
from lynearm.student.losses.targets import Targets
from lynearm.student.objective import Objective
from lynearm.wire.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """The loss of N positions and its parts."""

    loss: Tensor
    """Scalar, differentiable: the weighted sum over the positions, divided by `divisor`."""
    loss_N: Tensor
    """The objective's sum of terms at each position, without the position's weight; not differentiable."""
    kl_N: Tensor
    """Forward KL over kept entries and tail at the objective's temperature, nats; not differentiable."""
    cross_entropy_N: Tensor
    """Minus log q of the sampled token at temperature 1, nats; not differentiable."""


def distillation_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets: Targets,
    *,
    bias_V: Tensor | None = None,
    objective: Objective | None = None,
    divisor: float | None = None,
) -> DistillationLoss:
    """The objective of hidden states under an output head.

    Gradients reach `hidden_NH`, `head_VH` and `bias_V`, those of them that require one. They are worked
    out in the forward pass, so that a backward pass can run once. Logits are made in the type that autocast
    says, else in that of the states; everything about probabilities is float32 or better.

    Args:
        hidden_NH: The states that the head is applied to.
        head_VH: Weight of the output head.
        targets: The teacher's rows.
        bias_V: Bias of the output head.
        objective: What is summed; forward KL if not given.
        divisor: What the sum is divided by; if not given, the sum of the positions' weights. A step of
            several calls gives its total.
    """
    wanted = objective or Objective()
    scale = 1.0 / (divisor if divisor is not None else _total_weight(targets))
    return DistillationLoss(*_apply_eagerly(hidden_NH, head_VH, bias_V, targets, wanted, scale))


def backpropagate_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets: Targets,
    *,
    bias_V: Tensor | None = None,
    objective: Objective | None = None,
    divisor: float | None = None,
    beside: Tensor | None = None,
) -> DistillationLoss:
    """`distillation_loss` and its backward pass in one.

    Gradients of head and bias are added to their `.grad` chunk by chunk, where autograd would first make
    another [V, H] in every micro-batch and then add it. Both are one call, since a loss that is to be scaled
    by what comes after it would have to keep its gradients, or to compute the logits again. Gradients of a
    step's first micro-batch are bit by bit those of `distillation_loss`; sums over several are rounded
    in another order. Hooks of a head that is not tied do not run: under DDP, this is for the micro-batches
    within `no_sync`, of which it then reduces the sum.

    Args:
        hidden_NH: As there.
        head_VH: As there; a leaf.
        targets: As there.
        bias_V: As there; a leaf.
        objective: As there.
        divisor: As there.
        beside: A scalar of the same graph, whose gradients are made in the same pass through it.

    Returns:
        As there, without `beside`; `loss` is not differentiable any more.

    Raises:
        InvalidInputError: if head or bias are no plain leaves, as `check_accumulates` says; nothing was done.
    """
    leaves = [leaf for leaf in (head_VH, bias_V) if leaf is not None and leaf.requires_grad]
    for leaf in leaves:
        check_accumulates(leaf)
    scale = 1.0 / (divisor if divisor is not None else _total_weight(targets))
    with torch.no_grad():
        is_first = all(leaf.grad is None for leaf in leaves)
        for leaf in leaves:
            if leaf.grad is None:
                leaf.grad = torch.empty_like(leaf) if is_first else torch.zeros_like(leaf)
        hidden_grad_NH = torch.empty_like(hidden_NH) if hidden_NH.requires_grad else None
        bias_grad_V = bias_V.grad if bias_V is not None and bias_V.requires_grad else None
        head_grad_VH = head_VH.grad if head_VH.requires_grad else None
        gradients = HeadGradients(hidden_grad_NH, head_grad_VH, bias_grad_V, is_empty=is_first)
        losses = head_losses(
            OutputHead(hidden_NH, head_VH, bias_V), targets, objective or Objective(), scale, gradients
        )
        loss = _weighted_sum(losses.loss_R, targets) * scale
    roots = [
        (root, gradient)
        for root, gradient in ((hidden_NH, hidden_grad_NH), (beside, None))
        if root is not None and root.requires_grad
    ]
    if roots:
        torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
    return DistillationLoss(loss, losses.loss_R, losses.kl_R, losses.cross_entropy_R)


def measure_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets: Targets,
    *,
    bias_V: Tensor | None = None,
    objective: Objective | None = None,
    look_at: LookAt | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward KL and cross-entropy per position, shape [N] each, without gradients.

    Args:
        hidden_NH: The states that the head is applied to.
        head_VH: Weight of the output head.
        targets: The teacher's rows.
        bias_V: Bias of the output head.
        objective: Says the temperature of the KL; 1 if not given.
        look_at: Shown the logits of each chunk, at temperature 1, so that the head is applied once for all
            that is measured.
    """
    with torch.no_grad():
        head = OutputHead(hidden_NH.detach(), head_VH.detach(), bias_V)
        losses = head_losses(head, targets, objective or Objective(), 1.0, None, look_at)
    return losses.kl_R, losses.cross_entropy_R


_Apply: TypeAlias = Callable[
    [Tensor, Tensor, Tensor | None, Targets, Objective, float], tuple[Tensor, Tensor, Tensor, Tensor]
]


class _HeadLoss(torch.autograd.Function):
    """Loss with the gradient of the logits formed in the forward pass; see `distillation_loss`."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares it as (*args, **kwargs)
        ctx: Any,  # torch's context takes attributes
        hidden_NH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        targets: Targets,
        objective: Objective,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (hidden_NH, head_VH, bias_V)
        grads = [
            torch.empty_like(tensor) if needed and tensor is not None else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        wanted = any(grad is not None for grad in grads)
        losses = head_losses(
            OutputHead(*inputs),
            targets,
            objective,
            scale,
            HeadGradients(grads[0], grads[1], grads[2]) if wanted else None,
        )
        # Not save_for_backward: the gradients are handed over as they are, not copied, and so only once.
        ctx.grads = grads
        parts = (losses.loss_R, losses.kl_R, losses.cross_entropy_R)
        ctx.mark_non_differentiable(*parts)
        return _weighted_sum(losses.loss_R, targets) * scale, *parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares it as (*args)
        ctx: Any,  # torch's context takes attributes
        grad_loss: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        grads = cast("list[Tensor | None] | None", ctx.grads)
        if grads is None:
            raise InvalidInputError(
                "the backward pass of this loss ran already", "compute the loss again for another one"
            )
        ctx.grads = None
        # On a CPU a look at the number is free, and spares another pass over [V, H].
        if grad_loss.device.type != "cpu" or float(grad_loss) != 1.0:
            for grad in grads:
                if grad is not None:
                    grad *= grad_loss.to(grad.dtype)
        return grads[0], grads[1], grads[2], None, None, None


# A loop over chunks that writes in place: torch.compile would unroll it, and gain nothing. Disabling
# imports the compiler, a second and 100 MB, which any of torch's optimizers does too.
_apply_eagerly = cast(
    _Apply,
    torch.compiler.disable(_HeadLoss.apply),  # type: ignore[no-untyped-call]  # pyright: ignore[reportUnknownMemberType]
)


def _weighted_sum(loss_N: Tensor, targets: Targets) -> Tensor:
    return (loss_N if targets.weights_N is None else loss_N * targets.weights_N.to(loss_N.dtype)).sum()


def _total_weight(targets: Targets) -> float:
    total = float(len(targets)) if targets.weights_N is None else float(targets.weights_N.sum())
    return total or 1.0
