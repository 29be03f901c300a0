"""Measures layers while they compute: block influence, what heads put out, and how active neurons are.

Everything is summed on the device, in float64, and leaves it only when it is taken. A head's contribution to
the residual stream is its part of the output projection: the norm of W_h a_h, which is √(a_hᵀ G_h a_h) with
G_h = W_hᵀ W_h made once. That costs a head's width for each of its numbers, and the projection itself the
model's.

Shape legend: B = sampled rows of a step, N = heads, D = width of a head, H = hidden size, F = neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lynearm.teacher.model_layout import ModelLayout
from lynearm.wire.errors import TeacherError
from lynearm.wire.profiles import Float64Array, LayerStatistics

if TYPE_CHECKING:
    from torch import Tensor

Untyped: TypeAlias = Any
"""An object of vLLM, which ships no types that a strict checker accepts."""


class LayerMeters:
    """Sums of all layers of a model; hooks in the projections behind heads and neurons, where there are some.

    Args:
        layout: Of the model.
    """

    def __init__(self, layout: ModelLayout) -> None:
        self.rows: Tensor | None = None
        """Rows to look at; None outside a step that is measured."""
        self._layers = [_LayerMeter(layer, layout) for layer in layout.layers]
        self._handles: list[Untyped] = []
        for meter, layer in zip(self._layers, layout.layers, strict=True):
            if meter.heads:
                self._hook(layer.self_attn.o_proj, meter.see_heads)
            neurons = getattr(getattr(layer, "mlp", None), "down_proj", None)
            if neurons is not None:
                self._hook(neurons, meter.see_neurons)

    def see_layer(self, number: int, before_BH: Tensor, after_BH: Tensor) -> None:
        """The residual stream before a layer and after it."""
        self._layers[number].see_stream(before_BH, after_BH)

    def end_step(self, rows: int) -> None:
        """Keep what was seen of a step, of so many rows."""
        for meter in self._layers:
            meter.end_step(rows)

    def take(self) -> dict[int, LayerStatistics]:
        """The sums since the last call; layers at which nothing was looked are left out."""
        taken = {number: meter.take() for number, meter in enumerate(self._layers)}
        return {number: layer for number, layer in taken.items() if layer is not None}

    def close(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, projection: Untyped, see: Callable[[Tensor], None]) -> None:
        def see_input(_module: Untyped, arguments: Sequence[Untyped]) -> None:
            if self.rows is None:
                return
            given = arguments[0]
            if getattr(given, "ndim", 0) != 2:
                raise TeacherError(
                    f"a projection of the model is given {type(given).__name__}, expected a matrix",
                    "leave out --stats",
                )
            see(given.index_select(0, self.rows).float())

        self._handles.append(projection.register_forward_pre_hook(see_input))


class _LayerMeter:
    """Sums of one layer; those of a step are apart until it is over, since it may fail."""

    def __init__(self, layer: Untyped, layout: ModelLayout) -> None:
        attention = getattr(layer, "self_attn", None)
        projection = getattr(attention, "o_proj", None)
        self.heads = int(getattr(attention, "num_heads", 0)) if projection is not None else 0
        self._grams_NDD = _gram_matrices(projection, self.heads, layout) if self.heads else None
        self._positions = 0
        self._sums: dict[str, Tensor] = {}
        self._step: dict[str, Tensor] = {}

    def see_stream(self, before_BH: Tensor, after_BH: Tensor) -> None:
        from torch.nn.functional import cosine_similarity

        self._step["influence"] = (1 - cosine_similarity(before_BH.double(), after_BH.double(), dim=1)).sum()

    def see_heads(self, outputs_BND: Tensor) -> None:
        rows, width = outputs_BND.shape
        outputs_NBD = outputs_BND.reshape(rows, self.heads, width // self.heads).transpose(0, 1)
        self._step["head_norms"] = outputs_NBD.square().sum(dim=2).sqrt().double().sum(dim=1)
        if self._grams_NDD is not None:
            squares_NB = ((outputs_NBD @ self._grams_NDD) * outputs_NBD).sum(dim=2)
            self._step["head_contributions"] = squares_NB.clamp(min=0).sqrt().double().sum(dim=1)

    def see_neurons(self, activations_BF: Tensor) -> None:
        import torch

        self._step["neurons"] = activations_BF.abs().sum(dim=0, dtype=torch.float64)

    def end_step(self, rows: int) -> None:
        self._positions += rows
        for name, sums in self._step.items():
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._step = {}

    def take(self) -> LayerStatistics | None:
        if not self._positions:
            return None
        sums, positions = self._sums, self._positions
        self._sums, self._positions = {}, 0
        return LayerStatistics(
            positions,
            float(sums["influence"]),
            _to_array(sums.get("head_norms")),
            _to_array(sums.get("head_contributions")),
            _to_array(sums.get("neurons")),
        )


def _gram_matrices(projection: Untyped, heads: int, layout: ModelLayout) -> Tensor:
    """W_hᵀ W_h of each head's part of the output projection, float32, shape [N, D, D].

    The projection is asked what it makes of unit vectors: vLLM keeps its weights in many forms, and some of
    them cannot be read.
    """
    import torch

    width = int(projection.input_size)
    with torch.inference_mode():
        probes = torch.eye(width + 1, width, dtype=layout.dtype, device=layout.device)
        # vLLM's linear layers return the output and a bias that is not added.
        outputs: Tensor = projection.forward(probes)[0].float()
        # The last probe is zero, and its output the bias.
        columns_NDH = (outputs[:-1] - outputs[-1]).reshape(heads, width // heads, -1)
        grams_NDD: Tensor = columns_NDH @ columns_NDH.transpose(1, 2)
        return grams_NDD


def _to_array(sums: Tensor | None) -> Float64Array:
    if sums is None:
        return np.zeros(0)
    return np.asarray(sums.cpu().numpy(), np.float64)
