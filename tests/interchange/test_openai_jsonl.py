"""What vLLM's OpenAI server and its batch runner wrote, as a stream.

`data/vllm_batch.jsonl` is the output of `python -m vllm.entrypoints.openai.run_batch`, and
`data/vllm_responses.jsonl` is what `vllm.entrypoints.openai.api_server` answered, to requests of
`data/requests.jsonl`, by vLLM 0.32.0 with `build_tiny_llama()` under the name "tiny".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interchange.material import exists, read, run, spec_of
from models.tiny_llama import build_tiny_llama

from lynearm.interchange.json_fields import JsonObject
from lynearm.interchange.openai_logprobs import (
    Position,
    chat_positions,
    completion_positions,
    read_completion,
)
from lynearm.interchange.teacher_files import load_teacher_files
from lynearm.interchange.tokens import TokenNames
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.specs import alignment_differences
from lynearm.wire.traces import Trace

DATA = Path(__file__).parent / "data"
BATCH = {
    line["custom_id"]: line for line in map(json.loads, (DATA / "vllm_batch.jsonl").read_text().splitlines())
}
RESPONSES = [json.loads(line) for line in (DATA / "vllm_responses.jsonl").read_text().splitlines()]
CHAT, COMPLETION, TWO_PROMPTS, COMPLETION_TEXT, ECHO = RESPONSES
TEACHER_FLAGS = ("--license", "Apache-2.0", "--teacher-revision", "sha256:00")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def names(tiny: Path) -> TokenNames:
    return TokenNames(load_teacher_files(str(tiny)).tokenizer)


def write(path: Path, lines: Iterable[object]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def import_lines(target: str, path: Path, tiny: Path, stream: str, *more: str) -> tuple[int, str, str]:
    return run(
        *("import", path, "--stream", stream, "--tokenizer", tiny, *TEACHER_FLAGS, *more),
        *("--service", target, "--progress", "none"),
    )


def copied(response: Any) -> Any:
    return json.loads(json.dumps(response))


def is_what_the_model_computes(trace: Trace, model: Any) -> bool:
    """Whether a trace's logprobs are those of the model, at the positions where they are said to be."""
    import torch

    ids = np.concatenate([trace.prompt_token_ids, trace.completion_token_ids])
    with torch.no_grad():
        logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0]
    logprobs_TV = torch.log_softmax(logits, -1).numpy()[trace.prompt_token_ids.size - 1 : -1]
    positions = np.arange(trace.completion_token_ids.size)
    sampled = logprobs_TV[positions, trace.completion_token_ids]
    kept = trace.top_k.logprobs > -np.inf
    entries = np.take_along_axis(logprobs_TV, trace.top_k.token_ids, 1)
    tail = 1 - np.where(kept, np.exp(entries), 0).sum(1)
    return (
        np.allclose(trace.sampled_logprobs, sampled, atol=1e-3)
        and np.allclose(trace.top_k.logprobs[kept], entries[kept], atol=1e-3)
        and np.allclose(trace.top_k.tail_mass, tail, atol=1e-3)
    )


def test_a_batch_of_vllm_becomes_a_stream(target: str, tiny: Path, tmp_path: Path) -> None:
    names = ("chat-ids", "chat-two", "chat-bad", "chat-prompttext")
    path = write(tmp_path / "batch.jsonl", [BATCH[name] for name in names])
    code, stdout, stderr = import_lines(
        *(target, path, tiny, "batch"),
        *("--codec", "exact", "--temperature", "0.5", "--seal"),
    )
    assert code == 0, stderr
    assert "4 traces of 3 prompts imported, 48 tokens" in stdout
    assert "1 failed requests; sealed" in stdout
    assert f"skipped {path}:3: request 'chat-bad' failed: Requested sample logprobs of 50" in stderr
    found = read(target, "batch")
    assert [(trace.prompt_id, trace.sample_index) for trace in found] == [
        ("chat-ids", 0),
        ("chat-two", 0),
        ("chat-two", 1),
        ("chat-prompttext", 0),
    ]
    first = BATCH["chat-ids"]["response"]["body"]
    assert found[0].prompt_token_ids.tolist() == first["prompt_token_ids"]
    assert found[0].completion_token_ids.tolist() == first["choices"][0]["token_ids"]
    assert {trace.sampling.temperature for trace in found} == {0.5}
    assert {trace.finish_reason for trace in found} == {"length"}
    spec = spec_of(target, "batch")
    assert (spec.teacher.model, spec.teacher.vocab_size, spec.teacher.max_model_len) == ("tiny", 384, 512)
    assert spec.teacher.engine.startswith("vllm-0.32.0")
    assert (spec.codec.top_k, spec.tokenizer.eos_token_ids) == (5, (0, 2))


