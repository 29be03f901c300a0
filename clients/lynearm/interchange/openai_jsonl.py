"""Reads the JSONL of OpenAI-compatible servers: a response, or a line of a batch's output, on each line.

    {"id": "chatcmpl-…", "object": "chat.completion", "choices": […], "prompt_token_ids": […], …}
    {"custom_id": "q1", "response": {"status_code": 200, "body": {…}}, "error": null}

Invariant: what is held in memory is one line and the traces in it.
"""

from __future__ import annotations

import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from lynearm.interchange.json_fields import JsonObject, object_of, parse_object, text_of
from lynearm.interchange.openai_responses import (
    ResponseFacts,
    ResponseReader,
    response_facts,
)
from lynearm.interchange.progress import FailedRequest
from lynearm.interchange.sources import PromptTraces
from lynearm.wire.errors import InvalidInputError

MAX_LINE_BYTES = 256 << 20
"""Ten times what a completion of 32 k tokens with 20 alternatives takes."""

_SHOWN_ERROR = 300


@dataclass(frozen=True, slots=True)
class _Response:
    prompt_id: str
    body: JsonObject


class OpenAiSource:
    """A JSONL file of responses. See `TraceSource`.

    Args:
        path: The file.
        reader: Makes traces of a response; may be set later, but before `prompts`.

    Raises:
        InvalidInputError: if it cannot be read.
    """

    def __init__(self, path: Path, reader: ResponseReader | None = None) -> None:
        self.path = path
        self.reader = reader
        self._read_bytes = 0
        try:
            status = path.stat()
            with path.open("rb") if stat.S_ISREG(status.st_mode) else nullcontext():
                pass
        except OSError as error:
            raise InvalidInputError(f"cannot read {path}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInputError(
                f"{path} is no regular file, and its beginning is read twice", "write it to a file first"
            )
        self.size_bytes = status.st_size

    @property
    def read_bytes(self) -> int:
        """How much of the file was read."""
        return self._read_bytes

    def first_facts(self) -> ResponseFacts | None:
        """What the first response says about the stream; None where the file has none.

        Raises:
            InvalidInputError: if a line before it, or it, is no response.
        """
        for where, found in self._responses():
            if isinstance(found, _Response):
                with _located(where):
                    return response_facts(found.body)
        return None

    def prompts(self) -> Iterator[PromptTraces | FailedRequest]:
        """The prompts in order; a response to several prompts is several of them."""
        if self.reader is None:
            raise ValueError("no reader was set")
        for where, found in self._responses():
            if isinstance(found, FailedRequest):
                yield found
                continue
            with _located(where):
                made = self.reader.read(found.prompt_id, found.body)
            for prompt_id, traces in made:
                yield PromptTraces(prompt_id, traces, where)

    def _responses(self) -> Iterator[tuple[str, _Response | FailedRequest]]:
        with self.path.open("rb") as file:
            for number, line in _lines(file, self.path):
                self._read_bytes = file.tell()
                if line.strip():
                    where = f"{self.path}:{number}"
                    with _located(where):
                        found = _unwrap(parse_object(line), where)
                    yield where, found
            self._read_bytes = self.size_bytes


@contextmanager
def _located(where: str) -> Generator[None]:
    """Puts file and line before the message of an error."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: {error.message}", error.remedy) from error


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InvalidInputError(
                f"{path}:{number}: a line of more than {MAX_LINE_BYTES} bytes", "expected one response a line"
            )
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _unwrap(fields: JsonObject, where: str) -> _Response | FailedRequest:
    """The response of a line, which may be a line of a batch's output."""
    if "custom_id" not in fields:
        if fields.get("error") or fields.get("object") == "error":
            return FailedRequest(where, _shown(fields.get("error") or fields.get("message")))
        return _Response(text_of(fields.get("id"), "id"), fields)
    prompt_id = text_of(fields["custom_id"], "custom_id")
    if "response" not in fields and "error" not in fields:
        raise InvalidInputError("the line has no response", "name the output of the batch, not its requests")
    response = fields.get("response")
    body = object_of(response, "response").get("body") if response is not None else None
    if fields.get("error") or body is None:
        status = object_of(response, "response").get("status_code") if response is not None else None
        reason = _shown(fields.get("error")) if fields.get("error") else f"status {status}, no body"
        return FailedRequest(where, f"request {prompt_id!r} failed: {reason}")
    return _Response(prompt_id, object_of(body, "response.body"))


def _shown(error: object) -> str:
    """The message inside an error, however deep the server wrapped it."""
    inner = error
    while isinstance(inner, dict):
        fields = cast("JsonObject", inner)
        inner = fields.get("error") or fields.get("message") or "no message"
    return " ".join(str(inner).split())[:_SHOWN_ERROR]
