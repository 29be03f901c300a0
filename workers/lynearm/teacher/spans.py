"""Where a completion reasons and where it answers, from token ids alone.

Nothing is decoded here: special tokens mark the places, whatever text surrounds them. Markers that are no
special tokens are found in the text instead (`lynearm.teacher.text_positions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lynearm.wire.traces import SpanKind, TokenSpan


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The tokens around a reasoning, such as `<think>` and `</think>`."""

    start_ids: tuple[int, ...]
    """One id, or a sequence of them, that opens it."""
    end_ids: tuple[int, ...]
    """What closes it."""


@dataclass(frozen=True, slots=True)
class HarmonyMarkers:
    """Tokens of the harmony format (gpt-oss), in which a completion is several messages, each in a channel.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
    """

    start_id: int
    """Opens the header of a message; the prompt ends in the first message's."""
    channel_id: int
    """Comes before the name of the channel, in the header."""
    message_id: int
    """Ends the header."""
    end_ids: frozenset[int]
    """Each ends a message: `<|end|>`, and where the model stops, `<|return|>` or `<|call|>`."""
    reasoning_ids: tuple[int, ...]
    """Tokens of the name of the channel that is the reasoning, "analysis"."""


def find_spans(
    completion_token_ids: Sequence[int], markers: ReasoningMarkers | None, *, opened_by_prompt: bool
) -> tuple[TokenSpan, ...]:
    """Reasoning and answer spans that together cover the completion.

    A marker belongs to the reasoning that it opens or closes, the end token to the answer. A start marker
    inside a reasoning, and an end marker outside one, are ordinary tokens.

    Args:
        completion_token_ids: The completion, its end token included.
        markers: None for a model that marks nothing.
        opened_by_prompt: Whether the prompt ends inside a reasoning, as with chat templates that open it.

    Returns:
        Ascending; empty when nothing is marked. A reasoning that nothing closes is "truncated_reasoning".
    """
    if markers is None:
        return ()
    ids = tuple(completion_token_ids)
    spans: list[TokenSpan] = []
    reasoning = opened_by_prompt
    start = position = 0

    def close(end: int, kind: SpanKind) -> None:
        nonlocal start
        if end > start:
            spans.append(TokenSpan(kind, start, end))
        start = end

    while position < len(ids):
        if reasoning and _stands_at(ids, position, markers.end_ids):
            position += len(markers.end_ids)
            close(position, "reasoning")
            reasoning = False
        elif not reasoning and _stands_at(ids, position, markers.start_ids):
            close(position, "answer")
            position += len(markers.start_ids)
            reasoning = True
        else:
            position += 1
    close(len(ids), "truncated_reasoning" if reasoning else "answer")
    marked = opened_by_prompt or any(span.kind != "answer" for span in spans)
    return tuple(spans) if marked else ()


def tokens_after_start(token_ids: Sequence[int], markers: ReasoningMarkers) -> tuple[int, ...] | None:
    """What follows the last start marker; None without one."""
    ids, width = tuple(token_ids), len(markers.start_ids)
    for position in range(len(ids) - width, -1, -1):
        if _stands_at(ids, position, markers.start_ids):
            return ids[position + width :]
    return None


def find_harmony_spans(
    prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int], markers: HarmonyMarkers
) -> tuple[TokenSpan, ...]:
    """A span for each message: "reasoning" in the analysis channel, "answer" in every other.

    A message begins with its header and ends with its end token. The prompt is read from its last header on,
    since it may hold the first message's, and may even name the channel.

    Args:
        prompt_token_ids: The prompt.
        completion_token_ids: The completion, its end token included.
        markers: The model's.

    Returns:
        Ascending; empty when the completion is in no channel. An analysis that the completion's end cuts off
        is "truncated_reasoning".
    """
    header = _open_header(tuple(prompt_token_ids), markers)
    ids = (*header, *completion_token_ids)
    spans: list[TokenSpan] = []
    begin = len(header)
    name_at: int | None = None
    in_channel = False
    for position, token_id in enumerate(ids):
        if token_id == markers.channel_id and name_at is None:
            name_at, in_channel = position + 1, True
        elif token_id in markers.end_ids:
            kind: SpanKind = "reasoning" if _is_reasoning(ids, name_at, markers) else "answer"
            spans.append(TokenSpan(kind, begin - len(header), position + 1 - len(header)))
            begin, name_at = position + 1, None
    if begin < len(ids):
        kind = "truncated_reasoning" if _is_reasoning(ids, name_at, markers) else "answer"
        spans.append(TokenSpan(kind, begin - len(header), len(ids) - len(header)))
    return tuple(spans) if in_channel else ()


def split_at_answer(answer_start: int | None, length: int, *, was_cut_off: bool) -> tuple[TokenSpan, ...]:
    """The spans of a completion of which only the beginning of its answer is known.

    Args:
        answer_start: Position at which the answer begins; None where there is none.
        length: Tokens of the completion.
        was_cut_off: It reached its limit of tokens: without an answer, it was still on the way to one.

    Returns:
        Ascending; empty for a completion that ended by itself without an answer.
    """
    if answer_start is None:
        return (TokenSpan("truncated_reasoning", 0, length),) if was_cut_off and length else ()
    spans = (TokenSpan("reasoning", 0, answer_start), TokenSpan("answer", answer_start, length))
    return tuple(span for span in spans if span.end > span.start)


def _stands_at(ids: tuple[int, ...], position: int, wanted: tuple[int, ...]) -> bool:
    # The first id alone settles nearly every place, at a fraction of the cost.
    return ids[position] == wanted[0] and ids[position : position + len(wanted)] == wanted


def _open_header(prompt_token_ids: tuple[int, ...], markers: HarmonyMarkers) -> tuple[int, ...]:
    """The beginning of a message that the prompt leaves open; empty when it ends between messages."""
    for position in range(len(prompt_token_ids) - 1, -1, -1):
        if prompt_token_ids[position] in markers.end_ids:
            return ()
        if prompt_token_ids[position] == markers.start_id:
            return prompt_token_ids[position:]
    return ()


def _is_reasoning(ids: tuple[int, ...], name_at: int | None, markers: HarmonyMarkers) -> bool:
    return name_at is not None and name_at < len(ids) and _stands_at(ids, name_at, markers.reasoning_ids)
