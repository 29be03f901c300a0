"""The teacher's tokenizer: prompts to token ids, completions to text, and what a student must share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.prompts import Prompt
from lynearm.teacher.span_finder import SpanFinder
from lynearm.wire.errors import ConfigError, PromptTooLongError
from lynearm.wire.specs import TokenizerSpec, hash_chat_template, hash_vocab
from lynearm.wire.traces import Int32Array

Untyped: TypeAlias = Any
"""A transformers tokenizer: it ships no types that a strict checker accepts."""


class PromptTokenizer:
    """Wraps a transformers tokenizer with the settings of one run.

    Args:
        tokenizer: The model's tokenizer.
        config: Reads `chat` and the reasoning markers.
        max_model_len: Longest prompt plus completion, tokens.

    Raises:
        ConfigError: for reasoning markers or an answer pattern that `SpanFinder` refuses.
    """

    def __init__(self, tokenizer: Untyped, config: TeachConfig, *, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._chat = config.chat
        self.spans = SpanFinder(tokenizer, config)

    def encode(self, prompt: Prompt) -> Int32Array:
        """Token ids of a prompt, with the chat template where it applies.

        Raises:
            PromptTooLongError: if no room is left for a completion.
            ConfigError: for chat messages without a template, or that the template refuses.
        """
        token_ids = self._chat_ids(prompt) if self._is_chat(prompt) else self._ids(prompt.text)
        if not token_ids:
            raise ConfigError("the prompt has no tokens")
        if len(token_ids) >= self._max_model_len:
            raise PromptTooLongError(
                f"the prompt is {len(token_ids)} tokens, and the context of {self._max_model_len} must also "
                "hold a completion",
                "shorten the prompt, or raise max_model_len",
            )
        return np.asarray(token_ids, np.int32)

    def decode(self, completion_token_ids: Sequence[int], eos_token_ids: Sequence[int]) -> str:
        """The completion as text, special tokens included, without a final end token."""
        ids = [int(token_id) for token_id in completion_token_ids]
        if ids and ids[-1] in eos_token_ids:
            ids.pop()
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def _is_chat(self, prompt: Prompt) -> bool:
        return bool(prompt.messages) or (self._chat and self._tokenizer.chat_template is not None)

    def _ids(self, text: str) -> list[int]:
        return [int(token_id) for token_id in self._tokenizer.encode(text)]

    def _chat_ids(self, prompt: Prompt) -> list[int]:
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        messages = messages or [{"role": "user", "content": prompt.text}]
        if self._tokenizer.chat_template is None:
            raise ConfigError("the prompt is a chat, and the teacher has no chat template")
        try:
            text: Untyped = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        # Templates raise what they like: jinja2's errors, and whatever their own code does.
        except Exception as error:
            raise ConfigError(f"the chat template refuses the messages: {error}") from error
        # The template writes the special tokens itself.
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]


def describe_tokenizer(tokenizer: Untyped, name: str, eos_token_ids: Sequence[int]) -> TokenizerSpec:
    """What a student must share with this tokenizer."""
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str):
        template = json.dumps(template, sort_keys=True)
    vocab = cast("dict[str, int]", tokenizer.get_vocab())
    return TokenizerSpec(
        name=name,
        vocab_sha256=hash_vocab(vocab.items()),
        chat_template_sha256=hash_chat_template(template),
        vocab_size=len(tokenizer),
        eos_token_ids=tuple(eos_token_ids),
    )


def end_tokens(model_dir: Path | None, tokenizer: Untyped, generation: Untyped = None) -> tuple[int, ...]:
    """Ids that end a completion, ascending: the tokenizer's own and those of the generation config.

    Args:
        model_dir: Directory with a `generation_config.json`; None for a model that has none at hand.
        tokenizer: The model's tokenizer.
        generation: The generation config as a mapping, where it was loaded elsewhere.
    """
    found: set[int] = set()
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    path = model_dir / "generation_config.json" if model_dir is not None else None
    if generation is None and path is not None and path.is_file():
        generation = json.loads(path.read_text())
    listed: object = generation["eos_token_id"] if generation and "eos_token_id" in generation else None
    if isinstance(listed, int):
        found.add(listed)
    elif isinstance(listed, list):
        found.update(int(token_id) for token_id in cast("list[int]", listed))
    return tuple(sorted(found))
