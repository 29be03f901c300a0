"""Losses from hidden states and an output head, in chunks: [N, V] never exists.

Shape legend: N = completion positions, C = positions of one chunk, R = rows of a block of it, H = hidden
width, V = vocabulary, K = entries kept per position.

The gradient of the logits is worked out where the logits were, right after them, and at once multiplied
into the gradients of states and head. So the backward pass costs nothing; what costs is the three matrix
products, and the few times that [C, V] goes through memory. On a CPU, logits of up to H positions are made in
the place of the head's gradient, where that is made anew (see `in_place`): the peak is the gradient itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from lynearm.student.losses.accumulation import check_accumulates
from lynearm.student.losses.in_place import room_for_logits, spread_gradient
from lynearm.student.losses.rows import RowLosses, row_losses
from lynearm.student.losses.targets import Targets
from lynearm.student.objective import Objective
from lynearm.wire.errors import InvalidInputError

CHUNK_BYTES = 80 << 20
"""Logits that exist at once. On two cores, in float32 and 576 wide, every chunk costs 0.04 CPU-seconds more
at 49,152 tokens and 0.1 at 151,936, since each matrix product goes through the whole head: 80 MiB make
three of 1,024 positions and four of 512, within a tenth of what one chunk would cost."""

BLOCK_BYTES = 16 << 20
"""Logits of a chunk that are copied at once where that is needed: to float32, or to another temperature."""

_HEAD_ROWS = 1 << 15
"""Rows of a head whose gradient is made in lower precision and added at once."""


LookAt: TypeAlias = Callable[[Tensor, Targets], None]
"""Is shown logits [C, V], over the tokens that the teacher has too, and their rows; neither changes nor keeps
them."""


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
        gradients = _Gradients(hidden_grad_NH, head_grad_VH, bias_grad_V, is_empty=is_first)
        losses = _run(_Head(hidden_NH, head_VH, bias_V), targets, objective or Objective(), scale, gradients)
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
        head = _Head(hidden_NH.detach(), head_VH.detach(), bias_V)
        losses = _run(head, targets, objective or Objective(), 1.0, None, look_at)
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
        losses = _run(
            _Head(*inputs),
            targets,
            objective,
            scale,
            _Gradients(grads[0], grads[1], grads[2]) if wanted else None,
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


@dataclass(frozen=True, slots=True)
class _Head:
    """States, and the head that makes logits of them."""

    hidden_NH: Tensor
    head_VH: Tensor
    bias_V: Tensor | None


@dataclass(slots=True)
class _Gradients:
    """Where gradients are put: for head and bias, added to what is there unless that is still empty."""

    hidden_NH: Tensor | None
    head_VH: Tensor | None
    bias_V: Tensor | None
    is_empty: bool = True

    def room(self, head: _Head, objective: Objective, vocab_size: int, dtype: torch.dtype) -> Tensor | None:
        """Where the logits may be made as [V, N]: in the head's gradient, still empty.

        None where there is no such place, or where they would be copied to another type or temperature.
        """
        if self.head_VH is None or not self.is_empty or objective.temperature != 1.0:
            return None
        if not self.head_VH.dtype == head.hidden_NH.dtype == dtype == _exact_type(dtype):
            return None
        return room_for_logits(self.head_VH, len(head.hidden_NH), vocab_size)

    def put(self, grad_VN: Tensor, hidden_NH: Tensor, head_VH: Tensor) -> None:
        """All of them, from the gradient of logits that were made in `room`."""
        vocab_size = len(grad_VN)
        if self.bias_V is not None:
            self.bias_V[vocab_size:] = 0.0
            self.bias_V[:vocab_size] = grad_VN.sum(1, dtype=self.bias_V.dtype)
        if self.head_VH is not None:
            spread_gradient(
                grad_VN, hidden_NH, head_VH, head_grad_VH=self.head_VH, hidden_grad_NH=self.hidden_NH
            )
            self.head_VH[vocab_size:] = 0.0
        self.is_empty = False

    def add(self, start: int, grad_CV: Tensor, hidden_CH: Tensor, head_VH: Tensor) -> None:
        """The part of the chunk that begins at `start`; all of one type, head and logits as wide as V."""
        vocab_size = grad_CV.shape[1]
        if self.hidden_NH is not None:
            slot_CH = self.hidden_NH[start : start + len(grad_CV)]
            if slot_CH.dtype == grad_CV.dtype:
                torch.mm(grad_CV, head_VH, out=slot_CH)
            else:
                slot_CH.copy_(grad_CV @ head_VH)
        if self.head_VH is not None:
            if self.is_empty:
                self.head_VH[vocab_size:] = 0.0
            self._add_to_head(self.head_VH[:vocab_size], grad_CV, hidden_CH)
        if self.bias_V is not None:
            if self.is_empty:
                self.bias_V.zero_()
            self.bias_V[:vocab_size] += grad_CV.sum(0, dtype=self.bias_V.dtype)
        self.is_empty = False

    def finish(self) -> None:
        """After the last chunk: without any, the gradients are zero."""
        if self.is_empty:
            for grad in (self.hidden_NH, self.head_VH, self.bias_V):
                if grad is not None:
                    grad.zero_()

    def _add_to_head(self, slot_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
        if slot_VH.dtype == grad_CV.dtype:
            if self.is_empty:
                torch.mm(grad_CV.T, hidden_CH, out=slot_VH)
            else:
                slot_VH.addmm_(grad_CV.T, hidden_CH)
            return
        # A sum over chunks in bfloat16 would lose the smaller ones; the products alone may be rounded.
        for row in range(0, len(slot_VH), _HEAD_ROWS):
            part_VH = grad_CV[:, row : row + _HEAD_ROWS].T @ hidden_CH
            if self.is_empty:
                slot_VH[row : row + _HEAD_ROWS] = part_VH
            else:
                slot_VH[row : row + _HEAD_ROWS] += part_VH


def _run(
    head: _Head,
    targets: Targets,
    objective: Objective,
    scale: float,
    gradients: _Gradients | None,
    look_at: LookAt | None = None,
) -> RowLosses:
    """Losses of all positions, and their gradients; the tensors are not followed by autograd."""
    vocab_size = min(objective.vocab_size or head.head_VH.shape[0], head.head_VH.shape[0])
    device = head.hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.hidden_NH.dtype
    with torch.autocast(device, enabled=False):
        head_VH = head.head_VH[:vocab_size].to(dtype)
        bias_V = None if head.bias_V is None else head.bias_V[:vocab_size].to(dtype)
        room_VN = None if gradients is None else gradients.room(head, objective, vocab_size, dtype)
        narrow = _Head(head.hidden_NH, head_VH, bias_V)
        if gradients is not None and room_VN is not None:
            parts = [_losses_in_place(narrow, room_VN, targets, objective, scale, gradients)]
        else:
            parts = _losses_in_chunks(narrow, targets, objective, scale, gradients, look_at)
    if gradients is not None:
        gradients.finish()
    if not parts:
        nothing = head.hidden_NH.new_zeros(0, dtype=_exact_type(dtype))
        return RowLosses(nothing, nothing, nothing)
    return RowLosses(
        torch.cat([part.loss_R for part in parts]),
        torch.cat([part.kl_R for part in parts]),
        torch.cat([part.cross_entropy_R for part in parts]),
    )


def _losses_in_place(
    head: _Head, room_VN: Tensor, targets: Targets, objective: Objective, scale: float, gradients: _Gradients
) -> RowLosses:
    torch.mm(head.head_VH, head.hidden_NH.T, out=room_VN)
    if head.bias_V is not None:
        room_VN += head.bias_V[:, None]
    losses = row_losses(room_VN.T, targets, objective, _row_scales(targets, scale, room_VN))
    gradients.put(room_VN, head.hidden_NH, head.head_VH)
    return losses


def _losses_in_chunks(
    head: _Head,
    targets: Targets,
    objective: Objective,
    scale: float,
    gradients: _Gradients | None,
    look_at: LookAt | None,
) -> list[RowLosses]:
    parts: list[RowLosses] = []
    dtype = head.head_VH.dtype
    for start, end, logits_CV in _chunks(head.hidden_NH, len(head.head_VH), dtype):
        hidden_CH, rows = head.hidden_NH[start:end].to(dtype), targets.rows(start, end)
        torch.mm(hidden_CH, head.head_VH.T, out=logits_CV)
        if head.bias_V is not None:
            logits_CV += head.bias_V
        if look_at is not None:
            look_at(logits_CV, rows)
        scale_C = None if gradients is None else _row_scales(rows, scale, logits_CV)
        parts += _block_losses(logits_CV, rows, objective, scale_C)
        if gradients is not None:
            gradients.add(start, logits_CV, hidden_CH, head.head_VH)
    return parts


def _chunks(hidden_NH: Tensor, vocab_size: int, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """First and last position of each chunk, and room for its logits, the same memory each time."""
    positions = len(hidden_NH)
    rows = max(1, CHUNK_BYTES // (vocab_size * dtype.itemsize))
    # Chunks of one size: a last one of a few rows would cost as much as a large one.
    rows = -(-positions // -(-positions // rows)) if positions else 0
    buffer_CV = torch.empty((rows, vocab_size), dtype=dtype, device=hidden_NH.device)
    for start in range(0, positions, max(1, rows)):
        end = min(start + rows, positions)
        yield start, end, buffer_CV[: end - start]


def _block_losses(
    logits_CV: Tensor, targets: Targets, objective: Objective, scale_C: Tensor | None
) -> list[RowLosses]:
    """Losses of a chunk, whose logits become their gradient, a block at a time."""
    exact = _exact_type(logits_CV.dtype)
    needs_copy = exact != logits_CV.dtype or objective.temperature != 1.0
    rows = max(1, BLOCK_BYTES // (logits_CV.shape[1] * exact.itemsize)) if needs_copy else len(logits_CV)
    parts: list[RowLosses] = []
    for start in range(0, len(logits_CV), rows):
        block_RV = logits_CV[start : start + rows]
        exact_RV = block_RV.to(exact)
        scale_R = None if scale_C is None else scale_C[start : start + rows]
        parts.append(row_losses(exact_RV, targets.rows(start, start + rows), objective, scale_R))
        if exact_RV is not block_RV and scale_R is not None:
            block_RV.copy_(exact_RV)
    return parts


def _exact_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _row_scales(rows: Targets, scale: float, logits_CV: Tensor) -> Tensor:
    if rows.weights_N is not None:
        return rows.weights_N.to(_exact_type(logits_CV.dtype)) * scale
    return torch.full((len(rows),), scale, dtype=_exact_type(logits_CV.dtype), device=logits_CV.device)


def _weighted_sum(loss_N: Tensor, targets: Targets) -> Tensor:
    return (loss_N if targets.weights_N is None else loss_N * targets.weights_N.to(loss_N.dtype)).sum()


def _total_weight(targets: Targets) -> float:
    total = float(len(targets)) if targets.weights_N is None else float(targets.weights_N.sum())
    return total or 1.0