def test_the_logprobs_are_those_of_the_model(target: str, tiny: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny)
    lines = [BATCH["chat-ids"], BATCH["chat-two"], COMPLETION, TWO_PROMPTS]
    path = write(tmp_path / "all.jsonl", lines)
    code, _, stderr = import_lines(target, path, tiny, "checked", "--codec", "exact")
    assert code == 0, stderr
    found = read(target, "checked")
    assert len(found) == 8
    assert all(is_what_the_model_computes(trace, model) for trace in found)
    # A sampled token that is none of the five likeliest stands in its own column only.
    assert {trace.top_k.k for trace in found} == {5}


def test_a_response_to_two_prompts_is_two_prompts(target: str, tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "two.jsonl", [TWO_PROMPTS])
    assert import_lines(target, path, tiny, "two-prompts")[0] == 0
    found = [(trace.prompt_id, trace.sample_index) for trace in read(target, "two-prompts")]
    name = TWO_PROMPTS["id"]
    assert found == [(f"{name}/0", 0), (f"{name}/0", 1), (f"{name}/1", 0), (f"{name}/1", 1)]


def test_an_import_goes_on_after_a_bad_line_and_imports_nothing_twice(
    target: str, tiny: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "f.jsonl", [BATCH["chat-ids"], COMPLETION, BATCH["chat-two"]])
    whole = path.read_text()
    path.write_text(whole[:-40])
    code, _, stderr = import_lines(target, path, tiny, "cut")
    assert code == 1
    assert f"{path}:3: not JSON" in stderr
    assert "may be cut off" in stderr
    assert "the 2 prompts before it are in stream 'cut'" in stderr
    path.write_text(whole)
    code, stdout, _ = import_lines(target, path, tiny, "cut")
    assert code == 0
    assert "2 traces of 1 prompts imported" in stdout
    assert "skipped 2 prompts" in stdout
    assert [trace.prompt_id for trace in read(target, "cut")] == [
        "chat-ids",
        COMPLETION["id"],
        "chat-two",
        "chat-two",
    ]


def test_texts_are_looked_up_where_they_are_unambiguous(names: TokenNames) -> None:
    """Every text of the real chat that one id alone has is found; the others are refused."""
    chat = BATCH["chat-text"]["response"]["body"]["choices"][0]
    texts = [one["token"] for one in chat["logprobs"]["content"]]
    assert texts == ["is", "", "", "", "ӛ", "</think>", "", "s", " Fr", "us", "", "8"]
    for t, (text, token_id) in enumerate(zip(texts, chat["token_ids"], strict=True)):
        before = chat["token_ids"][t - 1] if t else None
        if text and text.isascii():
            assert names.token_id(text, before) == token_id
        else:  # parts of a character; the second byte of ӛ is written as both
            with pytest.raises(InvalidInputError, match="return_tokens_as_token_ids"):
                names.token_id(text, before)


def test_a_text_of_two_tokens_is_refused_with_the_remedy(target: str, tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "text.jsonl", [BATCH["chat-text"]])
    code, _, stderr = import_lines(target, path, tiny, "ambiguous")
    assert code == 1
    assert f"{path}:1: choices[0]: position 0: a token has no text" in stderr
    assert '"return_tokens_as_token_ids": true' in stderr
    assert read(target, "ambiguous") == []


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(InvalidInputError, match="--tokenizer"):
        TokenNames(None).token_id("is", None)
    assert TokenNames(None).token_id("token_id:17", None) == 17


