"""The teacher's chat template, with what one run tells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.prompts import ChatMessage
from lynearm.wire.errors import ConfigError

Untyped: TypeAlias = Any
"""A transformers tokenizer: it ships no types that a strict checker accepts."""

_THINKING_SWITCHES = ("enable_thinking", "thinking")
"""What templates call it: Qwen3 and most others; DeepSeek V3.1 and Granite."""

_PROBE = (ChatMessage("user", "Hi"),)


class ChatTemplate:
    """Writes chats as the teacher reads them.

    Args:
        tokenizer: Holds the template, if there is one.
        config: Reads `thinking` and `template_args`.

    Raises:
        ConfigError: if the config sets `thinking`, and the template has no switch for it.
    """

    def __init__(self, tokenizer: Untyped, config: TeachConfig) -> None:
        self._tokenizer = tokenizer
        self._arguments: dict[str, object] = dict(config.template_args)
        if config.thinking is not None:
            self._arguments[self._switch()] = config.thinking
        elif self._arguments and not self.exists:
            raise ConfigError("template_args are given, and the teacher has no chat template")

    @property
    def exists(self) -> bool:
        """Whether the teacher has a template."""
        return self._tokenizer.chat_template is not None

    def render(self, messages: Sequence[ChatMessage], **more: object) -> str:
        """The text of a chat, up to where the teacher's answer begins.

        Args:
            messages: At least one.
            more: Arguments that override the run's.

        Raises:
            ConfigError: without a template, or if it refuses the messages.
        """
        if not self.exists:
            raise ConfigError(
                "the prompt is a chat, and the teacher has no chat template", "give it as a plain prompt"
            )
        try:
            text: Untyped = self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=True,
                tokenize=False,
                **{**self._arguments, **more},
            )
        # Templates raise what they like: jinja2's errors, and whatever their own code does.
        except Exception as error:
            roles = ", ".join(message.role for message in messages[:8])
            raise ConfigError(
                f"the chat template refuses the messages ({roles}): {error}",
                "give it the roles, in the order, that it takes",
            ) from error
        return str(text)

    def _switch(self) -> str:
        if self.exists:
            for name in _THINKING_SWITCHES:
                if self.render(_PROBE, **{name: True}) != self.render(_PROBE, **{name: False}):
                    return name
        raise ConfigError(
            f"the teacher's chat template has no switch for thinking: it reads neither "
            f"{' nor '.join(_THINKING_SWITCHES)}",
            "leave --thinking out; if it reads another argument, use --set template_args.NAME=VALUE",
        )
