"""Finds reasoning and answer in the completions of one teacher, by whatever means its configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, TypeAlias, cast

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.spans import (
    HarmonyMarkers,
    ReasoningMarkers,
    find_harmony_spans,
    find_spans,
    split_at_answer,
    tokens_after_start,
)
from lynearm.teacher.text_positions import TokenPositions
from lynearm.wire.errors import ConfigError, MissingDependencyError
from lynearm.wire.traces import FinishReason, TokenSpan

Untyped: TypeAlias = Any
"""A transformers tokenizer, or an object of `regex`: neither ships types that a strict checker accepts."""

PATTERN_SECONDS = 1.0
"""How long a pattern may look at one text: some take a time that grows exponentially with it."""

ANSWER_PATTERNS = {"gsm8k": r"####[^\S\n]*(?P<answer>[^\n]+)", "boxed": r"\\boxed\s*\{(?P<answer>[^\n]+)\}"}
"""Patterns that have a name."""

_MARKERS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
"""Looked for by "auto", in this order; each is one token of the models that have it."""

_HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_HARMONY_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_HARMONY_REASONING = "analysis"


class AnswerPattern:
    """A regular expression that finds the answer in a completion's text.

    Args:
        pattern: A name of `ANSWER_PATTERNS`, or an expression for the package `regex`, which reads what
            Python's `re` does. The answer is its group "answer", else its first group, else the whole match.

    Raises:
        ConfigError: for an expression that cannot be compiled.
    """

    def __init__(self, pattern: str) -> None:
        self._compiled = compile_pattern(ANSWER_PATTERNS.get(pattern, pattern), what="answer pattern")
        groups = self._compiled.groupindex
        self._group: int | str = "answer" if "answer" in groups else min(1, int(self._compiled.groups))

    def find(self, text: str) -> tuple[int, int] | None:
        """First character of the last answer in a text, and one past its last; None without one."""
        found: tuple[int, int] | None = None
        try:
            for match in self._compiled.finditer(text, timeout=PATTERN_SECONDS):
                start, end = match.span(self._group)
                if end > start >= 0:
                    found = (start, end)
        except TimeoutError:
            return None
        return found


class SpanFinder:
    """Finds the spans of completions, and the text of their answers.

    Token markers come first, then markers in the text; where neither marks anything, the answer pattern
    decides.

    Args:
        tokenizer: The teacher's, of transformers.
        config: Reads `reasoning_start`, `reasoning_end` and `answer_pattern`.

    Raises:
        ConfigError: for markers that the tokenizer does not have, or a pattern that is none.
    """

    def __init__(self, tokenizer: Untyped, config: TeachConfig) -> None:
        self._tokenizer = tokenizer
        self._special = _special_ids(tokenizer)
        self._texts = _text_markers(config)
        self._harmony = _harmony_markers(tokenizer, config)
        self._markers = None if self._texts or self._harmony else _token_markers(tokenizer, config)
        self._pattern = AnswerPattern(config.answer_pattern) if config.answer_pattern else None

    def find(
        self,
        prompt_token_ids: Sequence[int],
        completion_token_ids: Sequence[int],
        finish_reason: FinishReason,
        stop_string: str = "",
    ) -> tuple[TokenSpan, ...]:
        """Spans that together cover a completion; empty where nothing tells reasoning from answer.

        Args:
            prompt_token_ids: The prompt, which may have opened the reasoning.
            completion_token_ids: The completion, its end token included.
            finish_reason: Why it ended: by "stop", with an end token; by "length", perhaps before its answer.
            stop_string: The text that ended it; empty where none did.
        """
        prompt, completion = _integers(prompt_token_ids), _integers(completion_token_ids)
        spans: tuple[TokenSpan, ...] = ()
        if self._harmony is not None:
            spans = find_harmony_spans(prompt, completion, self._harmony)
        elif self._texts is not None:
            spans = self._by_text(prompt, completion)
        elif self._markers is not None:
            spans = find_spans(completion, self._markers, opened_by_prompt=self.opens_reasoning(prompt))
        if spans or self._pattern is None:
            return spans
        positions = TokenPositions(self._text_ids(completion, finish_reason, stop_string), self._decode)
        found = self._pattern.find(_before(stop_string, positions.text))
        start = None if found is None else positions.first(found[0])
        return split_at_answer(start, len(completion), was_cut_off=finish_reason == "length")

    def opens_reasoning(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside a reasoning: in its start marker and nothing but blanks."""
        prompt = _integers(prompt_token_ids)
        if self._texts is not None:
            return self._decode(prompt).rstrip().endswith(self._texts[0].strip())
        after = None if self._markers is None else tokens_after_start(prompt, self._markers)
        return after is not None and not self._decode(after).strip()

    def answer_text(
        self,
        completion_token_ids: Sequence[int],
        spans: Sequence[TokenSpan],
        finish_reason: FinishReason,
        stop_string: str = "",
    ) -> str:
        """What a completion answers, without special tokens around it, and without the stop string.

        The text of its answer spans; all of it, where nothing tells reasoning from answer. Of that, what the
        answer pattern finds, where there is a pattern and it finds something. Empty without an answer.

        Args:
            completion_token_ids: The completion, its end token included.
            spans: What `find` found in it.
            finish_reason: Why it ended.
            stop_string: The text that ended it; empty where none did.
        """
        completion = self._text_ids(_integers(completion_token_ids), finish_reason, stop_string)
        parts = [completion[span.start : span.end] for span in spans if span.kind == "answer"]
        if not spans:
            parts = [completion]
        if self._pattern is not None:
            whole = _before(stop_string, self._decode(completion))
            found = self._pattern.find(whole) if parts else None
            if found is not None:
                return whole[found[0] : found[1]].strip()
        return _before(stop_string, "".join(self._decode(self._content(part)) for part in parts)).strip()

    def _by_text(self, prompt: Sequence[int], completion: Sequence[int]) -> tuple[TokenSpan, ...]:
        """As `find_spans`, with the markers found in the text and then put at the tokens that hold them."""
        start_text, end_text = cast("tuple[str, str]", self._texts)
        positions = TokenPositions(completion, self._decode)
        opened = self.opens_reasoning(prompt)
        spans: list[TokenSpan] = []
        reasoning, start, character = opened, 0, 0
        while (at := positions.text.find(end_text if reasoning else start_text, character)) >= 0:
            character = at + len(end_text if reasoning else start_text)
            # A token that holds the last letter of a marker and what follows it belongs to the marker.
            end = positions.last(character - 1) + 1 if reasoning else max(start, positions.first(at))
            if end > start:
                spans.append(TokenSpan("reasoning" if reasoning else "answer", start, end))
            start, reasoning = end, not reasoning
        if start < len(completion):
            spans.append(TokenSpan("truncated_reasoning" if reasoning else "answer", start, len(completion)))
        marked = opened or any(span.kind != "answer" for span in spans)
        return tuple(spans) if marked else ()

    def _content(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of a message, without its header and its end."""
        if self._harmony is not None and self._harmony.message_id in token_ids:
            token_ids = token_ids[token_ids.index(self._harmony.message_id) + 1 :]
        return self._without_special_end(token_ids)

    def _text_ids(
        self, token_ids: tuple[int, ...], finish_reason: FinishReason, stop_string: str
    ) -> tuple[int, ...]:
        """Tokens of a completion's text. The end token goes, which need not be a special one."""
        has_end_token = finish_reason == "stop" and not stop_string
        return self._without_special_end(token_ids[:-1] if has_end_token else token_ids)

    def _without_special_end(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        end = len(token_ids)
        while end and token_ids[end - 1] in self._special:
            end -= 1
        return token_ids[:end]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _before(stop_string: str, text: str) -> str:
    """What precedes the stop string that ended a text; all of it where none did."""
    end = text.rfind(stop_string) if stop_string else -1
    return text if end < 0 else text[:end]


def compile_pattern(pattern: str, *, what: str) -> Untyped:
    """An expression, compiled by `regex`, whose searches take a `timeout` in seconds.

    Raises:
        ConfigError: for an expression that cannot be compiled; `what` names it.
        MissingDependencyError: without the package `regex`.
    """
    try:
        regex: Untyped = import_module("regex")
    except ImportError as error:
        raise MissingDependencyError(f"the {what} needs the package regex", "pip install regex") from error
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(
            f"the {what} {pattern!r} is no regular expression: {error}",
            "in TOML, write it between single quotes, which keep backslashes as they are",
        ) from error


def _integers(token_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int, token_ids))


def _special_ids(tokenizer: Untyped) -> frozenset[int]:
    """Every special token: beside those with a role, such as "eos", those that were added as special."""
    added = cast("dict[int, Any]", tokenizer.added_tokens_decoder)
    return frozenset(
        [*tokenizer.all_special_ids, *(token_id for token_id, token in added.items() if token.special)]
    )


def _text_markers(config: TeachConfig) -> tuple[str, str] | None:
    markers = (config.reasoning_start, config.reasoning_end)
    texts = tuple(marker.removeprefix("text:") for marker in markers if marker.startswith("text:"))
    if not texts:
        return None
    if len(texts) != 2 or not all(text.strip() for text in texts):
        raise ConfigError(
            f"reasoning markers {markers[0]!r} and {markers[1]!r} are not two texts",
            'write both as "text:…", or both as tokens',
        )
    return texts[0], texts[1]


def _harmony_markers(tokenizer: Untyped, config: TeachConfig) -> HarmonyMarkers | None:
    if config.reasoning_start != "auto" or config.reasoning_end != "auto":
        return None
    vocab = cast("dict[str, int]", tokenizer.get_vocab())
    if not all(token in vocab for token in _HARMONY_TOKENS):
        return None
    start_id, channel_id, message_id, _ = (vocab[token] for token in _HARMONY_TOKENS)
    return HarmonyMarkers(
        start_id=start_id,
        channel_id=channel_id,
        message_id=message_id,
        end_ids=frozenset(vocab[token] for token in _HARMONY_ENDS if token in vocab),
        reasoning_ids=_integers(tokenizer.encode(_HARMONY_REASONING, add_special_tokens=False)),
    )


def _token_markers(tokenizer: Untyped, config: TeachConfig) -> ReasoningMarkers | None:
    start, end = config.reasoning_start, config.reasoning_end
    if not start or not end:
        return None
    vocab = cast("dict[str, int]", tokenizer.get_vocab())
    for known_start, known_end in _MARKERS:
        start_ids = _marker_ids(known_start if start == "auto" else start, vocab, optional=start == "auto")
        end_ids = _marker_ids(known_end if end == "auto" else end, vocab, optional=end == "auto")
        if start_ids and end_ids:
            return ReasoningMarkers(start_ids, end_ids)
    return None


def _marker_ids(marker: str, vocab: dict[str, int], *, optional: bool) -> tuple[int, ...]:
    if marker in vocab:
        return (vocab[marker],)
    listed = marker.removeprefix("ids:").split(",") if marker.startswith("ids:") else []
    ids = tuple(int(text) for text in listed if text.strip().isdecimal())
    if optional or (ids and len(ids) == len(listed) and not set(ids).difference(vocab.values())):
        return ids
    raise ConfigError(
        f"reasoning marker {marker!r} is not a token of the teacher",
        'name one token, or several as "ids:27,91", or a text as "text:<reasoning>"; "auto" looks for the '
        "usual ones, and an empty text for none",
    )