def test_a_space_that_sentencepiece_hides_makes_a_text_ambiguous() -> None:
    class Pieces:
        pieces = ("▁the", "the", "▁cat", "\ufffd", "é")

        def __len__(self) -> int:
            return len(self.pieces)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [self.pieces[one] for one in ids]

        def decode(self, ids: list[int]) -> str:
            return "".join(self.pieces[one] for one in ids).replace("▁", " ").removeprefix(" ")

    names = TokenNames(Pieces())
    assert names.token_id(" the", None) == 0
    assert names.token_id(" cat", None) == names.token_id("cat", None) == 2
    with pytest.raises(InvalidInputError, match=r"'the' is the text of 2 tokens \(0, 1\)"):
        names.token_id("the", None)
    assert names.token_id("é", 1) == 4
    with pytest.raises(InvalidInputError, match="may be the rest of a character"):
        names.token_id("é", 3)


def test_clamped_logprobs_are_no_entries() -> None:
    position = Position("token_id:1", -0.5, (("token_id:1", -0.5), ("token_id:2", -9999.0)))
    made = read_completion([position], None, TokenNames(None), top_k=2, cut=False)
    assert made.top_k.token_ids.tolist() == [[1]]
    assert made.top_k.tail_mass == np.float32(1 - np.exp(np.float64(np.float32(-0.5))))
    impossible = Position("token_id:1", -9999.0, (("token_id:2", -0.5),))
    made = read_completion([impossible], None, TokenNames(None), top_k=2, cut=False)
    assert made.sampled_logprobs.tolist() == [-np.inf]


def test_rows_are_sorted_and_what_is_beyond_top_k_is_cut_only_when_asked_to() -> None:
    entries = (("token_id:1", -3.0), ("token_id:2", -0.5), ("token_id:3", -2.0))
    one = [Position("token_id:2", -0.5, entries)]
    made = read_completion(one, [2], TokenNames(None), top_k=3, cut=False)
    assert made.top_k.token_ids.tolist() == [[2, 3, 1]]
    assert made.top_k.logprobs.tolist() == [[-0.5, -2.0, -3.0]]
    with pytest.raises(InvalidInputError, match="position 0: 3 entries, and the stream keeps 2") as caught:
        read_completion(one, [2], TokenNames(None), top_k=2, cut=False)
    assert "--top-k 3" in caught.value.remedy
    made = read_completion(one, [2], TokenNames(None), top_k=2, cut=True)
    assert made.top_k.token_ids.tolist() == [[2, 3]]
    assert made.top_k.tail_mass[0] == pytest.approx(1 - np.exp(-0.5) - np.exp(-2))


def test_a_response_without_alternatives_has_no_entries(target: str, tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "none.jsonl", [BATCH["chat-none"]])
    assert import_lines(target, path, tiny, "none", "--codec", "exact")[0] == 0
    (trace,) = read(target, "none")
    assert (trace.top_k.positions, trace.top_k.k) == (12, 0)
    assert trace.top_k.tail_mass.tolist() == [1.0] * 12


def test_text_comes_from_the_tokenizer_and_without_one_from_the_server(
    target: str, tiny: Path, tmp_path: Path
) -> None:
    response = copied(CHAT)
    message = response["choices"][0]["message"]
    message["reasoning"], message["content"] = "because ", "yes"
    path = write(tmp_path / "f.jsonl", [response])
    assert import_lines(target, path, tiny, "texts")[0] == 0
    assert "yes" not in read(target, "texts")[0].completion_text
    code, _, stderr = run("import", write(tmp_path / "g.jsonl", [{**response, "id": "other"}]), "--stream",
                          "texts", "--service", target)  # fmt: skip
    assert code == 0, stderr  # The stream that exists says everything else.
    assert read(target, "texts")[1].completion_text == "because yes"


def test_what_nothing_says_is_listed_with_its_flags(target: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [CHAT])
    code, stdout, stderr = run(
        "import", path, "--stream", "unsaid", "--service", target, "--progress", "none"
    )
    assert (code, stdout) == (2, "")
    for flag in ("--tokenizer", "--license", "--teacher-revision", "--vocab-size", "--max-model-len"):
        assert flag in stderr
    assert "--teacher-model" not in stderr
    assert stderr.count("\n") == 1
    assert not exists(target, "unsaid")


