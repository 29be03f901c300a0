"""Prompt files: what is taken, what is reported with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lynearm.teacher.prompts import ChatMessage, load_prompts
from lynearm.wire.errors import PromptFileError


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_plain_and_chat_prompts_keep_their_order_ids_and_tags(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    path = write(
        tmp_path / "p.jsonl", {"prompt": "Hi", "tags": {"a": "b"}}, "", {"id": "x", "messages": chat}
    )
    loaded = load_prompts(path)
    plain, talk = loaded.prompts
    assert (plain.text, plain.messages, plain.tags, plain.line) == ("Hi", (), {"a": "b"}, 1)
    assert (talk.prompt_id, talk.text, talk.line) == ("x", "", 3)
    assert talk.messages == (ChatMessage("system", "Be brief."), ChatMessage("user", "Why?"))
    assert loaded.bad_lines == ()


def test_an_id_is_a_digest_of_the_content_and_not_of_the_tags(tmp_path: Path) -> None:
    first = load_prompts(write(tmp_path / "a", {"prompt": "Hi"}, {"prompt": "Ho"})).prompts
    second = load_prompts(write(tmp_path / "b", {"prompt": "Ho", "tags": {"a": "b"}})).prompts
    assert first[1].prompt_id == second[0].prompt_id != first[0].prompt_id


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("{}", "either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', "either 'prompt' or 'messages'"),
        ('{"prompt": 3}', "'prompt' is int"),
        ('{"prompt": "  "}', "'prompt' is empty"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content"),
        ('{"messages": ["hi"]}', "messages[0] is str"),
        ('{"prompt": "a", "id": 7}', "'id' is int"),
        (json.dumps({"prompt": "a", "id": "ü" * 129}), "258 bytes"),
        ('{"prompt": "a", "tags": {"n": 1}}', "'tags.n' is int"),
        ('{"prompt": "a", "id": "good"}', "taken by line 1"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_untouched(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "one", "id": "good"}, line, {"prompt": "three", "id": "z"})
    loaded = load_prompts(path)
    assert [prompt.prompt_id for prompt in loaded.prompts] == ["good", "z"]
    (bad,) = loaded.bad_lines
    assert str(bad).startswith(f"{path}:2: ")
    assert reason in bad.reason


def test_bytes_that_are_not_utf8_are_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n{"prompt": "\xff"}\n')
    loaded = load_prompts(path)
    assert len(loaded.prompts) == 1
    assert "not UTF-8 at byte 12" in loaded.bad_lines[0].reason


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "ok"}\r\n')
    assert load_prompts(path).prompts[0].text == "ok"


def test_strict_refuses_a_file_with_a_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "ok"}, "{")
    with pytest.raises(PromptFileError, match=r"p\.jsonl:2: not JSON"):
        load_prompts(path, strict=True)


@pytest.mark.parametrize("content", ["", "\n\n", "{\n"])
def test_a_file_without_a_prompt_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(PromptFileError):
        load_prompts(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=r"none\.jsonl: No such file"):
        load_prompts(tmp_path / "none.jsonl")
