"""GGUF files of any kind that transformers reads, written in its own layout."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, TypeAlias

from lynearm.teacher.llama_files import write_json
from lynearm.wire.errors import CheckpointError, MissingDependencyError

Untyped: TypeAlias = Any
"""An object of transformers, which ships no types that a strict checker accepts."""


def write_with_transformers(directory: Path, gguf_path: Path, reason: CheckpointError) -> None:
    """Write weights in float32, configuration and tokenizer. Holds the whole model in memory.

    Args:
        directory: Exists.
        gguf_path: The file.
        reason: Why our own reader does not take it.

    Raises:
        CheckpointError: if transformers does not read it either, or not all of it.
        MissingDependencyError: without gguf or accelerate, which transformers needs for it.
        OSError: if the directory cannot be written.
    """
    try:
        # transformers needs both for it, and asks with a page of text.
        for module in ("gguf", "accelerate"):
            importlib.import_module(module)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"{reason.message}; transformers may read it, with {error.name}", "pip install 'lynearm[gguf]'"
        ) from error
    model_class: Untyped = AutoModelForCausalLM
    tokenizer_class: Untyped = AutoTokenizer
    named = {"gguf_file": gguf_path.name}
    try:
        model, loading = model_class.from_pretrained(
            gguf_path.parent, dtype=torch.float32, output_loading_info=True, **named
        )
        tokenizer: Untyped = tokenizer_class.from_pretrained(gguf_path.parent, **named)
    except OSError:
        raise
    # It raises what it likes on a file that it does not understand.
    except Exception as error:
        raise CheckpointError(
            f"{reason.message}, and transformers does not read it either: {error}",
            "take the model in the transformers layout",
        ) from error
    incomplete = [name for kind in ("missing_keys", "mismatched_keys") for name in loading[kind]]
    if incomplete:
        raise CheckpointError(
            f"{gguf_path} lacks {incomplete[0]} of a {model.config.model_type}",
            "take the model in the transformers layout",
        )
    # transformers takes the model for a quantised one, which it would not save, though it is dequantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _write_both_forms(directory / "config.json")


def _write_both_forms(path: Path) -> None:
    """Transformers 5 writes `rope_parameters` and `dtype`; mlx-lm and older readers know only the others."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    config.setdefault("torch_dtype", config.get("dtype", "float32"))
    config.pop("_model_name_or_path", None)
    write_json(path, config)
