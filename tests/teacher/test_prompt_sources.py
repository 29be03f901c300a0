"""Prompt sources: what is taken, what is reported with its place."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.prompt_ids import SeenIds
from lynearm.teacher.prompt_sources import UsablePrompts, iterate_prompts, load_prompts
from lynearm.teacher.prompts import BadLine, ChatMessage, Prompt, parse_prompt, prompt_line
from lynearm.wire.errors import ConfigError, MissingDependencyError, PromptFileError


def make_config(source: object, **overrides: Any) -> TeachConfig:
    return TeachConfig("m", str(source), "s", **overrides)


def read(source: object, **overrides: Any) -> list[Prompt | BadLine]:
    return list(iterate_prompts(make_config(source, **overrides)))


def texts(source: object, **overrides: Any) -> list[str]:
    return [one.text if isinstance(one, Prompt) else one.reason for one in read(source, **overrides)]


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
        ('{"prompt": "a", "id": 7.5}', "'id' is float"),
        ('{"prompt": "a", "id": true}', "'id' is bool"),
        ('{"prompt": "a", "id": "a\\u0000"}', "NUL"),
        ('{"prompt_token_ids": []}', "at least one token id"),
        ('{"prompt_token_ids": [1, -1]}', "prompt_token_ids[1] is -1"),
        ('{"prompt_token_ids": [1.5]}', "prompt_token_ids[0] is 1.5"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "found 'prompt' and 'prompt_token_ids'"),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', "which the teacher is to write"),
        ('{"prompt": "a", "tags": [["a", "b"]]}', "'tags' is list"),
        (json.dumps({"prompt": "a" * (1 << 20)}), "1048576"),
        ('{"prompt": "' + "a" * (4 << 20) + '"}', "longer than"),
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


QUESTIONS = [
    {"question": f"What is {n}?", "answer": f"#### {n}", "level": n, "id": n, "unused": b"\xff"}
    for n in range(600)
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.parquet"
    pq.write_table(pa.Table.from_pylist(QUESTIONS), path, row_group_size=100)
    return path


def test_parquet_and_json_lines_give_the_same_prompts(questions: Path, tmp_path: Path) -> None:
    lines = [{key: value for key, value in row.items() if key != "unused"} for row in QUESTIONS]
    same = write(tmp_path / "same.jsonl", *lines)
    chosen: dict[str, Any] = {"prompt_column": "question", "tag_columns": ("reference=answer", "level")}
    prompts = read(questions, **chosen)
    assert prompts[7] == Prompt(
        "7", "What is 7?", tags={"reference": "#### 7", "level": "7"}, file=str(questions), line=8
    )
    for one, other in zip(prompts, read(same, **chosen), strict=True):
        assert isinstance(one, Prompt)
        assert isinstance(other, Prompt)
        assert (one.prompt_id, one.text, one.tags, one.line) == (
            other.prompt_id,
            other.text,
            other.tags,
            other.line,
        )


def test_parquet_holds_chats_token_ids_and_tags_too(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    chat = [{"role": "user", "content": "Why?"}]
    rows = [
        {"prompt": "Hi", "messages": None, "prompt_token_ids": None, "tags": [("a", "b")]},
        {"prompt": None, "messages": chat, "prompt_token_ids": None, "tags": None},
        {"prompt": None, "messages": None, "prompt_token_ids": [1, 2], "tags": []},
        {"prompt": None, "messages": None, "prompt_token_ids": None, "tags": []},
    ]
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [
            ("prompt", pa.string()),
            ("messages", pa.list_(message)),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("tags", pa.map_(pa.string(), pa.string())),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    plain, talk, ids, nothing = read(path)
    assert isinstance(plain, Prompt)
    assert isinstance(talk, Prompt)
    assert isinstance(ids, Prompt)
    assert (plain.text, dict(plain.tags)) == ("Hi", {"a": "b"})
    assert talk.messages == (ChatMessage("user", "Why?"),)
    assert ids.token_ids == (1, 2)
    assert str(nothing) == f"{path}:4: expected either 'prompt' or 'messages' or 'prompt_token_ids'"


def test_a_tag_may_be_a_struct_with_gaps(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    rows = [{"prompt": "a", "tags": {"x": "1", "y": None}}, {"prompt": "b", "tags": {"x": None, "y": "2"}}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [one.tags for one in read(path) if isinstance(one, Prompt)] == [{"x": "1"}, {"y": "2"}]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({}, "has no column 'prompt' or 'messages' or 'prompt_token_ids', but answer, id, level, question"),
        ({"prompt_column": "questoin"}, "has no column 'questoin': its columns are answer, id, level"),
        ({"prompt_column": "question", "id_column": "uid"}, "has no column 'uid'"),
        ({"prompt_column": "question", "tag_columns": ("a=b",)}, "has no column 'b'"),
    ],
)
def test_a_table_without_the_columns_is_refused_with_those_it_has(
    questions: Path, columns: dict[str, Any], said: str
) -> None:
    with pytest.raises(PromptFileError, match=said):
        read(questions, **columns)


def test_a_damaged_parquet_file_is_named(questions: Path) -> None:
    questions.write_bytes(questions.read_bytes()[:-40])
    with pytest.raises(PromptFileError, match=r"cannot read prompts from .*questions\.parquet: "):
        read(questions, prompt_column="question")


def test_a_missing_library_is_named_with_its_remedy(questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lynearm\[parquet\]'"):
        read(questions)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lynearm\[datasets\]'"):
        read("hf:openai/gsm8k?split=train")


def test_patterns_and_directories_are_read_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"prompt": "two"}, "{")
    write(tmp_path / "a.jsonl", {"prompt": "one", "id": "x"})
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"prompt": "three"}\n{"prompt": "four", "id": "x"}\n')
    (tmp_path / "notes.txt").write_text("not a prompt")
    assert texts(tmp_path)[:2] == texts(tmp_path / "[ab].jsonl")[:2] == ["one", "two"]
    assert texts(tmp_path)[3:] == ["three", f"id 'x' is taken by {tmp_path / 'a.jsonl'}:1"]
    with pytest.raises(PromptFileError, match="no file matches"):
        read(tmp_path / "z*.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptFileError, match="holds no file named"):
        read(tmp_path / "empty")


def test_a_cut_off_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "one"}\n' * 100)[:-9])
    with pytest.raises(PromptFileError, match="cannot read prompts from"):
        read(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_datasets_of_the_hub_and_of_a_directory(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.Dataset.from_list([{key: row[key] for key in ("question", "id")} for row in QUESTIONS])
    datasets.DatasetDict(train=made, test=made.select(range(3))).save_to_disk(tmp_path / "saved")
    saved = f"hf:{tmp_path / 'saved'}"
    assert texts(f"{saved}?split=test", prompt_column="question") == [f"What is {n}?" for n in range(3)]
    assert len(read(f"{saved}?split=train", prompt_column="question", limit=500)) == 500
    with pytest.raises(
        PromptFileError, match=r"has several splits: test, train: name one, as in .*\?split=test"
    ):
        read(saved)
    with pytest.raises(PromptFileError, match="has no split 'dev': test, train"):
        read(f"{saved}?split=dev")
    with pytest.raises(PromptFileError, match="has no column 'prompt'"):
        read(f"{saved}?split=test")
    # A directory as somebody downloaded it, through the same code as a name of the hub.
    (tmp_path / "repository").mkdir()
    questions.rename(tmp_path / "repository" / "train.parquet")
    repository = f"hf:{tmp_path / 'repository'}?split=train"
    (first, *_) = read(repository, prompt_column="question", tag_columns=("answer",))
    assert first == Prompt("0", "What is 0?", tags={"answer": "#### 0"}, file=repository, line=1)
    with pytest.raises(PromptFileError, match="cannot load hf:"):
        read(f"hf:{tmp_path / 'repository'}?split=nothing")


@pytest.mark.parametrize("source", ["hf:", "hf:a/b?splitt=x", "hf:a/b?split", "hf:a/b?split=a&split=b"])
def test_a_dataset_that_is_named_wrongly_is_refused(source: str) -> None:
    with pytest.raises(PromptFileError, match=r"names no dataset.*write it as hf:OWNER/NAME"):
        read(source)


def test_a_system_prompt_makes_a_chat_and_another_question_of_it(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Why?"}]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "Hi"},
        {"prompt": "Ho", "id": "named"},
        {"messages": own},
        {"prompt_token_ids": [1]},
    )
    plain, named, chat, ids = read(path, system="Be brief.")
    assert isinstance(plain, Prompt)
    assert isinstance(named, Prompt)
    assert isinstance(chat, Prompt)
    assert isinstance(ids, BadLine)
    assert plain.messages == (ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"))
    assert plain.text == ""
    assert named.prompt_id == "named"
    assert chat.messages[0].content == "Be long."
    assert ids.reason == "token ids take no system prompt"
    others = {one.prompt_id for one in read(path, system="Be kind.") if isinstance(one, Prompt)}
    assert plain.prompt_id not in others
    assert {"named", chat.prompt_id} <= others


def test_the_prompts_of_a_job_are_the_same_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "one"}, "{", {"prompt": "two"}, {"prompt": "three"})
    prompts = UsablePrompts(make_config(path, limit=3))
    assert [one.text for one in prompts] == [one.text for one in prompts] == ["one", "two"]
    assert (prompts.bad_line_count, [line.line for line in prompts.bad_lines]) == (1, [2])
    with pytest.raises(PromptFileError, match=r"p\.jsonl:2: not JSON.*leave out --strict"):
        list(UsablePrompts(make_config(path, strict=True)))
    with pytest.raises(PromptFileError, match="correct the lines"):
        list(UsablePrompts(make_config(write(tmp_path / "bad.jsonl", "{", "["))))
    with pytest.raises(PromptFileError, match="holds no prompts"):
        list(UsablePrompts(make_config(write(tmp_path / "none.jsonl"))))


def test_columns_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        make_config("p", prompt_column="a", messages_column="b")


words = st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text)


@given(
    st.builds(
        Prompt,
        prompt_id=words.filter(lambda text: len(text.encode()) <= 256),
        text=words,
        tags=st.dictionaries(words, words, max_size=3),
    )
    | st.builds(
        Prompt, prompt_id=st.just("x"), messages=st.tuples(st.builds(ChatMessage, st.just("user"), words))
    )
    | st.builds(Prompt, prompt_id=st.just("x"), token_ids=st.lists(st.integers(0, 9), min_size=1).map(tuple))
)
def test_a_prompt_comes_back_from_its_line(prompt: Prompt) -> None:
    line = prompt_line(prompt)
    assert b"\n" not in line
    assert parse_prompt(line) == prompt


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["f", "g"])), max_size=30))
def test_seen_ids_tell_where_each_was_first(ids: list[tuple[str, str]]) -> None:
    first: dict[str, tuple[str, int]] = {}
    with SeenIds() as seen:
        for line, (prompt_id, file) in enumerate(ids):
            assert seen.add(prompt_id, file, line) == first.get(prompt_id)
            first.setdefault(prompt_id, (file, line))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_number_of_prompts(kind: str, tmp_path: Path) -> None:
    def peak_kib(count: int) -> int:
        path = tmp_path / f"{count}.{kind}"
        rows = [{"id": f"prompt-{n:08}", "prompt": f"{n} " * 60} for n in range(count)]
        if kind == "jsonl":
            write(path, *rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        code = (
            "import resource, sys\n"
            "from lynearm.teacher.config import TeachConfig\n"
            "from lynearm.teacher.prompt_sources import UsablePrompts\n"
            "count = sum(1 for _ in UsablePrompts(TeachConfig('m', sys.argv[1], 's')))\n"
            "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
        read_count, peak = map(int, done.stdout.split())
        assert read_count == count
        return peak

    # 60,000 prompts of 300 bytes are 18 MB on disk, and several times that as objects.
    assert peak_kib(60_000) - peak_kib(2000) < 16 << 10
