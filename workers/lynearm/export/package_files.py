"""Files of a package that readers look for: weights, configuration, tokenizer and card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lynearm.export.checkpoint import LINEAGE_FILE, Checkpoint, JsonObject, read_json
from lynearm.export.staging import write_json

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    LINEAGE_FILE,
)

GENERIC_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""Stands for any tokenizer.json; the name that transformers 5 writes instead is refused by Swift readers."""

_ABSTRACT_TOKENIZER_CLASSES = ("TokenizersBackend", "PythonBackend", "", None)


def write_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """model.safetensors and the index that some readers insist on."""
    import safetensors.torch

    untyped = cast(Any, safetensors.torch)  # its functions are half typed
    name = "model.safetensors"
    untyped.save_file(
        {key: tensors[key].contiguous() for key in sorted(tensors)}, directory / name, {"format": "mlx"}
    )
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": size_bytes}, "weight_map": dict.fromkeys(sorted(tensors), name)},
    )


def write_config(
    directory: Path, checkpoint: Checkpoint, dtype: str, quantization: Mapping[str, object] | None
) -> None:
    """config.json with every key in each of the forms that some reader looks for.

    transformers 5 reads and writes `rope_parameters` and `dtype`; mlx-lm's llama reads `rope_theta` alone,
    and falls back to 10000 without a word.
    """
    architecture = checkpoint.architecture
    config: JsonObject = dict(checkpoint.config) | {
        "rope_theta": architecture.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": architecture.rope_theta},
        "head_dim": architecture.head_dim,
        "num_key_value_heads": architecture.num_kv_heads,
        "tie_word_embeddings": architecture.tied,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if quantization is not None:
        config |= {"quantization": dict(quantization), "quantization_config": dict(quantization)}
    write_json(directory / "config.json", config)


def copy_tokenizer(directory: Path, checkpoint: Checkpoint) -> None:
    """Tokenizer files, with a concrete class and the chat template in both places where readers look."""
    for name in TOKENIZER_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)
    config = read_json(checkpoint.path / "tokenizer_config.json")
    if config.get("tokenizer_class") in _ABSTRACT_TOKENIZER_CLASSES:
        config["tokenizer_class"] = GENERIC_TOKENIZER_CLASS
    template_file = checkpoint.path / "chat_template.jinja"
    template = (
        template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
    )
    if isinstance(template, str) and template:
        config["chat_template"] = template
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(directory / "tokenizer_config.json", config)


def write_card(directory: Path, checkpoint: Checkpoint, facts: Mapping[str, str]) -> None:
    """README.md: what the package is, how far it is from its checkpoint, and on what terms it may be used."""
    lines = [
        *card_header("mlx", checkpoint),
        "",
        f"# {checkpoint.path.name} for MLX",
        "",
        "A student distilled with lynearm, for `mlx_lm` and the Swift libraries that read its layout:",
        "",
        "```sh",
        "mlx_lm.generate --model . --prompt 'What is 7 times 8?'",
        "```",
        "",
        *card_facts(checkpoint, facts),
    ]
    (directory / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def card_header(library: str, checkpoint: Checkpoint) -> list[str]:
    """Lines of a card that hubs read; they name a licence where there is exactly one."""
    licenses = find_licenses(checkpoint.lineage)
    license_line = [f"license: {licenses[0].lower()}"] if len(licenses) == 1 else []
    return ["---", f"library_name: {library}", "pipeline_tag: text-generation", *license_line, "---"]


def card_facts(checkpoint: Checkpoint, facts: Mapping[str, str]) -> list[str]:
    """Facts as a list, and on what terms the checkpoint's teachers may be distilled."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    if licenses := find_licenses(checkpoint.lineage):
        lines.append(f"- terms of its teachers: {', '.join(licenses)} (streams in `{LINEAGE_FILE}`)")
    return lines


def find_licenses(lineage: JsonObject) -> list[str]:
    """Licences of the streams that went into a checkpoint, in order, each once."""
    streams = lineage.get("streams")
    found: dict[str, None] = {}
    for stream in cast("list[object]", streams) if isinstance(streams, list) else []:
        if isinstance(stream, dict) and isinstance(license := cast(JsonObject, stream).get("license"), str):
            found[license] = None
    return list(found)
