"""Measures a model on a few sequences: what its layers, heads and neurons do, and how far another is from it.

The same figures as in a teacher profile, by transformers instead of vLLM, for teachers without one.

Shape legend: L = positions of a sequence, P = those that count, N = heads, D = width of a head, H = hidden
size, F = neurons, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lynearm.student.cutting.sequences import CalibrationSequence
from lynearm.student.cutting.shape import read_shape
from lynearm.wire.profiles import LayerStatistics, TeacherProfile


@torch.no_grad()
def measure_profile(
    model: Any, sequences: Sequence[CalibrationSequence], *, name: str, revision: str
) -> TeacherProfile:
    """A teacher profile over the sequences' completion positions.

    Args:
        model: A transformers causal LM in evaluation mode; untyped, since every architecture has its class.
        sequences: One forward pass each.
        name: Of the model.
        revision: Of the model.
    """
    layers = cast("Sequence[nn.Module]", model.base_model.layers)
    meters = [_LayerMeter(layer, read_shape(model.config).head_dim) for layer in layers]
    try:
        for sequence in sequences:
            for meter in meters:
                meter.counted = sequence.counted
            model.base_model(input_ids=torch.tensor([sequence.token_ids]), use_cache=False)
    finally:
        for meter in meters:
            meter.close()
    return TeacherProfile(name, revision, {number: meter.take() for number, meter in enumerate(meters)})


@torch.no_grad()
def mean_kl(teacher: Any, student: Any, sequences: Sequence[CalibrationSequence]) -> float:
    """KL(teacher ‖ student) over the completion positions, nats per position."""
    total, positions = 0.0, 0
    for sequence in sequences:
        input_ids = torch.tensor([sequence.token_ids])
        teacher_PV, student_PV = (
            torch.log_softmax(model(input_ids=input_ids, use_cache=False).logits[0, sequence.counted], -1)
            for model in (teacher, student)
        )
        total += float((teacher_PV.exp() * (teacher_PV - student_PV)).sum())
        positions += len(teacher_PV)
    return total / positions


class _LayerMeter:
    """Sums of one layer, by hooks at its ends and before the projections behind heads and neurons."""

    def __init__(self, layer: Any, head_dim: int) -> None:
        self.counted = slice(0, 0)
        self._head_dim = head_dim
        self._positions = 0
        self._sums: dict[str, Tensor] = {}
        self._handles = [layer.register_forward_hook(self._see_layer)]
        attention = getattr(getattr(layer, "self_attn", None), "o_proj", None)
        if isinstance(attention, nn.Linear):
            columns_NDH = attention.weight.T.reshape(-1, head_dim, attention.out_features)
            self._grams_NDD = columns_NDH @ columns_NDH.transpose(1, 2)
            self._hook(attention, self._see_heads)
        neurons = getattr(getattr(layer, "mlp", None), "down_proj", None)
        if isinstance(neurons, nn.Linear):
            self._hook(neurons, self._see_neurons)

    def take(self) -> LayerStatistics:
        return LayerStatistics(
            self._positions,
            float(self._sums["influence"]),
            *(_to_array(self._sums.get(name)) for name in ("head_norms", "head_contributions", "neurons")),
        )

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, projection: nn.Module, see: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        def see_input(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._add(see(arguments[0][0, self.counted]))

        self._handles.append(projection.register_forward_pre_hook(see_input))

    def _see_layer(self, _module: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
        after = cast(Tensor, output[0] if isinstance(output, tuple) else output)
        before_PH, after_PH = (states[0, self.counted].double() for states in (arguments[0], after))
        self._add({"influence": (1 - torch.cosine_similarity(before_PH, after_PH, dim=1)).sum()})
        self._positions += len(before_PH)

    def _see_heads(self, outputs_PF: Tensor) -> Mapping[str, Tensor]:
        outputs_NPD = outputs_PF.reshape(len(outputs_PF), -1, self._head_dim).transpose(0, 1)
        squares_NP = ((outputs_NPD @ self._grams_NDD) * outputs_NPD).sum(2)
        return {
            "head_norms": outputs_NPD.square().sum(2).sqrt().double().sum(1),
            "head_contributions": squares_NP.clamp(min=0).sqrt().double().sum(1),
        }

    def _see_neurons(self, activations_PF: Tensor) -> Mapping[str, Tensor]:
        return {"neurons": activations_PF.abs().sum(0, dtype=torch.float64)}

    def _add(self, seen: Mapping[str, Tensor]) -> None:
        for name, sums in seen.items():
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums


def _to_array(sums: Tensor | None) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.zeros(0) if sums is None else np.asarray(sums.numpy(), np.float64)
