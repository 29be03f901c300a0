"""Prompt files: JSON lines, each with a `prompt` or chat `messages`, and maybe `id` and `tags`.

    {"prompt": "What is 3 + 4?"}
    {"id": "sky-1", "messages": [{"role": "user", "content": "Why?"}], "tags": {"topic": "facts"}}

A line that is not a prompt is skipped and reported with file and line number; the others are untouched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from lynearm.wire.errors import PromptFileError

MAX_ID_BYTES = 256
"""UTF-8 bytes of a prompt id."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the teacher is asked: a text, or a chat."""

    prompt_id: str
    """Unique in its file; a digest of the content where the line gives none."""
    text: str = ""
    """Empty for a chat."""
    messages: tuple[ChatMessage, ...] = ()
    """Empty for a plain text."""
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    file: str = ""
    line: int = 0
    """Where it stands, from 1; for messages to people."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of a prompt file that is not used, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class PromptFile:
    """What a prompt file holds, in its order."""

    prompts: tuple[Prompt, ...]
    bad_lines: tuple[BadLine, ...]


def load_prompts(path: Path, *, strict: bool = False) -> PromptFile:
    """Read a prompt file.

    Args:
        path: JSON lines in UTF-8; blank lines are passed over.
        strict: Refuse a file with any bad line.

    Raises:
        PromptFileError: if the file cannot be read, holds no prompt, or, with `strict`, has a bad line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise PromptFileError(f"cannot read prompts from {path}: {error.strerror}") from error
    prompts: list[Prompt] = []
    bad_lines: list[BadLine] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = parse_prompt(line, file=str(path), line_number=number)
            if prompt.prompt_id in line_of_id:
                first = line_of_id[prompt.prompt_id]
                raise PromptFileError(f"id {prompt.prompt_id!r} is taken by line {first}")
        except PromptFileError as error:
            bad_lines.append(BadLine(str(path), number, error.message))
            continue
        line_of_id[prompt.prompt_id] = number
        prompts.append(prompt)
    _refuse(path, prompts, bad_lines, strict=strict)
    return PromptFile(tuple(prompts), tuple(bad_lines))


def parse_prompt(line: bytes, *, file: str = "", line_number: int = 0) -> Prompt:
    """One line of a prompt file.

    Raises:
        PromptFileError: saying what is wrong with the line.
    """
    try:
        parsed: object = json.loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise PromptFileError(f"not UTF-8 at byte {error.start}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptFileError(f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise PromptFileError(f"expected a JSON object, found {type(parsed).__name__}")
    fields = cast("dict[str, object]", parsed)
    if ("prompt" in fields) == ("messages" in fields):
        raise PromptFileError("expected either 'prompt' or 'messages'")
    text = _text(fields["prompt"], "prompt") if "prompt" in fields else ""
    messages = _messages(fields["messages"]) if "messages" in fields else ()
    return Prompt(
        prompt_id=_prompt_id(fields.get("id"), text, messages),
        text=text,
        messages=messages,
        tags=_tags(fields.get("tags", {})),
        file=file,
        line=line_number,
    )


def _refuse(path: Path, prompts: list[Prompt], bad_lines: list[BadLine], *, strict: bool) -> None:
    if bad_lines and (strict or not prompts):
        more = f" (and {len(bad_lines) - 1} more bad lines)" if len(bad_lines) > 1 else ""
        remedy = "correct the line, or leave out --strict to skip it" if prompts else "correct the lines"
        raise PromptFileError(f"{bad_lines[0]}{more}", remedy)
    if not prompts:
        raise PromptFileError(f"{path} holds no prompts", 'write lines such as {"prompt": "What is 3 + 4?"}')


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise PromptFileError(f"'{name}' is {type(value).__name__}, expected a string")
    if not value.strip():
        raise PromptFileError(f"'{name}' is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptFileError(
            f"'{name}' holds half of a surrogate pair at character {error.start}"
        ) from error
    return value


def _messages(value: object) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise PromptFileError("'messages' is not a list with at least one message")
    messages: list[ChatMessage] = []
    for index, entry in enumerate(cast("list[object]", value)):
        if not isinstance(entry, dict):
            raise PromptFileError(f"messages[{index}] is {type(entry).__name__}, expected an object")
        fields = cast("dict[str, object]", entry)
        role = _text(fields.get("role"), f"messages[{index}].role")
        messages.append(ChatMessage(role, _text(fields.get("content"), f"messages[{index}].content")))
    return tuple(messages)


def _tags(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise PromptFileError(f"'tags' is {type(value).__name__}, expected an object")
    tags: dict[str, str] = {}
    for key, text in cast("dict[str, object]", value).items():
        tags[_text(key, "tags key")] = _text(text, f"tags.{key}")
    return tags


def _prompt_id(value: object, text: str, messages: tuple[ChatMessage, ...]) -> str:
    if value is None:
        content = json.dumps([text, *([message.role, message.content] for message in messages)])
        return f"sha256-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
    prompt_id = _text(value, "id")
    if len(prompt_id.encode()) > MAX_ID_BYTES:
        raise PromptFileError(f"'id' is {len(prompt_id.encode())} bytes, expected at most {MAX_ID_BYTES}")
    return prompt_id
