"""Which channels of the residual stream a student keeps, and what that does to its norms.

Channels count by what the norms put out in them, as in Minitron (arXiv:2407.14679): the stream itself has a
few very large channels, which the norms' weights make small.

Leaving channels out changes what an RMSNorm divides by: the root of the mean square, over fewer channels now.
Each norm's weight is multiplied by how much larger that root has become, in the mean over the calibration
positions, so that what is kept has the size that it had. Without channels that were all zero, the student
computes exactly what the teacher does, but for the rounding and for the norm's epsilon.

Shape legend: P = positions that count, H = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lynearm.student.cutting.sequences import CalibrationSequence
from lynearm.student.cutting.width import choose_units
from lynearm.wire.errors import CheckpointError

PLAIN_NORM_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Model types whose norms are RMSNorms that multiply by their weight, and whose embeddings and residual
branches are not scaled by a function of the hidden size."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Those that are kept, of all layers."""

    kept: tuple[int, ...]
    norm_scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """What each norm's weight is multiplied by, by the module's name below the base model."""


@torch.no_grad()
def choose_channels(model: Any, sequences: Sequence[CalibrationSequence], count: int) -> Channels:
    """The `count` channels of most importance.

    Args:
        model: A transformers causal LM in evaluation mode; untyped, since every architecture has its class.
        sequences: One forward pass each.
        count: At most the hidden size.

    Raises:
        CheckpointError: if the model's norms may not be plain RMSNorms.
    """
    if model.config.model_type not in PLAIN_NORM_TYPES:
        raise CheckpointError(
            f"model type {model.config.model_type!r}: its norms, embeddings or branches may depend on the "
            "hidden size",
            f"leave hidden_size as it is; it can be cut of {', '.join(PLAIN_NORM_TYPES)}",
        )
    hidden_size = int(model.config.hidden_size)
    modules = cast("Iterable[tuple[str, nn.Module]]", model.base_model.named_modules())
    meters = {
        name: _NormMeter(module)
        for name, module in modules
        if (weight := getattr(module, "weight", None)) is not None and weight.shape == (hidden_size,)
    }
    try:
        for sequence in sequences:
            for meter in meters.values():
                meter.counted = sequence.counted
            model.base_model(input_ids=torch.tensor([sequence.token_ids]), use_cache=False)
    finally:
        for meter in meters.values():
            meter.handle.remove()
    importance_H = torch.stack([meter.sizes_H for meter in meters.values()]).sum(0)
    kept = choose_units(importance_H.numpy(), count)
    return Channels(kept, {name: meter.scale(kept) for name, meter in meters.items()})


class _NormMeter:
    """Sums at one norm: the sizes of what it puts out, and the parts that channels have in what goes in."""

    def __init__(self, norm: nn.Module) -> None:
        self.counted = slice(0, 0)
        self.sizes_H: Tensor = torch.zeros(())
        self._energy_H: Tensor = torch.zeros(())
        self.handle = norm.register_forward_hook(self._see)

    def scale(self, kept: Sequence[int]) -> float:
        """Root mean square over the kept channels, over that of all."""
        kept_mean = float(self._energy_H[list(kept)].mean())
        return math.sqrt(kept_mean / float(self._energy_H.mean()))

    def _see(self, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        squares_PH = arguments[0][0, self.counted].double().square()
        self._energy_H = self._energy_H + (squares_PH / squares_PH.sum(1, keepdim=True)).sum(0)
        self.sizes_H = self.sizes_H + output[0, self.counted].double().abs().sum(0)
