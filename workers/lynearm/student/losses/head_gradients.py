"""Where the gradients of an output head, its bias and the states before it go, chunk by chunk.

Shape legend: N = completion positions, C = positions of one chunk, H = hidden width, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lynearm.student.losses.in_place import room_for_logits, spread_gradient
from lynearm.student.objective import Objective

_HEAD_ROWS = 1 << 15
"""Rows of a head whose gradient is made in lower precision and added at once."""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """States, and the head that makes logits of them."""

    hidden_NH: Tensor
    head_VH: Tensor
    bias_V: Tensor | None


@dataclass(slots=True)
class HeadGradients:
    """Where gradients are put: for head and bias, added to what is there unless that is still empty."""

    hidden_NH: Tensor | None
    head_VH: Tensor | None
    bias_V: Tensor | None
    is_empty: bool = True

    def room(
        self, head: OutputHead, objective: Objective, vocab_size: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Where the logits may be made as [V, N]: in the head's gradient, still empty.

        None where there is no such place, or where they would be copied to another type or temperature.
        """
        if self.head_VH is None or not self.is_empty or objective.temperature != 1.0:
            return None
        if not self.head_VH.dtype == head.hidden_NH.dtype == dtype == exact_type(dtype):
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


def exact_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which probabilities are computed from logits of `dtype`: float32 or better."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
