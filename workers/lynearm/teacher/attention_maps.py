"""Attention maps of a prompt, through transformers' eager attention, as a page or as arrays.

Shape legend: L = layers, N = heads, T = tokens of the prompt.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import ConfigError, InvalidInputError, MissingDependencyError, StorageError

Untyped: TypeAlias = Any
"""An object of transformers, which ships no types that a strict checker accepts."""

MAX_PAGE_BYTES = 64 << 20
"""Of all weights in a page, a byte each."""


@dataclass(frozen=True, slots=True)
class AttentionMaps:
    """Where each token of a prompt looks."""

    model: str
    tokens: tuple[str, ...]
    """Text of each token."""
    weights: npt.NDArray[np.float32]
    """Of each token on the tokens up to itself, rows sum to 1, shape [L, N, T, T]."""


def compute_attention(model: str, prompt: str, *, chat: bool = True, max_tokens: int = 256) -> AttentionMaps:
    """The maps of all heads.

    Args:
        model: Directory in the transformers layout, or a model's name.
        prompt: Text.
        chat: Put it through the chat template, where the model has one.
        max_tokens: Refuse a longer prompt: maps grow with its square.

    Raises:
        MissingDependencyError: without transformers.
        ConfigError: if the model cannot be loaded, or gives no maps.
        InvalidInputError: if the prompt is empty or too long.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"attention maps need transformers: {error}", "pip install 'lynearm[teacher]'"
        ) from error
    causal: Untyped = AutoModelForCausalLM
    auto: Untyped = AutoTokenizer
    try:
        tokenizer: Untyped = auto.from_pretrained(model)
        loaded: Untyped = causal.from_pretrained(model, attn_implementation="eager", dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load model {model!r}: {str(error).splitlines()[0][:300]}") from error
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    token_ids: list[int] = [int(one) for one in tokenizer(prompt, add_special_tokens=not chat)["input_ids"]]
    if not 1 <= len(token_ids) <= max_tokens:
        raise InvalidInputError(
            f"the prompt has {len(token_ids)} tokens, expected 1 to {max_tokens}",
            "give a shorter one, or raise --max-tokens" if token_ids else "give a text",
        )
    with torch.no_grad():
        found: Untyped = loaded.eval()(torch.tensor([token_ids]), output_attentions=True).attentions
    if not found or any(one is None for one in found):
        raise ConfigError(f"model {model!r} gives no attention weights")
    weights = np.stack([np.asarray(one[0].numpy(), np.float32) for one in found])
    return AttentionMaps(Path(model).name, tuple(str(tokenizer.decode([one])) for one in token_ids), weights)


def write_attention(maps: AttentionMaps, path: Path) -> None:
    """Write maps, as a page that needs nothing else (.html) or as arrays `tokens` and `weights` (.npz).

    Raises:
        InvalidInputError: if the suffix is another, or a page would grow too large.
        StorageError: if the file cannot be written.
    """
    if path.suffix not in (".html", ".npz"):
        raise InvalidInputError(f"{path.name!r} ends in {path.suffix!r}, expected .html or .npz")
    if path.suffix == ".html" and maps.weights.size > MAX_PAGE_BYTES:
        raise InvalidInputError(
            f"a page of {maps.weights.size} weights, at most {MAX_PAGE_BYTES} can be",
            "give a shorter prompt, or write .npz",
        )
    try:
        if path.suffix == ".npz":
            np.savez_compressed(path, tokens=np.array(maps.tokens), weights=maps.weights)
        else:
            path.write_text(_page(maps), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def _page(maps: AttentionMaps) -> str:
    """The page's template with the maps in it, a byte for each weight."""
    layers, heads, tokens, _ = maps.weights.shape
    levels = np.rint(maps.weights * 255).astype(np.uint8)
    data = {
        "model": maps.model,
        "tokens": maps.tokens,
        "layers": layers,
        "heads": heads,
        "size": tokens,
        "weights": base64.b64encode(levels.tobytes()).decode("ascii"),
    }
    # Inside a script element, "<" could end it.
    text = json.dumps(data).replace("<", "\\u003c")
    template = files("lynearm.teacher").joinpath("attention.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", text)
