"""The teacher's hidden states that a loss compares, out of the traces of a batch.

Shape legend: N = completion positions, S = layers that are compared, H = their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lynearm.wire.errors import MisalignmentError
from lynearm.wire.hidden import HiddenStates, Layer
from lynearm.wire.traces import Trace


@dataclass(frozen=True, slots=True)
class WantedStates:
    """Which hidden states a loss compares."""

    layers: tuple[Layer, ...]
    """S; ascending, the final norm last."""
    hidden_size: int
    """H."""

    def check(self, trace: Trace) -> HiddenStates:
        """The states of a trace, which hold those that are wanted.

        Raises:
            MisalignmentError: if they do not.
        """
        hidden = trace.hidden
        if hidden is None or hidden.hidden_size != self.hidden_size or set(self.layers) - set(hidden.layers):
            found = (
                "none" if hidden is None else f"those of layers {hidden.layers}, {hidden.hidden_size} wide"
            )
            raise MisalignmentError(
                f"the loss compares hidden states of layers {self.layers}, {self.hidden_size} wide; the "
                f"trace of prompt {trace.prompt_id!r} carries {found}",
                "capture the stream again with them, or train without the hidden terms of the loss",
            )
        return hidden

    def gather(self, traces: Sequence[Trace], counts: Sequence[int]) -> Tensor:
        """The first states of each trace, end to end: [N, S, H], float32.

        Args:
            traces: Whose states to take.
            counts: How many completion positions of each.

        Raises:
            MisalignmentError: as `check`.
        """
        parts: list[np.ndarray] = []
        for trace, count in zip(traces, counts, strict=True):
            hidden = self.check(trace)
            rows = [hidden.layers.index(layer) for layer in self.layers]
            scales = None if hidden.scales is None else hidden.scales[rows, :count]
            taken = HiddenStates(self.layers, hidden.dtype, hidden.values[rows, :count], scales)
            parts.append(taken.to_float32().swapaxes(0, 1))
        return torch.as_tensor(np.concatenate(parts))
