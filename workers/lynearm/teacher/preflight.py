"""What can be refused of a job before anything starts: its model and its prompts, by the files of the model.

Where those files are not on the machine of the command, as on the head of a cluster, nothing is checked here:
the workers refuse the same things, model by model and prompt by prompt, before they generate a token for it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, TypeAlias

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.memory import check_fits, estimate_memory, free_memory, read_model_config
from lynearm.teacher.model_source import find_model_files
from lynearm.teacher.prompts import Prompt
from lynearm.teacher.tokenizer import PromptTokenizer
from lynearm.wire.errors import ConfigError, PromptTooLongError

logger = logging.getLogger(__name__)

Untyped: TypeAlias = Any
"""The library transformers, which ships no types that a strict checker accepts."""

MAX_KNOWN_SHAPES = 4096
"""Sequences of roles that are remembered as good; others are tried each time."""

_GPU_DEVICE = Path("/dev/nvidiactl")


class PromptChecker:
    """Finds prompts that the teacher will not take, without tokenising texts.

    Args:
        tokenizer: The teacher's.
    """

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self._tokenizer = tokenizer
        self._good_shapes: set[tuple[str, ...]] = set()

    def problem(self, prompt: Prompt) -> str:
        """Why the teacher will not take a prompt; empty where it will, as far as can be said."""
        try:
            if prompt.token_ids:
                self._tokenizer.check_ids(prompt.token_ids)
            else:
                self._check_template(prompt)
        except (ConfigError, PromptTooLongError) as error:
            return error.message
        return ""

    def _check_template(self, prompt: Prompt) -> None:
        # Templates object to roles and their order. To render every one of millions would take minutes.
        shape = tuple(message.role for message in prompt.messages)
        if shape in self._good_shapes:
            return
        self._tokenizer.chat_text(prompt)
        if len(self._good_shapes) < MAX_KNOWN_SHAPES:
            self._good_shapes.add(shape)


def load_checker(config: TeachConfig) -> PromptChecker | None:
    """Look at the model, and return what checks its prompts; None where its files are not here.

    Args:
        config: From `pin_model`.

    Raises:
        ConfigError: if the model does not fit into this machine's memory, where it is to run here; if the
            template has no switch for thinking that the config asks for; or a reasoning marker is no token.
    """
    directory = find_model_files(config)
    if directory is None or not (directory / "config.json").is_file():
        return None
    if runs_here(config) and any(directory.glob("*.safetensors")) and not _GPU_DEVICE.exists():
        check_fits(estimate_memory(directory, config, on_cpu=True), free_memory(), config)
    try:
        from transformers import AutoTokenizer

        tokenizer_class: Untyped = AutoTokenizer
        tokenizer: Untyped = tokenizer_class.from_pretrained(directory)
    # Without the library, or with a tokenizer of a kind that only the workers know.
    except Exception as error:
        logger.debug("prompts are not checked beforehand: %s", error)
        return None
    model = read_model_config(directory)
    width, length = model.get("vocab_size"), model.get("max_position_embeddings")
    max_model_len = min(config.max_model_len, length) if isinstance(length, int) else config.max_model_len
    return PromptChecker(
        PromptTokenizer(
            tokenizer,
            config,
            max_model_len=max_model_len,
            vocab_size=width if isinstance(width, int) else 0,
        )
    )


def runs_here(config: TeachConfig) -> bool:
    """Whether the workers of a job run on this machine, in a Ray of its own."""
    return config.ray_address == "local" or not (config.ray_address or os.environ.get("RAY_ADDRESS"))