def test_responses_of_two_teachers_do_not_share_a_stream_unasked(
    target: str, tiny: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "f.jsonl", [CHAT, {**COMPLETION, "model": "other"}])
    code, _, stderr = import_lines(target, path, tiny, "mixed")
    assert code == 1
    assert f"{path}:2: the response is by 'other', those before it by 'tiny'" in stderr
    assert import_lines(target, path, tiny, "unmixed", "--teacher-model", "both")[0] == 0
    assert spec_of(target, "unmixed").teacher.model == "both"


def test_another_tokenizer_is_another_stream(target: str, tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [CHAT])
    other = build_tiny_llama(tmp_path / "other", corpus=("Something else altogether.",))
    assert import_lines(target, path, tiny, "tokenized")[0] == 0
    code, _, stderr = import_lines(target, path, other, "tokenized")
    assert code == 1
    assert "tokenizer.vocab_sha256 is" in stderr


def test_no_tokenizer_is_a_usage_error(target: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [CHAT])
    (tmp_path / "hollow").mkdir()
    code, _, stderr = import_lines(target, path, tmp_path / "hollow", "untokenized")
    assert code == 2
    assert "has no tokenizer that can be loaded" in stderr


Change = Callable[[Any], object]


def choice(change: Callable[[Any], object]) -> Change:
    return lambda response: change(response["choices"][0])


def content(change: Callable[[Any], object]) -> Change:
    return choice(lambda one: change(one["logprobs"]["content"][3]))


def use(name: str, value: object) -> Change:
    return lambda fields: fields.update({name: value})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (use("id", None), "id is missing, expected a text"),
        (use("choices", []), "the response has no choices"),
        (use("choices", {}), "choices is an object, expected a list"),
        (use("object", "chat.completion.chunk"), "a piece of a streamed response"),
        (use("prompt_token_ids", None), '"return_token_ids": true'),
        (use("prompt_token_ids", [1, -1]), "prompt_token_ids goes from -1 to 1"),
        (choice(use("logprobs", None)), "choices[0]: logprobs is missing"),
        (choice(use("finish_reason", None)), "finish_reason is None"),
        (choice(use("token_ids", [1, 2])), "token_ids has 2 tokens, logprobs 12 positions"),
        (choice(use("token_ids", [7] * 12)), "position 0: token_ids says 7, logprobs token_id:28"),
        (choice(use("logprobs", {"content": None})), "logprobs.content is missing"),
        (content(use("logprob", float("nan"))), "logprobs.content[3].logprob is NaN"),
        (content(use("logprob", 10**400)), "logprobs.content[3].logprob is beyond any number"),
        (content(use("logprob", "low")), 'logprobs.content[3].logprob is "low", expected a number'),
        (content(use("token", 7)), "logprobs.content[3].token is 7, expected a text"),
        (content(use("token", "token_id:9999999999")), "token 'token_id:9999999999' is the text"),
        (content(use("token", "token_id:999")), "position 3: token_ids says 48, logprobs token_id:999"),
        (content(lambda one: one.update({"logprob": -9999.0, "top_logprobs": []})), "[3] has no logprob"),
        (content(lambda one: one["top_logprobs"].append(one["top_logprobs"][1])), "a token is there twice"),
        (content(lambda one: one["top_logprobs"][1].update({"logprob": 0.0})), "the probabilities add up to"),
        (content(lambda one: one["top_logprobs"][1].update({"token": "token_id:400"})), "outside 0..383"),
        (content(lambda one: one["top_logprobs"][1].pop("logprob")), "top_logprobs[1].logprob is missing"),
    ],
)  # fmt: skip
def test_a_wrong_response_is_named_by_file_and_line(
    target: str, tiny: Path, tmp_path: Path, change: Change, complaint: str
) -> None:
    response = copied(CHAT)
    change(response)
    path = write(tmp_path / "f.jsonl", [COMPLETION, response])
    code, stdout, stderr = import_lines(target, path, tiny, f"wrong-{tmp_path.name}")
    assert (code, stdout) == (1, "")
    assert f"{path}:2: " in stderr
    assert complaint in stderr
    assert "the 1 prompts before it are in stream" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[1]", "expected a JSON object, found a list"),
        ("{", "not JSON"),
        ('{"id": ' + "9" * 5000 + "}", "not JSON"),
        ("\udcff", "not UTF-8 at byte 0"),
        ("[" * 100_000, "not JSON"),
        ('{"custom_id": 7}', "custom_id is 7, expected a text"),
        ('{"custom_id": "a", "response": 7}', "response is 7, expected an object"),
    ],
    ids=lambda value: value[:12],
)
def test_a_line_that_is_no_response_is_named(
    target: str, tiny: Path, tmp_path: Path, line: str, complaint: str
) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogateescape") + b"\n")
    code, _, stderr = import_lines(target, path, tiny, "no-response")
    assert code == 1
    assert f"{path}:1: " in stderr
    assert complaint in stderr
    assert not exists(target, "no-response")


