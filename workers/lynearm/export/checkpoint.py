"""A llama-family checkpoint in Hugging Face layout: what an exporter must know, checked before it starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from lynearm.wire.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    import torch

JsonObject: TypeAlias = dict[str, Any]
"""A parsed JSON object: its values are checked where they are used."""

SUPPORTED_MODEL_TYPES = ("llama",)
REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LINEAGE_FILE = "lynearm.json"
DEFAULT_ROPE_THETA = 10_000.0
"""What Llama's configuration means when it names no base frequency."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
LAYER_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers that define a llama decoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding, which may exceed the tokenizer's vocabulary."""
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    """Tokens."""
    tied: bool
    """Whether the output head is the embedding."""
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory that was found complete and exportable."""

    path: Path
    architecture: Architecture
    config: JsonObject
    """config.json as read; treat as read-only."""
    lineage: JsonObject
    """lynearm.json as read; empty where the checkpoint has none."""


def linear_weight_names(architecture: Architecture) -> list[str]:
    """Names of all weight matrices but the embedding, in the order of the forward pass."""
    names = [
        f"model.layers.{i}.{part}.weight" for i in range(architecture.num_layers) for part in LAYER_LINEARS
    ]
    return names if architecture.tied else [*names, LM_HEAD]


def norm_weight_names(architecture: Architecture) -> list[str]:
    """Names of all RMSNorm weights, in the order of the forward pass."""
    names = [
        f"model.layers.{i}.{part}.weight" for i in range(architecture.num_layers) for part in LAYER_NORMS
    ]
    return [*names, FINAL_NORM]


def read_checkpoint(directory: Path) -> Checkpoint:
    """Reads and checks everything but the weights' values.

    Raises:
        CheckpointError: if the directory is missing or incomplete, or holds a model that we cannot export.
        MissingDependencyError: if safetensors is not installed.
    """
    _check_files(directory)
    config = read_json(directory / "config.json")
    architecture = parse_architecture(config)
    _check_tensors(directory, architecture)
    lineage_file = directory / LINEAGE_FILE
    lineage = read_json(lineage_file) if lineage_file.is_file() else {}
    return Checkpoint(directory, architecture, config, lineage)


def parse_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        CheckpointError: if it is not a plain llama decoder, or a number is missing.
    """
    _check_supported(config)
    heads = _positive(config, "num_attention_heads")
    hidden = _positive(config, "hidden_size")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json has {heads} heads over {kv_heads} key-value heads: not a multiple"
        )
    return Architecture(
        hidden_size=hidden,
        intermediate_size=_positive(config, "intermediate_size"),
        num_layers=_positive(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab_size=_positive(config, "vocab_size"),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(config),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        tied=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=_end_tokens(config.get("eos_token_id")),
    )


def load_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All weights in float32, by their Hugging Face names; without a head where it is tied.

    Raises:
        CheckpointError: if a weight is not finite.
        MissingDependencyError: if torch or safetensors is not installed.
    """
    try:
        import torch
        from safetensors import safe_open
    except ImportError as error:
        raise _missing(error) from error
    architecture = checkpoint.architecture
    names = [EMBEDDING, *linear_weight_names(architecture), *norm_weight_names(architecture)]
    # Any: safetensors types neither the file nor what it gives.
    with cast(Any, safe_open)(checkpoint.path / "model.safetensors", "pt") as file:
        weights = {name: cast("torch.Tensor", file.get_tensor(name)).to(torch.float32) for name in names}
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{name} of {checkpoint.path} is not finite", "export an earlier checkpoint"
            )
    return weights


def read_json(path: Path) -> JsonObject:
    """The object in a JSON file.

    Raises:
        CheckpointError: if the file holds no JSON object.
    """
    try:
        parsed: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}", "save the checkpoint again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds {type(parsed).__name__}, not a JSON object", "save it again")
    return cast(JsonObject, parsed)


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory", "name a directory in Hugging Face layout")
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is an adapter without its base",
            "merge it with lynearm student merge, as the export command does by itself",
        )
    missing = [name for name in REQUIRED_FILES if not (directory / name).is_file()]
    if missing == ["model.safetensors"] and (directory / "model.safetensors.index.json").is_file():
        raise CheckpointError(
            f"{directory} holds sharded weights", "save with save_pretrained(max_shard_size='1TB')"
        )
    if missing:
        raise CheckpointError(
            f"{directory} lacks {', '.join(missing)}", "save model and tokenizer with save_pretrained"
        )


def _check_supported(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(
            f"model_type is {model_type!r}; lynearm exports {', '.join(SUPPORTED_MODEL_TYPES)}",
            "distil into a llama-family student, such as one cut out of SmolLM2",
        )
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act is {config['hidden_act']!r}, expected 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise CheckpointError(f"{key} is true", "export a model whose linear layers have no bias")
    if config.get("quantization_config"):
        raise CheckpointError("the checkpoint is quantised", "export the full-precision checkpoint")
    rope = _rope_parameters(config)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"RoPE scaling {rope_type!r} is not supported", "export a model with default rotary embeddings"
        )


def _rope_parameters(config: Mapping[str, Any]) -> JsonObject:
    return cast(JsonObject, config.get("rope_parameters") or config.get("rope_scaling") or {})


def _rope_theta(config: Mapping[str, Any]) -> float:
    # transformers 5 writes the nested form only, older versions the top-level one only.
    nested = _rope_parameters(config).get("rope_theta")
    top = config.get("rope_theta")
    if nested is not None and top is not None and float(nested) != float(top):
        raise CheckpointError(
            f"config.json has rope_theta {top} and rope_parameters.rope_theta {nested}", "keep the right one"
        )
    return float(nested if nested is not None else top if top is not None else DEFAULT_ROPE_THETA)


def _end_tokens(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    found = cast("list[int]", value) if isinstance(value, list) else [cast(int, value)]
    return tuple(int(one) for one in found)


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json has {key}={value!r}, expected a positive integer")
    return value


def _expected_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    by_part = {
        "self_attn.q_proj": (queries, a.hidden_size),
        "self_attn.k_proj": (keys, a.hidden_size),
        "self_attn.v_proj": (keys, a.hidden_size),
        "self_attn.o_proj": (a.hidden_size, queries),
        "mlp.gate_proj": (a.intermediate_size, a.hidden_size),
        "mlp.up_proj": (a.intermediate_size, a.hidden_size),
        "mlp.down_proj": (a.hidden_size, a.intermediate_size),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (a.vocab_size, a.hidden_size)}
    shapes |= dict.fromkeys(norm_weight_names(a), (a.hidden_size,))
    for layer in range(a.num_layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in by_part.items()}
    return shapes if a.tied else shapes | {LM_HEAD: (a.vocab_size, a.hidden_size)}


def _check_tensors(directory: Path, architecture: Architecture) -> None:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise _missing(error) from error
    path = directory / "model.safetensors"
    try:
        # The header alone is read; "np" since it needs no torch.
        with cast(Any, safe_open)(path, "np") as file:
            names: list[str] = list(file.keys())
            found = {name: tuple(cast("list[int]", file.get_slice(name).get_shape())) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}", "save it again") from error
    for name, shape in _expected_shapes(architecture).items():
        if name not in found:
            raise CheckpointError(f"{path} lacks the tensor {name}", "save the whole model, adapters merged")
        if found[name] != shape:
            raise CheckpointError(f"{name} of {path} has shape {found[name]}, config.json implies {shape}")


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"{error.name or 'a package'} is not installed", "pip install 'lynearm[student,mlx,coreml]'"
    )
