"""What the directory, or the name, of a teacher says: its tokenizer, its end tokens, its sizes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from lynearm.wire.errors import ConfigError, MissingDependencyError
from lynearm.wire.specs import TokenizerSpec, hash_chat_template, hash_vocab

Untyped: TypeAlias = Any
"""Something of transformers': it ships no types that a strict checker accepts."""


@dataclass(frozen=True, slots=True)
class TeacherFiles:
    """What could be read of a teacher without its weights."""

    tokenizer: Untyped
    """Of transformers."""
    spec: TokenizerSpec
    vocab_size: int | None
    """Width of the logits; None without a model configuration."""
    max_model_len: int | None
    """Tokens; None where the configuration does not say."""


def load_teacher_files(source: str) -> TeacherFiles:
    """Read the tokenizer, and what else lies beside it.

    Args:
        source: A directory in the transformers layout, or a name that transformers can fetch.

    Raises:
        ConfigError: if there is no tokenizer.
        MissingDependencyError: without transformers.
    """
    try:
        transformers: Untyped = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            f"a tokenizer needs transformers: {error}", "pip install 'lynearm[student]'"
        ) from error
    try:
        tokenizer: Untyped = transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:
        # transformers, tokenizers and json raise a dozen unrelated classes for what is no tokenizer.
        raise ConfigError(
            f"{source!r} has no tokenizer that can be loaded: {' '.join(str(error).split())[:300]}",
            "name the teacher's directory with --tokenizer",
        ) from error
    config = _optional(transformers.AutoConfig, source)
    text_config: Untyped = config.get_text_config() if config is not None else None
    return TeacherFiles(
        tokenizer=tokenizer,
        spec=_describe(tokenizer, source, _end_tokens(transformers, tokenizer, source)),
        vocab_size=_positive(text_config, "vocab_size"),
        max_model_len=_positive(text_config, "max_position_embeddings"),
    )


def _describe(tokenizer: Untyped, source: str, eos_token_ids: tuple[int, ...]) -> TokenizerSpec:
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str):
        template = json.dumps(template, sort_keys=True)
    vocab = cast("Mapping[str, int]", tokenizer.get_vocab())
    return TokenizerSpec(
        name=Path(source).resolve().name if Path(source).is_dir() else source,
        vocab_sha256=hash_vocab(vocab.items()),
        chat_template_sha256=hash_chat_template(template),
        vocab_size=len(tokenizer),
        eos_token_ids=eos_token_ids,
    )


def _end_tokens(transformers: Untyped, tokenizer: Untyped, source: str) -> tuple[int, ...]:
    generation = _optional(transformers.GenerationConfig, source)
    listed: object = getattr(generation, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(cast("list[int]", listed) if isinstance(listed, list) else [listed])}
    return tuple(sorted(int(cast("int", one)) for one in found if one is not None))


def _optional(loader: Untyped, source: str) -> Untyped | None:
    """What `from_pretrained` gives; None where there is no such file."""
    try:
        return loader.from_pretrained(source)
    except (OSError, ValueError):
        return None


def _positive(config: Untyped | None, name: str) -> int | None:
    value: object = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None