def test_half_a_character_does_no_harm(target: str, tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [{**CHAT, "id": "half \ud83d"}])
    assert import_lines(target, path, tiny, "half")[0] == 0
    assert [trace.prompt_id for trace in read(target, "half")] == ["half ?"]


def test_an_echoed_prompt_is_refused(target: str, tiny: Path, tmp_path: Path) -> None:
    code, _, stderr = import_lines(target, write(tmp_path / "f.jsonl", [ECHO]), tiny, "echo")
    assert code == 1
    assert 'without "echo"' in stderr


def test_requests_are_no_responses(target: str, tiny: Path) -> None:
    code, _, stderr = import_lines(target, DATA / "requests.jsonl", tiny, "requests")
    assert code == 1
    assert "requests.jsonl:1: the line has no response" in stderr


def test_a_file_of_failures_alone_is_an_error(target: str, tiny: Path, tmp_path: Path) -> None:
    code, _, stderr = import_lines(target, write(tmp_path / "f.jsonl", [BATCH["chat-bad"]]), tiny, "bad")
    assert code == 1
    assert "f.jsonl holds no response" in stderr


def test_a_pipe_is_refused_since_it_cannot_be_read_twice(target: str, tiny: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.jsonl")
    code, _, stderr = import_lines(target, tmp_path / "f.jsonl", tiny, "pipe")
    assert code == 1
    assert "no regular file" in stderr


def test_the_student_that_shares_the_tokenizer_is_aligned(target: str, tiny: Path, tmp_path: Path) -> None:
    from lynearm.student.model import read_tokenizer_spec

    assert import_lines(target, write(tmp_path / "f.jsonl", [CHAT]), tiny, "aligned")[0] == 0
    assert alignment_differences(spec_of(target, "aligned").tokenizer, read_tokenizer_spec(tiny)) == []


def test_an_id_that_comes_twice_is_refused(target: str, tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [CHAT, COMPLETION, CHAT])
    code, _, stderr = import_lines(target, path, tiny, "repeated")
    assert code == 1
    assert f"{path}:3: prompt '{CHAT['id']}' was there before" in stderr
    assert len(read(target, "repeated")) == 2


def test_errors_of_a_server_are_reported_and_passed_over(target: str, tiny: Path, tmp_path: Path) -> None:
    error = {"error": {"message": "the model\nis busy", "type": "ServerError", "code": 503}}
    refused = {"custom_id": "q", "response": {"status_code": 500, "body": None}, "error": None}
    path = write(tmp_path / "f.jsonl", [error, refused, CHAT])
    code, stdout, stderr = import_lines(target, path, tiny, "failures")
    assert code == 0
    assert "2 failed requests" in stdout
    assert f"skipped {path}:1: the model is busy" in stderr
    assert f"skipped {path}:2: request 'q' failed: status 500, no body" in stderr


def test_blank_lines_and_a_byte_order_mark_are_passed_over(target: str, tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [CHAT])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n  \n")
    assert import_lines(target, path, tiny, "blank")[0] == 0


def test_the_shapes_are_those_of_the_installed_vllm() -> None:
    """Its own classes take the recorded lines, and what they write is read alike."""
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
    completions = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
    chat: JsonObject = protocol.ChatCompletionResponse.model_validate(CHAT).model_dump()
    completion: JsonObject = completions.CompletionResponse.model_validate(COMPLETION).model_dump()
    for written, recorded, positions in (
        (chat, CHAT, chat_positions),
        (completion, COMPLETION, completion_positions),
    ):
        logprobs = [one["choices"][0]["logprobs"] for one in (copied(written), recorded)]
        assert positions(logprobs[0]) == positions(logprobs[1])
