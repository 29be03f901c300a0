"""Where a completion reasons and where it answers, from token ids alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lynearm.wire.traces import SpanKind, TokenSpan


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The tokens around a reasoning."""

    start_id: int
    end_id: int


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
    spans: list[TokenSpan] = []
    reasoning = opened_by_prompt
    start = 0

    def close(end: int, kind: SpanKind) -> None:
        nonlocal start
        if end > start:
            spans.append(TokenSpan(kind, start, end))
        start = end

    for position, token_id in enumerate(completion_token_ids):
        if reasoning and token_id == markers.end_id:
            close(position + 1, "reasoning")
            reasoning = False
        elif not reasoning and token_id == markers.start_id:
            close(position, "answer")
            reasoning = True
    close(len(completion_token_ids), "truncated_reasoning" if reasoning else "answer")
    marked = opened_by_prompt or any(span.kind != "answer" for span in spans)
    return tuple(spans) if marked else ()
