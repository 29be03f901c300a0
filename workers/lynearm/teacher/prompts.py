"""Prompts, and how one is read out of a row: a line of JSON, or a row of a table.

    {"prompt": "What is 3 + 4?"}
    {"id": "sky-1", "messages": [{"role": "user", "content": "Why?"}], "tags": {"topic": "facts"}}
    {"prompt_token_ids": [1, 4093, 198]}

A row that is not a prompt is reported with its place; the others are untouched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """What the teacher is asked: a text, a chat, or token ids."""

    prompt_id: str
    """Unique in its job; a digest of the content where the row gives none."""
    text: str = ""
    """Empty for a chat or token ids."""
    messages: tuple[ChatMessage, ...] = ()
    """Empty for a text or token ids."""
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    file: str = ""
    line: int = 0
    """Where it stands, from 1: a line of a file, or a row of a table; for messages to people."""
    token_ids: tuple[int, ...] = ()
    """As they go into the model, special tokens and all; empty for a text or a chat."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line or row of a prompt source that is not used, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class PromptColumns:
    """Which fields of a row say what."""

    prompt: str = "prompt"
    """A text."""
    messages: str = "messages"
    """A list of {"role", "content"}."""
    token_ids: str = "prompt_token_ids"
    """A list of token ids."""
    prompt_id: str = "id"
    """A text or a whole number."""
    tags: str = "tags"
    """An object of texts; not looked at where `tag_columns` are named."""
    tag_columns: tuple[tuple[str, str], ...] = ()
    """(tag, field) pairs: fields whose values become tags."""
    named: tuple[str, ...] = ()
    """Fields that somebody asked for by name: a table without one is refused."""

    @property
    def contents(self) -> tuple[str, ...]:
        """The fields of which a row has exactly one; those that are named "" are not looked at."""
        return tuple(name for name in (self.prompt, self.messages, self.token_ids) if name)

    @property
    def optional(self) -> tuple[str, ...]:
        """The fields that a row may have besides."""
        return self.prompt_id, *([name for _, name in self.tag_columns] or [self.tags])


def parse_prompt(
    line: bytes, *, file: str = "", line_number: int = 0, columns: PromptColumns = PromptColumns()
) -> Prompt:
    """The prompt in a line of JSON.

    Raises:
        PromptFileError: saying what is wrong with the line.
    """
    fields = parse_object(line, first=line_number == 1)
    return prompt_from_fields(fields, columns, file=file, line=line_number)


