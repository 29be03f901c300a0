"""Logits in the memory that the head's gradient will take.

Shape legend: N = positions, H = hidden width, V = vocabulary, R = rows of the head that are in hand.

A gradient [V, H] that is made anew has to be allocated, and until it is written it is room for the logits of
up to H positions: laid out as [V, N], they fill the first N/H of it. Row v of the gradient lies at or behind
row v of the logits, and is made of that row alone. So the gradient is written from the last rows to the
first, as many at once as lie behind all that is still needed; when those become few, some megabytes beside
it. The peak of the loss is then the gradient's own size.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_BYTES = 2 << 20
"""Of the gradient that is made beside its place at once: 910 rows of 576, as fast as more of them."""


def room_for_logits(head_grad_VH: Tensor, positions: int, vocab_size: int) -> Tensor | None:
    """A view [V, N] of the memory of a gradient that holds nothing yet; None if it has not room for it.

    Nor on other devices than the CPU: a chunk of logits is little of their memory, and their kernels go along
    rows.
    """
    if not 0 < positions <= head_grad_VH.shape[1]:
        return None
    if head_grad_VH.device.type != "cpu" or not head_grad_VH.is_contiguous():
        return None
    return head_grad_VH.view(-1)[: vocab_size * positions].view(vocab_size, positions)


def spread_gradient(
    grad_VN: Tensor,
    hidden_NH: Tensor,
    head_VH: Tensor,
    *,
    head_grad_VH: Tensor,
    hidden_grad_NH: Tensor | None,
) -> None:
    """Gradients of head and states from that of the logits, which the head's overwrites.

    Args:
        grad_VN: Of the logits, in the memory of `head_grad_VH`, as `room_for_logits` gave it.
        hidden_NH: The states.
        head_VH: The head, as wide as the logits.
        head_grad_VH: Receives the head's, in its first V rows.
        hidden_grad_NH: Receives the states', if they want one.
    """
    vocab_size, width = head_VH.shape
    positions = len(hidden_NH)
    rows = max(1, min(vocab_size, _ROWS_BYTES // (width * grad_VN.itemsize)))
    part_RH = torch.empty((rows, width), dtype=grad_VN.dtype)
    if hidden_grad_NH is not None:
        hidden_grad_NH.zero_()
    end = vocab_size
    while end:
        # From here on the gradient's rows are behind all of the logits'.
        start = -(-end * positions // width)
        is_clear = end - start >= rows
        start = start if is_clear else max(0, end - rows)
        grad_RN = grad_VN[start:end]
        if hidden_grad_NH is not None:
            hidden_grad_NH.addmm_(grad_RN.T, head_VH[start:end])
        if is_clear:
            torch.mm(grad_RN, hidden_NH, out=head_grad_VH[start:end])
        else:
            head_grad_VH[start:end] = torch.mm(grad_RN, hidden_NH, out=part_RH[: end - start])
        end = start
