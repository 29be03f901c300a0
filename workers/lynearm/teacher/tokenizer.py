"""The teacher's tokenizer: prompts to token ids, completions to text, and what a student must share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from lynearm.teacher.chat_template import ChatTemplate
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.prompts import ChatMessage, Prompt
from lynearm.teacher.span_finder import SpanFinder
from lynearm.wire.errors import ConfigError, PromptTooLongError
from lynearm.wire.sampling import stop_token_problem
from lynearm.wire.specs import TokenizerSpec, hash_chat_template, hash_vocab
from lynearm.wire.traces import Int32Array

Untyped: TypeAlias = Any
"""A transformers tokenizer: it ships no types that a strict checker accepts."""


class PromptTokenizer:
    """Wraps a transformers tokenizer with the settings of one run.

    Args:
        tokenizer: The model's tokenizer.
        config: Reads `chat`, what the template is told, and the reasoning markers.
        max_model_len: Longest prompt plus completion, tokens.
        vocab_size: Width of the logits; 0 for the tokenizer's own size.

    Raises:
        ConfigError: for stop tokens outside the vocabulary, for reasoning markers or an answer pattern that
            `SpanFinder` refuses, or if the chat template has no switch for thinking, though the config sets
            it.
    """

    def __init__(
        self, tokenizer: Untyped, config: TeachConfig, *, max_model_len: int, vocab_size: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size or len(tokenizer)
        problem = stop_token_problem(config.sampling(), self._vocab_size)
        if problem:
            raise ConfigError(problem, "look its id up in the teacher's own tokenizer")
        self._chat = config.chat
        self._template = ChatTemplate(tokenizer, config)
        self.spans = SpanFinder(tokenizer, config)

    def encode(self, prompt: Prompt) -> Int32Array:
        """Token ids of a prompt, with the chat template where it applies.

        Raises:
            PromptTooLongError: if no room is left for a completion.
            ConfigError: for chat messages without a template, or that the template refuses, and for token
                ids outside the vocabulary.
        """
        if prompt.token_ids:
            return self._checked(prompt.token_ids)
        text = self.chat_text(prompt)
        # A template writes the special tokens itself.
        token_ids = self._tokenizer.encode(
            prompt.text if text is None else text, add_special_tokens=text is None
        )
        return self._checked(token_ids)

    def chat_text(self, prompt: Prompt) -> str | None:
        """What the chat template makes of a prompt; None where none applies.

        Raises:
            ConfigError: for chat messages without a template, or that the template refuses.
        """
        if prompt.token_ids or not (prompt.messages or (self._chat and self._template.exists)):
            return None
        return self._template.render(prompt.messages or (ChatMessage("user", prompt.text),))

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Refuse token ids that are no prompt for this model.

        Raises:
            PromptTooLongError: if no room is left for a completion.
            ConfigError: if there are none, or one is outside the vocabulary.
        """
        if not token_ids:
            raise ConfigError("the prompt has no tokens")
        if len(token_ids) >= self._max_model_len:
            raise PromptTooLongError(
                f"the prompt is {len(token_ids)} tokens, and the context of {self._max_model_len} must also "
                "hold a completion",
                "shorten the prompt, or raise max_model_len",
            )
        outside = next((i for i in token_ids if not 0 <= i < self._vocab_size), None)
        if outside is not None:
            raise ConfigError(
                f"token id {outside} is outside the teacher's vocabulary, 0 to {self._vocab_size - 1}",
                "make the ids with the teacher's own tokenizer",
            )

    def _checked(self, token_ids: Sequence[int]) -> Int32Array:
        self.check_ids(token_ids)
        return np.asarray(token_ids, np.int32)

    def decode(self, completion_token_ids: Sequence[int], eos_token_ids: Sequence[int]) -> str:
        """The completion as text, special tokens included, without a final end token."""
        ids = [int(token_id) for token_id in completion_token_ids]
        if ids and ids[-1] in eos_token_ids:
            ids.pop()
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


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


def end_tokens(model_dir: Path, tokenizer: Untyped) -> tuple[int, ...]:
    """Ids that end a completion, ascending: the tokenizer's own and those of the generation config.

    Args:
        model_dir: May have a `generation_config.json`.
        tokenizer: The model's tokenizer.
    """
    found: set[int] = set()
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    path = model_dir / "generation_config.json"
    generation: Untyped = json.loads(path.read_text()) if path.is_file() else {}
    listed: object = generation.get("eos_token_id")
    if isinstance(listed, int):
        found.add(listed)
    elif isinstance(listed, list):
        found.update(int(token_id) for token_id in cast("list[int]", listed))
    return tuple(sorted(found))