def parse_object(line: bytes, *, first: bool = False) -> dict[str, object]:
    """The JSON object in a line.

    Args:
        line: UTF-8.
        first: Of its file, so that a byte order mark may precede it.

    Raises:
        PromptFileError: saying what is wrong with the line.
    """
    try:
        parsed: object = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise PromptFileError(f"not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise PromptFileError(f"expected a JSON object, found {type(parsed).__name__}")
    return cast("dict[str, object]", parsed)


def prompt_from_fields(
    fields: Mapping[str, object], columns: PromptColumns, *, file: str = "", line: int = 0
) -> Prompt:
    """The prompt in a row.

    Args:
        fields: Values by name. One that is None counts as absent, since tables have no other way to say so.
        columns: Which of them say what.
        file: Where the row stands.
        line: And its number.

    Raises:
        PromptFileError: saying what is wrong with the row.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    found = [name for name in columns.contents if name in given]
    if len(found) != 1:
        either = " or ".join(repr(name) for name in columns.contents)
        said = f", found {' and '.join(repr(name) for name in found)}" if found else ""
        raise PromptFileError(f"expected {'either ' if ' or ' in either else ''}{either}{said}")
    text = _text(given[columns.prompt], columns.prompt) if columns.prompt in found else ""
    messages = _messages(given[columns.messages], columns.messages) if columns.messages in found else ()
    token_ids = _token_ids(given[columns.token_ids], columns.token_ids) if columns.token_ids in found else ()
    return Prompt(
        prompt_id=_prompt_id(given.get(columns.prompt_id), columns.prompt_id)
        or content_id(text, messages, token_ids),
        text=text,
        messages=messages,
        token_ids=token_ids,
        tags=_tags(given, columns),
        file=file,
        line=line,
    )


def prompt_line(prompt: Prompt) -> bytes:
    """The prompt as a line of JSON, without where it stood; `parse_prompt` is the inverse."""
    fields: dict[str, object] = {"id": prompt.prompt_id}
    if prompt.token_ids:
        fields["prompt_token_ids"] = prompt.token_ids
    elif prompt.messages:
        fields["messages"] = [{"role": one.role, "content": one.content} for one in prompt.messages]
    else:
        fields["prompt"] = prompt.text
    if prompt.tags:
        fields["tags"] = dict(prompt.tags)
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def content_id(text: str, messages: Sequence[ChatMessage], token_ids: Sequence[int] = ()) -> str:
    """The id of a prompt that has none of its own: a digest of what is asked."""
    content: list[object] = [text, *([message.role, message.content] for message in messages)]
    if token_ids:
        content.append(list(token_ids))
    return f"sha256-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}"


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


def _messages(value: object, name: str) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise PromptFileError(f"'{name}' is not a list with at least one message")
    messages: list[ChatMessage] = []
    for index, entry in enumerate(cast("list[object]", value)):
        if not isinstance(entry, dict):
            raise PromptFileError(f"{name}[{index}] is {type(entry).__name__}, expected an object")
        fields = cast("dict[str, object]", entry)
        role = _text(fields.get("role"), f"{name}[{index}].role")
        messages.append(ChatMessage(role, _text(fields.get("content"), f"{name}[{index}].content")))
    if messages[-1].role == "assistant":
        raise PromptFileError(
            f"{name}[{len(messages) - 1}] is the assistant's, which the teacher is to write"
        )
    return tuple(messages)


def _token_ids(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise PromptFileError(f"'{name}' is not a list with at least one token id")
    token_ids = cast("list[object]", value)
    for index, token_id in enumerate(token_ids):
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise PromptFileError(f"{name}[{index}] is {token_id!r:.40}, expected a token id")
    return tuple(cast("list[int]", token_ids))


def _tags(fields: Mapping[str, object], columns: PromptColumns) -> dict[str, str]:
    if columns.tag_columns:
        found = [(tag, name, fields.get(name)) for tag, name in columns.tag_columns]
        return {tag: _scalar_text(value, name) for tag, name, value in found if value is not None}
    value = _pairs_as_object(fields.get(columns.tags, {}))
    if not isinstance(value, dict):
        raise PromptFileError(f"'{columns.tags}' is {type(value).__name__}, expected an object")
    tags: dict[str, str] = {}
    for key, text in cast("dict[str, object]", value).items():
        # A struct of a table has every key in every row.
        if text is not None:
            tags[_text(key, f"{columns.tags} key")] = _text(text, f"{columns.tags}.{key}")
    return tags


def _pairs_as_object(value: object) -> object:
    """Parquet's type "map" comes as a list of pairs, where JSON has an object; anything else as it is."""
    if not isinstance(value, list):
        return value
    entries = cast("list[object]", value)
    if all(isinstance(entry, tuple) for entry in entries):
        return dict(cast("list[tuple[object, object]]", entries))
    return entries


def _scalar_text(value: object, name: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else _text(value, name)


def _prompt_id(value: object, name: str) -> str:
    if value is None:
        return ""
    whole = isinstance(value, int) and not isinstance(value, bool)
    prompt_id = str(value) if whole else _text(value, name)
    if len(prompt_id.encode()) > MAX_ID_BYTES:
        raise PromptFileError(f"'{name}' is {len(prompt_id.encode())} bytes, expected at most {MAX_ID_BYTES}")
    if "\0" in prompt_id:
        raise PromptFileError(f"'{name}' holds the character NUL")
    return prompt_id
