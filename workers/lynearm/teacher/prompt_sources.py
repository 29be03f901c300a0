"""The prompts of a job, from wherever they are, one after the other.

Invariants: they come in the same order each time, with ids of which none comes twice; what cannot be used
comes as a `BadLine` in its place. Memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.preflight import PromptChecker, load_checker
from lynearm.teacher.prompt_content import MAX_CONTENT_BYTES, encode_prompt
from lynearm.teacher.prompt_ids import SeenIds
from lynearm.teacher.prompt_rows import read_rows
from lynearm.teacher.prompts import (
    BadLine,
    ChatMessage,
    Prompt,
    PromptColumns,
    content_id,
    prompt_from_fields,
)
from lynearm.wire.errors import PromptFileError

MAX_KEPT_BAD_LINES = 1000
"""Of those that `UsablePrompts` remembers, for people."""


@dataclass(frozen=True, slots=True)
class PromptFile:
    """What a source holds, in its order."""

    prompts: tuple[Prompt, ...]
    bad_lines: tuple[BadLine, ...]


class UsablePrompts:
    """The prompts of a job that are its teacher's and that it takes, as far as the model's files can tell.

    Iterate it as often as you like.

    Args:
        config: From `pin_model`; names the model, the source, its columns, a system prompt and a limit.

    Raises, when its iteration begins:
        ConfigError: as for `load_checker`.
    And while it goes on:
        PromptFileError: if the source cannot be read, holds no prompt or, with `strict`, a bad line.
        MissingDependencyError: without the package that reads it.
    """

    def __init__(self, config: TeachConfig) -> None:
        self._config = config
        self.bad_lines: tuple[BadLine, ...] = ()
        """Of the last iteration, the first `MAX_KEPT_BAD_LINES`."""
        self.bad_line_count = 0
        """All of them."""

    def __iter__(self) -> Iterator[Prompt]:
        """The usable prompts."""
        kept: list[BadLine] = []
        bad = good = 0
        route = self._config.route
        for one in iterate_prompts(self._config):
            if isinstance(one, Prompt):
                taken = one if route is None else route.take(one)
                if taken is None:
                    continue
                one = self._checked(taken)
            if isinstance(one, Prompt):
                good += 1
                yield one
                continue
            bad += 1
            if self._config.strict:
                raise _refusal(one, 0, self._config.prompts, usable=True)
            if len(kept) < MAX_KEPT_BAD_LINES:
                kept.append(one)
        self.bad_lines, self.bad_line_count = tuple(kept), bad
        if not good:
            raise _refusal(kept[0] if kept else None, max(0, bad - 1), self._config.prompts, usable=False)

    @cached_property
    def _checker(self) -> PromptChecker | None:
        return load_checker(self._config)

    def _checked(self, prompt: Prompt) -> Prompt | BadLine:
        problem = "" if self._checker is None else self._checker.problem(prompt)
        return BadLine(prompt.file, prompt.line, problem) if problem else prompt


def iterate_prompts(config: TeachConfig) -> Iterator[Prompt | BadLine]:
    """Every prompt of a job's source, and every row that is none.

    Args:
        config: Names the source, its columns, a system prompt and a limit.

    Raises:
        PromptFileError: if the source cannot be read.
        MissingDependencyError: without the package that reads it.
    """
    found = _unique(str(config.prompts), prompt_columns(config), config.system)
    # Bad rows count: the same command on the same rows, whatever was corrected in them.
    return islice(found, config.limit) if config.limit else found


def load_prompts(source: str | Path, *, strict: bool = False) -> PromptFile:
    """Every prompt of a source of moderate size.

    Args:
        source: A path, or what else `lynearm.teacher.prompt_rows` knows.
        strict: Refuse a source with any bad line.

    Raises:
        PromptFileError: if it cannot be read, holds no prompt, or, with `strict`, has a bad line.
    """
    prompts: list[Prompt] = []
    bad_lines: list[BadLine] = []
    for one in _unique(str(source), PromptColumns(), system=""):
        if isinstance(one, Prompt):
            prompts.append(one)
        else:
            bad_lines.append(one)
    if not prompts or (bad_lines and strict):
        first = bad_lines[0] if bad_lines else None
        raise _refusal(first, max(0, len(bad_lines) - 1), str(source), usable=bool(prompts))
    return PromptFile(tuple(prompts), tuple(bad_lines))


def prompt_columns(config: TeachConfig) -> PromptColumns:
    """Which fields of a row the config looks at: where it names one for the content, no other."""
    content = {
        "prompt": config.prompt_column,
        "messages": config.messages_column,
        "token_ids": config.token_ids_column,
    }
    pairs = tuple(_tag_column(text) for text in config.tag_columns)
    chosen = {name: column for name, column in content.items() if column}
    named = (*chosen.values(), *filter(None, [config.id_column]), *(column for _, column in pairs))
    default = PromptColumns()
    contents = {name: chosen.get(name, "") if chosen else getattr(default, name) for name in content}
    return PromptColumns(
        **contents, prompt_id=config.id_column or default.prompt_id, tag_columns=pairs, named=named
    )


def _tag_column(text: str) -> tuple[str, str]:
    tag, separator, column = text.partition("=")
    return (tag, column) if separator else (text, text)


def _unique(source: str, columns: PromptColumns, system: str) -> Iterator[Prompt | BadLine]:
    with SeenIds() as seen:
        for row in read_rows(source, columns):
            if isinstance(row, BadLine):
                yield row
                continue
            try:
                prompt = prompt_from_fields(row.fields, columns, file=row.file, line=row.line)
                prompt = _with_system(prompt, system, named=row.fields.get(columns.prompt_id) is not None)
                _check_size(prompt)
            except PromptFileError as error:
                yield BadLine(row.file, row.line, error.message)
                continue
            first = seen.add(prompt.prompt_id, row.file, row.line)
            if first is None:
                yield prompt
            else:
                where = f"line {first[1]}" if first[0] == row.file else f"{first[0]}:{first[1]}"
                yield BadLine(row.file, row.line, f"id {prompt.prompt_id!r} is taken by {where}")


def _with_system(prompt: Prompt, system: str, *, named: bool) -> Prompt:
    """The prompt as a chat that begins with the system prompt, unless it brings one of its own.

    Its id, where it is a digest, becomes that of the whole chat: another system prompt asks something else.
    """
    if not system or (prompt.messages and prompt.messages[0].role == "system"):
        return prompt
    if prompt.token_ids:
        raise PromptFileError("token ids take no system prompt")
    turns = prompt.messages or (ChatMessage("user", prompt.text),)
    messages = (ChatMessage("system", system), *turns)
    prompt_id = prompt.prompt_id if named else content_id("", messages)
    return replace(prompt, prompt_id=prompt_id, text="", messages=messages)


def _check_size(prompt: Prompt) -> None:
    texts = (prompt.text, *(one.content for one in prompt.messages), *prompt.tags.values())
    # A character takes at most 12 bytes of JSON, an id 11: nothing is written out for the usual prompt.
    if 12 * (sum(map(len, texts)) + len(prompt.token_ids)) > MAX_CONTENT_BYTES // 2:
        encode_prompt(prompt)


def _refusal(first: BadLine | None, others: int, source: str, *, usable: bool) -> PromptFileError:
    if first is None:
        return PromptFileError(
            f"{source} holds no prompts", 'write lines such as {"prompt": "What is 3 + 4?"}'
        )
    more = f" (and {others} more bad lines)" if others else ""
    if usable:
        return PromptFileError(f"{first}{more}", "correct the line, or leave out --strict to skip it")
    return PromptFileError(
        f"{first}{more}", "correct the lines, or name their fields with --prompt-column or --messages-column"
    )
