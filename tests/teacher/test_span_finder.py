"""Spans of real tokenizers: markers of every kind, and answers found in the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tiny_llama import write_tokenizer

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.span_finder import SpanFinder
from lynearm.teacher.text_positions import TokenPositions
from lynearm.wire.errors import ConfigError
from lynearm.wire.traces import FinishReason, TokenSpan

HARMONY_TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]

TEXTS = st.text(st.sampled_from("aé東😀#4 \n"), max_size=12)


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    write_tokenizer(directory, vocab_size=384, chat_template=None)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    directory.mkdir(exist_ok=True)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Any:
    loaded = load_tokenizer(tmp_path_factory.mktemp("harmony"))
    loaded.add_special_tokens({"additional_special_tokens": HARMONY_TOKENS})
    return loaded


def make_finder(tokenizer: Any, **settings: Any) -> SpanFinder:
    return SpanFinder(tokenizer, TeachConfig("m", Path("p"), "s", "MIT", **settings))


def find(
    finder: SpanFinder, tokenizer: Any, text: str, *, prompt: str = "Hi", finish: FinishReason = "length"
) -> list[tuple[str, str]]:
    """The spans, each with the text of its tokens."""
    ids = tokenizer.encode(text)
    spans = finder.find(tokenizer.encode(prompt), ids, finish)
    return [(span.kind, tokenizer.decode(ids[span.start : span.end])) for span in spans]


def test_think_blocks_are_found_by_themselves(tokenizer: Any) -> None:
    finder = make_finder(tokenizer)
    assert find(finder, tokenizer, "<think>so</think>7<|im_end|>") == [
        ("reasoning", "<think>so</think>"),
        ("answer", "7<|im_end|>"),
    ]
    assert find(finder, tokenizer, "so</think>7", prompt="Hi<think>\n") == [
        ("reasoning", "so</think>"),
        ("answer", "7"),
    ]
    assert find(finder, tokenizer, "7") == []


def test_an_end_token_that_is_an_ordinary_one_is_not_part_of_the_answer(tokenizer: Any) -> None:
    finder = make_finder(tokenizer, answer_pattern=r"(\d)$")
    ids = tokenizer.encode("so 7")
    full_stop = tokenizer.encode(".")
    spans = finder.find([], [*ids, *full_stop], "stop")
    assert [span.kind for span in spans] == ["reasoning", "answer"]
    assert finder.answer_text([*ids, *full_stop], spans, "stop") == "7"
    assert finder.find([], full_stop, "stop") == ()


def test_a_stop_string_is_not_part_of_the_answer(tokenizer: Any) -> None:
    finder = make_finder(tokenizer, answer_pattern=r"so (\d+)$")
    ids = tokenizer.encode("so 7\n\nQ")
    spans = finder.find([], ids, "stop", "\n\n")
    assert spans[-1].kind == "answer"
    assert spans[-1].end == len(ids)
    assert finder.answer_text(ids, spans, "stop", "\n\n") == "7"
    assert make_finder(tokenizer).answer_text(ids, (), "stop", "\n\n") == "so 7"


def test_harmony_channels_are_found_by_themselves(harmony: Any) -> None:
    text = (
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>7 東<|return|>"
    )
    finder = make_finder(harmony)
    spans = find(finder, harmony, text, prompt="<|start|>assistant")
    assert [kind for kind, _ in spans] == ["reasoning", "answer"]
    assert spans[0][1] == "<|channel|>analysis<|message|>so<|end|>"
    ids = harmony.encode(text)
    assert finder.answer_text(ids, finder.find([], ids, "stop"), "stop") == "7 東"


def test_markers_may_be_ids_or_texts(tokenizer: Any) -> None:
    start, end = (",".join(map(str, tokenizer.encode(text))) for text in ("[[", "]]"))
    by_ids = make_finder(tokenizer, reasoning_start=f"ids:{start}", reasoning_end=f"ids:{end}")
    by_text = make_finder(tokenizer, reasoning_start="text:[[", reasoning_end="text:]]")
    for finder in (by_ids, by_text):
        assert find(finder, tokenizer, "[[é]]7") == [("reasoning", "[[é]]"), ("answer", "7")]
        assert find(finder, tokenizer, "é]]7", prompt="Hi [[\n") == [("reasoning", "é]]"), ("answer", "7")]
        assert find(finder, tokenizer, "[[é") == [("truncated_reasoning", "[[é")]
        assert find(finder, tokenizer, "7]]") == []


def test_a_token_that_holds_more_than_a_marker_belongs_to_it() -> None:
    """Here two letters make a token, so that no marker of three ends where a token does."""
    finder = make_finder(Pairs(), reasoning_start="text:<<<", reasoning_end="text:>>>")
    assert finder.find([], Pairs.encode("ab<<<cd>>>ef"), "length") == (
        TokenSpan("answer", 0, 1),
        TokenSpan("reasoning", 1, 5),
        TokenSpan("answer", 5, 6),
    )


class Pairs:
    """A tokenizer whose tokens are two letters, and one at the end."""

    all_special_ids = ()
    added_tokens_decoder: ClassVar[dict[int, object]] = {}

    @staticmethod
    def get_vocab() -> dict[str, int]:
        return {}

    @staticmethod
    def encode(text: str) -> list[int]:
        pairs = [text[at : at + 2] for at in range(0, len(text), 2)]
        return [ord(pair[0]) * 256 + (ord(pair[1]) if len(pair) == 2 else 0) for pair in pairs]

    @staticmethod
    def decode(token_ids: list[int], **_: object) -> str:
        return "".join(chr(i // 256) + (chr(i % 256) if i % 256 else "") for i in token_ids)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"reasoning_start": "<reason>"}, "'<reason>' is not a token of the teacher"),
        ({"reasoning_start": "ids:5,x", "reasoning_end": "ids:6"}, "'ids:5,x' is not a token"),
        ({"reasoning_start": "ids:5", "reasoning_end": "ids:99999"}, "'ids:99999' is not a token"),
        ({"reasoning_start": "text:<r>"}, "are not two texts"),
        ({"reasoning_start": "text:", "reasoning_end": "text:x"}, "are not two texts"),
        ({"answer_pattern": "("}, r"answer pattern '\(' is no regular expression"),
    ],
)
def test_markers_that_cannot_be_are_refused(tokenizer: Any, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_finder(tokenizer, **settings)


def test_a_pattern_finds_the_answer_of_a_model_that_marks_nothing(tokenizer: Any) -> None:
    finder = make_finder(tokenizer, answer_pattern="gsm8k")
    text = "4 + 3 = 7 東京\n#### 7<|im_end|>"
    found = find(finder, tokenizer, text, finish="stop")
    assert [kind for kind, _ in found] == ["reasoning", "answer"]
    assert found[0][1].rstrip().endswith("####")
    assert found[1][1].strip() == "7<|im_end|>"
    ids = tokenizer.encode(text)
    assert finder.answer_text(ids, finder.find([], ids, "stop"), "stop") == "7"


def test_without_an_answer_only_a_completion_that_was_cut_off_is_reasoning(tokenizer: Any) -> None:
    finder = make_finder(tokenizer, answer_pattern="gsm8k")
    assert find(finder, tokenizer, "4 + 3", finish="length") == [("truncated_reasoning", "4 + 3")]
    assert find(finder, tokenizer, "4 + 3<|im_end|>", finish="stop") == []
    assert find(finder, tokenizer, "<think>4</think>3") == [
        ("reasoning", "<think>4</think>"),
        ("answer", "3"),
    ]


def test_a_pattern_that_would_take_for_ever_finds_nothing(tokenizer: Any) -> None:
    finder = make_finder(tokenizer, answer_pattern="^(a|aa)+$")
    assert find(finder, tokenizer, "a" * 80 + "b", finish="length") == [
        ("truncated_reasoning", "a" * 80 + "b")
    ]


def test_the_answer_of_a_completion_that_marks_nothing_is_all_of_it(tokenizer: Any) -> None:
    ids = tokenizer.encode(" It is 7.<|im_end|>")
    assert make_finder(tokenizer).answer_text(ids, (), "stop") == "It is 7."
    assert make_finder(tokenizer).answer_text(ids[:-1], (), "length") == "It is 7."
    cut_off = (TokenSpan("truncated_reasoning", 0, len(ids)),)
    assert make_finder(tokenizer).answer_text(ids, cut_off, "length") == ""


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, noise=st.lists(st.integers(5, 260), max_size=6), place=st.integers(0, 12))
def test_positions_are_those_of_the_bytes(tokenizer: Any, text: str, noise: list[int], place: int) -> None:
    """Ids as a model may write them, tokens of half characters among them, against the bytes themselves."""
    ids = tokenizer.encode(text)
    ids = [*ids[:place], *noise, *ids[place:]]
    positions = TokenPositions(ids, lambda some: decode(tokenizer, some))
    sizes = [len(token_bytes(tokenizer, token_id)) for token_id in ids]
    held = [position for position, size in enumerate(sizes) for _ in range(size)]
    assert positions.first(0) == 0
    place_of_byte = 0
    for character, letter in enumerate(positions.text):
        if letter == "\ufffd":
            return  # what is no character has no bytes of its own from here on
        width = len(letter.encode())
        if character:
            assert positions.first(character) == held[place_of_byte]
        assert positions.last(character) == held[place_of_byte + width - 1]
        place_of_byte += width
    assert positions.last(len(positions.text)) == len(ids)


def decode(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes of a token of a byte-level vocabulary, read off its own alphabet."""
    alphabet = byte_alphabet()
    return bytes(alphabet[letter] for letter in tokenizer.convert_ids_to_tokens(token_id))


