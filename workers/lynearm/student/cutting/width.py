"""Which heads, neurons and channels a student keeps: those that put out most.

After Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron,
arXiv:2407.14679), which ranks units by the size of their activations over a small calibration set. A neuron
counts by its mean absolute activation, and a head by the norm of what it adds to the residual stream. SmolLM2
on GSM8K, KL before training: 6 of 9 heads 1.36 so, 1.65 by the norms of their own outputs, 1.97 at random;
1,024 of 1,536 neurons 0.50 so, 0.58 by activation times the length of the neuron's output weights; 1,280 of
them 0.24 either way, 1.51 at random.

All layers keep as many, since one number in the configuration speaks for all; which ones differs from layer
to layer. Only the channels of the residual stream are the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lynearm.student.cutting.config import CutConfig
from lynearm.student.cutting.shape import DecoderShape
from lynearm.wire.errors import ConfigError
from lynearm.wire.profiles import Float64Array


@dataclass(frozen=True, slots=True)
class Width:
    """What every layer keeps."""

    kv_heads: int
    heads: int
    neurons: int
    hidden_size: int

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads


def settle_width(config: CutConfig, shape: DecoderShape) -> Width:
    """The student's width: what was asked for, and the teacher's own where nothing was said.

    Raises:
        ConfigError: if the teacher has less, heads do not share key-value heads evenly, or transformers would
            not load the result.
    """
    kv_heads = _at_most("kv_heads", config.kv_heads, shape.kv_heads)
    heads = _at_most("heads", config.heads or kv_heads * shape.group, kv_heads * shape.group)
    hidden_size = _at_most("hidden_size", config.hidden_size, shape.hidden_size)
    if heads % kv_heads:
        raise ConfigError(
            f"heads is {heads}, and {kv_heads} key-value heads cannot share them evenly",
            f"keep a multiple of {kv_heads} heads, or say kv_heads too: the teacher has {shape.kv_heads} "
            f"with {shape.group} heads each",
        )
    if hidden_size % heads:
        # transformers refuses such a Llama, though its heads' width is given apart.
        possible = [n for n in range(kv_heads, kv_heads * shape.group + 1, kv_heads) if hidden_size % n == 0]
        raise ConfigError(
            f"heads is {heads}, and transformers loads only models whose hidden size ({hidden_size}) is a "
            "multiple of it",
            f"with {kv_heads} key-value heads, keep "
            f"{' or '.join(map(str, possible)) or 'another hidden_size'}",
        )
    return Width(kv_heads, heads, _at_most("neurons", config.neurons, shape.neurons), hidden_size)


def choose_heads(importance_N: Float64Array, width: Width, shape: DecoderShape) -> tuple[int, ...]:
    """Query heads to keep, ascending.

    Of each key-value head the best, and of those the key-value heads whose best add most.

    Args:
        importance_N: Of each query head of the teacher's layer.
        width: How many to keep.
        shape: Of the teacher.
    """
    by_group_KG = importance_N.reshape(shape.kv_heads, shape.group)
    best_KG = np.sort(_largest(by_group_KG, width.group), 1)
    sums_K = np.take_along_axis(by_group_KG, best_KG, 1).sum(1)
    groups = np.sort(_largest(sums_K[None], width.kv_heads)[0])
    return tuple((groups[:, None] * shape.group + best_KG[groups]).ravel().tolist())


def choose_units(importance_F: Float64Array, count: int) -> tuple[int, ...]:
    """The `count` units of most importance, ascending."""
    return tuple(np.sort(_largest(importance_F[None], count)[0]).tolist())


def share(importance_F: Float64Array, kept: tuple[int, ...]) -> float:
    """Part of all importance that the kept units have; 1 where none has any."""
    total = float(importance_F.sum())
    return float(importance_F[list(kept)].sum()) / total if total > 0 else 1.0


def _largest(values_RN: Float64Array, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.intp]]:
    # Stable, so that of equals the first stays: a cut is the same wherever it is made.
    return np.argsort(-values_RN, 1, kind="stable")[:, :count]


def _at_most(name: str, wanted: int, available: int) -> int:
    if wanted > available:
        raise ConfigError(f"{name} is {wanted}, expected 1 to {available}")
    return wanted or available
