"""Takes the kept layers, heads, neurons and channels out of a teacher's weights: nothing is computed anew.

A slice is exact. What is kept of everything is the same bits; units that add nothing can go unnoticed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lynearm.student.cutting.channels import Channels
from lynearm.student.cutting.shape import DecoderShape
from lynearm.student.cutting.width import Width
from lynearm.wire.errors import CheckpointError

_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields of configurations that say something of each layer."""

_AXES: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj.weight": ("queries", "channels"),
    "self_attn.q_proj.bias": ("queries",),
    "self_attn.k_proj.weight": ("keys", "channels"),
    "self_attn.k_proj.bias": ("keys",),
    "self_attn.v_proj.weight": ("keys", "channels"),
    "self_attn.v_proj.bias": ("keys",),
    "self_attn.o_proj.weight": ("channels", "queries"),
    "self_attn.o_proj.bias": ("channels",),
    "self_attn.q_norm.weight": ("head",),
    "self_attn.k_norm.weight": ("head",),
    "mlp.gate_proj.weight": ("neurons", "channels"),
    "mlp.gate_proj.bias": ("neurons",),
    "mlp.up_proj.weight": ("neurons", "channels"),
    "mlp.up_proj.bias": ("neurons",),
    "mlp.down_proj.weight": ("channels", "neurons"),
    "mlp.down_proj.bias": ("channels",),
    "input_layernorm.weight": ("channels",),
    "post_attention_layernorm.weight": ("channels",),
}
"""What each axis of a layer's weights counts; "head" is what a head has inside, which no cut touches."""


@dataclass(frozen=True, slots=True)
class KeptUnits:
    """What a student has of its teacher."""

    layers: tuple[int, ...]
    """Ascending."""
    heads: tuple[tuple[int, ...], ...] = ()
    """Query heads of each kept layer, those of a key-value head together; empty keeps all."""
    neurons: tuple[tuple[int, ...], ...] = ()
    """Of each kept layer; empty keeps all."""
    channels: Channels | None = None
    """None keeps all."""


def make_student(teacher: Any, kept: KeptUnits, width: Width, *, shape: DecoderShape, directory: Path) -> Any:
    """A model of its own, of the teacher's class, with the kept part of its weights.

    Args:
        teacher: A transformers causal LM; untyped, since every architecture has its class.
        kept: Which of its units.
        width: How many of them in each layer.
        shape: Of the teacher.
        directory: Of the teacher, for messages.

    Raises:
        CheckpointError: if it has weights that are not known to follow its heads, neurons or channels, or its
            configuration cannot say what was kept.
    """
    from transformers.initialization import no_init_weights

    config = cut_config(teacher.config, kept, width, shape=shape)
    prefix = f"{teacher.base_model_prefix}."
    weights = cut_weights(teacher.state_dict(), kept, shape=shape, prefix=prefix, directory=directory)
    with no_init_weights():
        student: Any = type(teacher)(config)
    student = student.float()
    student.load_state_dict(weights)
    student.tie_weights()
    if teacher.generation_config is not None:
        student.generation_config = teacher.generation_config
    return student.eval()


def cut_config(config: Any, kept: KeptUnits, width: Width, *, shape: DecoderShape) -> Any:
    """The student's configuration.

    Raises:
        CheckpointError: if the model type has no field for the width of a head, which it would need.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(kept.layers)
    for name in _BY_LAYER:
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[layer] for layer in kept.layers])
    if (width.heads, width.hidden_size) != (shape.heads, shape.hidden_size):
        if "head_dim" not in config.to_dict() and width.hidden_size != width.heads * shape.head_dim:
            raise CheckpointError(
                f"{config.model_type} has no head_dim in its configuration: heads have to be "
                f"{width.hidden_size}/{width.heads} wide, and are {shape.head_dim}",
                "keep all heads, or cut hidden_size in the same proportion",
            )
        config.hidden_size = width.hidden_size
        config.num_attention_heads, config.num_key_value_heads = width.heads, width.kv_heads
        if "head_dim" in config.to_dict():
            config.head_dim = shape.head_dim
    if width.neurons != shape.neurons:
        config.intermediate_size = width.neurons
    return config


def cut_weights(
    weights: Mapping[str, Tensor], kept: KeptUnits, *, shape: DecoderShape, prefix: str, directory: Path
) -> dict[str, Tensor]:
    """The kept part of a model's state, with layers renumbered.

    Args:
        weights: Of the teacher, by the names of its state.
        kept: Which of its units.
        shape: Of the teacher.
        prefix: Of the base model in names.
        directory: Of the teacher, for messages.

    Raises:
        CheckpointError: as for `make_student`.
    """
    numbers = {layer: number for number, layer in enumerate(kept.layers)}
    pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.(.+)")
    scales = kept.channels.norm_scales if kept.channels else dict[str, float]()
    cut: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        found = pattern.fullmatch(name)
        if found is None:
            taken = _cut_outside(name, tensor, kept)
        elif (layer := int(found[1])) in numbers:
            indices = _indices(kept, numbers[layer], shape)
            taken = _take(tensor, _axes(found[2], directory), indices) if indices else tensor
        else:
            continue
        scale = scales.get(name.removeprefix(prefix).removesuffix(".weight"))
        new_name = f"{prefix}layers.{numbers[int(found[1])]}.{found[2]}" if found else name
        cut[new_name] = taken if scale is None else taken * scale
    return cut


def _cut_outside(name: str, tensor: Tensor, kept: KeptUnits) -> Tensor:
    """Embeddings, the final norm and the output head, whose last axis is the hidden size."""
    # The bias of an output head is as long as the vocabulary.
    if kept.channels is None or name == "lm_head.bias":
        return tensor
    return tensor.index_select(tensor.ndim - 1, torch.tensor(kept.channels.kept))


def _indices(kept: KeptUnits, number: int, shape: DecoderShape) -> dict[str, Tensor]:
    """Rows or columns to keep of a layer, by what they count; axes that keep all are left out."""
    indices: dict[str, Tensor] = {}
    if kept.heads:
        heads = kept.heads[number]
        groups = tuple(dict.fromkeys(head // shape.group for head in heads))
        inside = torch.arange(shape.head_dim)
        for axis, units in (("queries", heads), ("keys", groups)):
            indices[axis] = (torch.tensor(units)[:, None] * shape.head_dim + inside).flatten()
    if kept.neurons:
        indices["neurons"] = torch.tensor(kept.neurons[number])
    if kept.channels is not None:
        indices["channels"] = torch.tensor(kept.channels.kept)
    return indices


def _axes(part: str, directory: Path) -> tuple[str, ...]:
    if part not in _AXES:
        raise CheckpointError(
            f"layers of {directory} have {part}, which is not known to follow heads, neurons or channels",
            "cut it by layers only",
        )
    return _AXES[part]


def _take(tensor: Tensor, axes: tuple[str, ...], indices: Mapping[str, Tensor]) -> Tensor:
    for axis, counts in enumerate(axes):
        if counts in indices:
            tensor = tensor.index_select(axis, indices[counts])
    return tensor
