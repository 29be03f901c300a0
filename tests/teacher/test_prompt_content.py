"""Prompts as bytes of the queue, and back."""

from __future__ import annotations

import pytest

from lynearm.teacher.prompt_content import MAX_CONTENT_BYTES, decode_prompt, encode_prompt
from lynearm.teacher.prompts import ChatMessage, Prompt
from lynearm.wire.errors import PromptFileError

PROMPTS = [
    Prompt("plain", "What is 3 + 4?"),
    Prompt("tags", "Grüße 東京\n\u2028\x00", tags={"topic": "names", "b": "2"}),
    Prompt("chat", messages=(ChatMessage("system", "Be brief."), ChatMessage("user", "Why?"))),
    Prompt('quotes "and" \\', '{"prompt": "nested"}'),
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.prompt_id)
def test_a_prompt_comes_back_as_it_was(prompt: Prompt) -> None:
    encoded = encode_prompt(prompt)
    assert encoded.prompt_id == prompt.prompt_id
    assert decode_prompt(encoded.prompt_id, encoded.content) == prompt


def test_where_a_prompt_came_from_does_not_make_it_another() -> None:
    assert encode_prompt(Prompt("a", "x", file="one.jsonl", line=1)) == encode_prompt(Prompt("a", "x"))


def test_what_the_queue_does_not_take_is_refused_by_name() -> None:
    with pytest.raises(PromptFileError, match="prompt 'long' takes 1048590 bytes"):
        encode_prompt(Prompt("long", "x" * (MAX_CONTENT_BYTES + 1)))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"prompt": 3}', b"\xff"])
def test_what_is_no_prompt_is_refused(content: bytes) -> None:
    with pytest.raises(PromptFileError):
        decode_prompt("a", content)
