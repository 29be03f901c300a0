"""The logits of the first positions in the memory that the head's gradient will take.

Shape legend: C = positions, H = hidden width, V = vocabulary.

A gradient [V, H] that is made anew has to be allocated, and until it is written it is room for the logits of
up to H positions: laid out as [V, C], C ≤ H, they fill the first C/H of it. Row v of the gradient lies at or
behind row v of the logits, and is made of that row alone. So the gradient is written from the last rows to
the first, and nothing is overwritten that is still needed but the rows in hand, which pass through a few
megabytes. The peak of the loss is then the gradient's own size.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_BYTES = 8 << 20
"""Of a gradient that is made elsewhere and put in place at once."""


def room_for_logits(head_grad_VH: Tensor, positions: int, vocab_size: int) -> Tensor | None:
    """A view [V, C] of the memory of a gradient that holds nothing yet, C being at most `positions`.

    None on other devices than the CPU, whose memory a chunk of logits is little of, and where matrix
    products and softmax like other layouts better.
    """
    columns = min(positions, head_grad_VH.shape[1])
    if head_grad_VH.device.type != "cpu" or not head_grad_VH.is_contiguous() or not columns:
        return None
    return head_grad_VH.view(-1)[: vocab_size * columns].view(vocab_size, columns)


def spread_gradient(
    grad_VC: Tensor,
    hidden_CH: Tensor,
    head_VH: Tensor,
    *,
    head_grad_VH: Tensor,
    hidden_grad_CH: Tensor | None,
) -> None:
    """Gradients of head and states from that of the logits, which the head's overwrites.

    Args:
        grad_VC: Of the logits, in the memory of `head_grad_VH`, as `room_for_logits` gave it.
        hidden_CH: The states.
        head_VH: The head, as wide as the logits.
        head_grad_VH: Receives the head's, in its first V rows.
        hidden_grad_CH: Receives the states', if they want one.
    """
    vocab_size, width = head_VH.shape
    columns = len(hidden_CH)
    rows = max(1, min(vocab_size, _ROWS_BYTES // (width * grad_VC.itemsize)))
    part_RH = torch.empty((rows, width), dtype=grad_VC.dtype)
    if hidden_grad_CH is not None:
        hidden_grad_CH.zero_()
    end = vocab_size
    while end:
        # From here on the gradient's rows are behind all of the logits'.
        start = -(-end * columns // width)
        is_clear = end - start >= rows
        start = start if is_clear else max(0, end - rows)
        grad_RC = grad_VC[start:end]
        if hidden_grad_CH is not None:
            hidden_grad_CH.addmm_(grad_RC.T, head_VH[start:end])
        if is_clear:
            torch.mm(grad_RC, hidden_CH, out=head_grad_VH[start:end])
        else:
            head_grad_VH[start:end] = torch.mm(grad_RC, hidden_CH, out=part_RH[: end - start])
        end = start
