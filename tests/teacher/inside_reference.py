"""What transformers finds inside a model, for tests: states, and what layers do, at completion positions.

Shape legend: L = layers, T = completion positions, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """Of one completion; prediction positions."""

    streams: Float64Array
    """The residual stream before the first layer and after each, shape [L + 1, T, H]."""
    normed: Float64Array
    """What the final norm puts out, shape [T, H]."""
    heads: Float64Array
    """What each head puts out, shape [L, T, heads, width]."""
    added: Float64Array
    """What each head adds to the residual stream, shape [L, T, heads, H]."""
    neurons: Float64Array
    """Activations, shape [L, T, neurons]."""


class ReferenceModel:
    """A model in transformers, with the modules that matter watched."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._seen: dict[tuple[str, int], Any] = {}
        self.heads = int(self._model.config.num_attention_heads)
        for number, layer in enumerate(self._model.model.layers):
            layer.register_forward_pre_hook(self._keep("stream", number), with_kwargs=True)
            layer.self_attn.o_proj.register_forward_pre_hook(self._keep("heads", number), with_kwargs=True)
            layer.mlp.down_proj.register_forward_pre_hook(self._keep("neurons", number), with_kwargs=True)
        self.layer_count = len(self._model.model.layers)
        norm = self._model.model.norm
        norm.register_forward_pre_hook(self._keep("stream", self.layer_count), with_kwargs=True)
        norm.register_forward_hook(lambda _module, _given, output: self._put("normed", 0, output))

    def look(self, prompt: Sequence[int], completion: Sequence[int]) -> Seen:
        import torch

        self._seen.clear()
        with torch.no_grad():
            self._model(torch.tensor([[*prompt, *completion]]))
        rows = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        layers = range(self.layer_count)
        heads = np.stack([self._take("heads", number, rows) for number in layers])
        heads = heads.reshape(*heads.shape[:2], self.heads, -1)
        return Seen(
            np.stack([self._take("stream", number, rows) for number in range(self.layer_count + 1)]),
            self._take("normed", 0, rows),
            heads,
            np.stack([self._add(number, heads[number]) for number in layers]),
            np.stack([self._take("neurons", number, rows) for number in layers]),
        )

    def _add(self, number: int, heads: Float64Array) -> Float64Array:
        weight = self._model.model.layers[number].self_attn.o_proj.weight.detach().double().numpy()
        parts = weight.reshape(weight.shape[0], self.heads, -1)
        return np.asarray(np.einsum("tnd,hnd->tnh", heads, parts))

    def _keep(self, name: str, number: int) -> Any:
        def see(_module: Any, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._put(name, number, given[0] if given else keywords["hidden_states"])

        return see

    def _put(self, name: str, number: int, states: Any) -> None:
        self._seen[name, number] = states.detach().double().reshape(-1, states.shape[-1]).numpy()

    def _take(self, name: str, number: int, rows: slice) -> Float64Array:
        return np.asarray(self._seen[name, number][rows])


def cosine_distances(before: Float64Array, after: Float64Array) -> Float64Array:
    """1 − cos of the last axis."""
    sizes = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    return np.asarray(1 - (before * after).sum(axis=-1) / sizes)
