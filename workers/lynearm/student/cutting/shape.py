"""The numbers that a cut changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from lynearm.wire.errors import CheckpointError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Of a llama-like decoder."""

    layers: int
    heads: int
    """Query heads."""
    kv_heads: int
    head_dim: int
    neurons: int
    """Width of the feed-forward network."""
    hidden_size: int

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads


def read_shape(config: Any) -> DecoderShape:
    """The shape that a transformers configuration tells.

    Args:
        config: Untyped, since every architecture has its own class.
    """
    heads = int(config.num_attention_heads)
    return DecoderShape(
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        neurons=int(getattr(config, "intermediate_size", 0)),
        hidden_size=int(config.hidden_size),
    )


def check_decoder(model: Any, directory: Path) -> None:
    """Look whether the model's layers can be run one by one.

    Raises:
        CheckpointError: if they cannot.
    """
    if not all(hasattr(model.base_model, part) for part in ("embed_tokens", "layers", "norm", "rotary_emb")):
        raise CheckpointError(
            f"{directory} is a {type(model).__name__}, whose layers cannot be run one by one",
            "cut a llama-like model, or give a student made otherwise",
        )


def check_width(model: Any, directory: Path) -> None:
    """Look whether every layer has heads and neurons where a narrower student takes them from.

    Raises:
        CheckpointError: if one has not.
    """
    shape = read_shape(model.config)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": shape.hidden_size}
    rows |= {"gate_proj": shape.neurons, "up_proj": shape.neurons, "down_proj": shape.hidden_size}
    for number, layer in enumerate(cast("Sequence[Any]", model.base_model.layers)):
        for block, names in (("self_attn", ATTENTION), ("mlp", FEED_FORWARD)):
            for name in names:
                found = getattr(getattr(layer, block, None), name, None)
                if not isinstance(found, nn.Linear) or found.out_features != rows[name]:
                    raise CheckpointError(
                        f"layer {number} of {directory} has no {block}.{name} with {rows[name]} outputs",
                        "cut it by layers only, or cut a llama-like model",
                    )