def byte_alphabet() -> dict[str, int]:
    """Letter to byte, as GPT-2 maps them: printable bytes are themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.sampled_from(["a", "▁a", "▁", "4", *"東é😀"]), min_size=1, max_size=10))
def test_positions_hold_where_bytes_are_tokens_and_blanks_are_letters(pieces: list[str]) -> None:
    """As in SentencePiece vocabularies with byte fallback, whose first blank is not part of the text."""
    tokenizer = byte_fallback_tokenizer()
    ids: list[int] = []
    for piece in pieces:
        known = tokenizer.token_to_id(piece)
        ids += (
            [known] if known is not None else [tokenizer.token_to_id(f"<0x{b:02X}>") for b in piece.encode()]
        )
    positions = TokenPositions(ids, lambda some: tokenizer.decode(list(some), skip_special_tokens=False))
    texts = [piece.replace("▁", " ") for piece in pieces]
    sizes = [1 if tokenizer.token_to_id(piece) is not None else len(piece.encode()) for piece in pieces]
    starts = [sum(sizes[:number]) for number in range(len(pieces))]
    held = [(start, size) for text, start, size in zip(texts, starts, sizes, strict=True) for _ in text]
    held = held[1:] if "".join(texts).startswith(" ") else held
    assert positions.text == "".join(texts).removeprefix(" ")
    for character, (start, size) in enumerate(held):
        assert positions.last(character) == start + size - 1
        if character:
            assert positions.first(character) == start


def byte_fallback_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "▁", "▁a", "4"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
