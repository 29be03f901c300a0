"""The losses of all positions under an output head, from logits of which a few megabytes exist at a time.

Shape legend: N = completion positions, C = positions of one chunk, R = rows of a block of it, H = hidden
width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from lynearm.student.losses.head_gradients import HeadGradients, OutputHead, exact_type
from lynearm.student.losses.rows import RowLosses, row_losses
from lynearm.student.losses.targets import Targets
from lynearm.student.objective import Objective

CHUNK_BYTES = 80 << 20
"""Logits that exist at once. On two cores, in float32 and 576 wide, every chunk costs 0.04 CPU-seconds more
at 49,152 tokens and 0.1 at 151,936, since each matrix product goes through the whole head: 80 MiB make
three of 1,024 positions and four of 512, within a tenth of what one chunk would cost."""

BLOCK_BYTES = 16 << 20
"""Logits of a chunk that are copied at once where that is needed: to float32, or to another temperature."""


LookAt: TypeAlias = Callable[[Tensor, Targets], None]
"""Is shown logits [C, V], over the tokens that the teacher has too, and their rows; neither changes nor keeps
them."""


def head_losses(
    head: OutputHead,
    targets: Targets,
    objective: Objective,
    scale: float,
    gradients: HeadGradients | None,
    look_at: LookAt | None = None,
) -> RowLosses:
    """Losses of all positions, and their gradients; the tensors are not followed by autograd.

    Args:
        head: States and head; logits are made in the type that autocast says, else in that of the states.
        targets: The teacher's rows.
        objective: What is summed.
        scale: What the gradients are multiplied with, beside the positions' weights.
        gradients: Where they are put; without, there are none.
        look_at: Shown the logits of each chunk. Only without `gradients`, which may need their room.
    """
    vocab_size = min(objective.vocab_size or head.head_VH.shape[0], head.head_VH.shape[0])
    device = head.hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.hidden_NH.dtype
    with torch.autocast(device, enabled=False):
        head_VH = head.head_VH[:vocab_size].to(dtype)
        bias_V = None if head.bias_V is None else head.bias_V[:vocab_size].to(dtype)
        room_VN = None if gradients is None else gradients.room(head, objective, vocab_size, dtype)
        narrow = OutputHead(head.hidden_NH, head_VH, bias_V)
        if gradients is not None and room_VN is not None:
            parts = [_losses_in_place(narrow, room_VN, targets, objective, scale, gradients)]
        else:
            parts = _losses_in_chunks(narrow, targets, objective, scale, gradients, look_at)
    if gradients is not None:
        gradients.finish()
    if not parts:
        nothing = head.hidden_NH.new_zeros(0, dtype=exact_type(dtype))
        return RowLosses(nothing, nothing, nothing)
    return RowLosses(
        torch.cat([part.loss_R for part in parts]),
        torch.cat([part.kl_R for part in parts]),
        torch.cat([part.cross_entropy_R for part in parts]),
    )


def _losses_in_place(
    head: OutputHead,
    room_VN: Tensor,
    targets: Targets,
    objective: Objective,
    scale: float,
    gradients: HeadGradients,
) -> RowLosses:
    torch.mm(head.head_VH, head.hidden_NH.T, out=room_VN)
    if head.bias_V is not None:
        room_VN += head.bias_V[:, None]
    losses = row_losses(room_VN.T, targets, objective, _row_scales(targets, scale, room_VN))
    gradients.put(room_VN, head.hidden_NH, head.head_VH)
    return losses


def _losses_in_chunks(
    head: OutputHead,
    targets: Targets,
    objective: Objective,
    scale: float,
    gradients: HeadGradients | None,
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
    exact = exact_type(logits_CV.dtype)
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


def _row_scales(rows: Targets, scale: float, logits_CV: Tensor) -> Tensor:
    if rows.weights_N is not None:
        return rows.weights_N.to(exact_type(logits_CV.dtype)) * scale
    return torch.full((len(rows),), scale, dtype=exact_type(logits_CV.dtype), device=logits_CV.device)
