"""A llama in Hugging Face layout, written from a GGUF file: float32 weights, configuration and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lynearm.teacher.gguf_file import Float32Array, GgufFile, GgufTensor, UnsupportedGgufError
from lynearm.wire.errors import CheckpointError

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes of weights written so far, and all that will be."""

_CONTROL_TOKEN = 3

_SMOLLM = ("gpt2", "smollm")
"""Model and pre-tokenizer of SmolLM2."""

_HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def write_llama(directory: Path, gguf: GgufFile, on_progress: Progress | None = None) -> None:
    """Writes model.safetensors, config.json, generation_config.json, the tokenizer and its chat template.

    The weights are bit for bit what transformers' own GGUF reader makes of the file, in a tenth of its time.

    Args:
        directory: Exists; files of these names are overwritten.
        gguf: A llama with SmolLM2's byte-level tokenizer.
        on_progress: Called after each tensor.

    Raises:
        UnsupportedGgufError: if the file holds another architecture or tokenizer; nothing was written.
        CheckpointError: if it holds what no llama has.
        OSError: if the directory cannot be written.
    """
    config = _config(gguf)
    write_tokenizer(directory, gguf)
    _write_weights(directory / "model.safetensors", gguf, on_progress)
    write_json(directory / "config.json", config)
    special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", special_ids)


def knows_tokenizer(gguf: GgufFile) -> bool:
    """Whether `write_tokenizer` knows the file's tokenizer; only metadata is looked at."""
    return _tokenizer_flavour(gguf) == _SMOLLM


def write_tokenizer(directory: Path, gguf: GgufFile) -> None:
    """Writes tokenizer.json, its configuration and the chat template. Only metadata is looked at.

    Raises:
        UnsupportedGgufError: if it is not SmolLM2's tokenizer; nothing was written.
        CheckpointError: if a part of it is missing.
        OSError: if the directory cannot be written.
    """
    tokenizer, template = _tokenizer(gguf), gguf.text("tokenizer.chat_template")
    settings = _tokenizer_config(gguf, template)
    write_json(directory / "tokenizer.json", tokenizer)
    write_json(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(gguf: GgufFile) -> dict[str, Any]:
    architecture = gguf.text("general.architecture")
    if architecture != "llama":
        raise UnsupportedGgufError(f"{gguf.path} holds a {architecture!r}, expected a llama")
    hidden, heads = gguf.integer("llama.embedding_length"), gguf.integer("llama.attention.head_count")
    theta = gguf.number("llama.rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(gguf.items("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": gguf.integer("llama.feed_forward_length"),
        "num_hidden_layers": gguf.integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.integer("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": gguf.integer("llama.context_length"),
        "rms_norm_eps": gguf.number("llama.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in gguf.tensors),
        # Both forms of each: transformers 5 reads the second, mlx-lm and older readers only the first.
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "torch_dtype": "float32",
        "dtype": "float32",
        "bos_token_id": gguf.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.integer("tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf.integer("tokenizer.ggml.padding_token_id"),
    }


def _tokenizer(gguf: GgufFile) -> dict[str, Any]:
    flavour = _tokenizer_flavour(gguf)
    if flavour != _SMOLLM:
        raise UnsupportedGgufError(f"{gguf.path} has a tokenizer of kind {flavour}, expected SmolLM2's")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _control_tokens(gguf),
        "normalizer": None,
        # "smollm" cuts every digit apart first. transformers' own GGUF reader leaves that out and so splits
        # white space before a digit otherwise than the model was trained on.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": _byte_pairs(gguf),
    }


def _tokenizer_flavour(gguf: GgufFile) -> tuple[str, str]:
    return gguf.text_if_any("tokenizer.ggml.model"), gguf.text_if_any("tokenizer.ggml.pre")


def _control_tokens(gguf: GgufFile) -> list[dict[str, Any]]:
    pairs = zip(gguf.items("tokenizer.ggml.tokens"), gguf.items("tokenizer.ggml.token_type"), strict=True)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [
        {"id": i, "content": token, **plain}
        for i, (token, kind) in enumerate(pairs)
        if kind == _CONTROL_TOKEN
    ]


def _byte_pairs(gguf: GgufFile) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {str(token): i for i, token in enumerate(gguf.items("tokenizer.ggml.tokens"))},
        "merges": [str(merge).split(" ") for merge in gguf.items("tokenizer.ggml.merges")],
    }


def _tokenizer_config(gguf: GgufFile, template: str) -> dict[str, Any]:
    tokens = gguf.items("tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{ours}_token": tokens[gguf.integer(f"tokenizer.ggml.{theirs}_token_id")]
        for ours, theirs in names.items()
    }
    return {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.integer("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": template,
    }


def _write_weights(path: Path, gguf: GgufFile, on_progress: Progress | None) -> None:
    # By hand, tensor by tensor: safetensors' own writer would hold all of them in memory, twice.
    named = sorted((_hf_name(gguf, tensor), tensor) for tensor in gguf.tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, tensor in named:
        end = total + 4 * tensor.values
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [total, end]}
        total = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    done = 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in named:
            weights = _reorder_rotary(name, gguf.load(tensor), gguf)
            file.write(np.ascontiguousarray(weights, dtype="<f4").data)
            done += weights.nbytes
            if on_progress is not None:
                on_progress(done, total)


def _hf_name(gguf: GgufFile, tensor: GgufTensor) -> str:
    parts = tensor.name.removesuffix(".weight").split(".")
    layer = f"model.layers.{parts[1]}." if parts[0] == "blk" and len(parts) == 3 else ""
    if parts[-1] not in _HF_NAMES or not tensor.name.endswith(".weight"):
        raise CheckpointError(f"{gguf.path} holds {tensor.name!r}, which no plain llama has")
    return f"{layer}{_HF_NAMES[parts[-1]]}.weight"


def _reorder_rotary(name: str, weights: Float32Array, gguf: GgufFile) -> Float32Array:
    """Undoes GGUF's order of query and key rows: it interleaves the two halves that rotate together."""
    counts = {"q_proj": "llama.attention.head_count", "k_proj": "llama.attention.head_count_kv"}
    key = counts.get(name.split(".")[-2])
    if key is None:
        return weights
    heads = gguf.integer(key)
    pairs = weights.shape[0] // heads // 2
    halves = weights.reshape(heads, pairs, 2, -1).swapaxes(1, 2)
    return halves.reshape(weights.shape)
