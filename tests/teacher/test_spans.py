"""Reasoning and answer spans, from token ids."""

from __future__ import annotations

import pytest

from lynearm.teacher.spans import ReasoningMarkers, find_spans
from lynearm.wire.traces import TokenSpan

START, END = 1, 2
MARKERS = ReasoningMarkers(START, END)


@pytest.mark.parametrize(
    ("token_ids", "opened", "expected"),
    [
        ([], False, []),
        ([], True, []),
        ([7, 8], False, []),
        ([START, 7, END, 8, 9], False, [("reasoning", 0, 3), ("answer", 3, 5)]),
        ([5, START, 7, END, 8], False, [("answer", 0, 1), ("reasoning", 1, 4), ("answer", 4, 5)]),
        ([7, END, 8], True, [("reasoning", 0, 2), ("answer", 2, 3)]),
        ([7, 8], True, [("truncated_reasoning", 0, 2)]),
        ([START, 7], False, [("truncated_reasoning", 0, 2)]),
        ([START, END], False, [("reasoning", 0, 2)]),
        ([END, 7], False, []),
        ([START, 7, START, END, 8], False, [("reasoning", 0, 4), ("answer", 4, 5)]),
        ([START, END, START, END], False, [("reasoning", 0, 2), ("reasoning", 2, 4)]),
    ],
)
def test_spans_cover_the_completion_where_it_is_marked(
    token_ids: list[int], opened: bool, expected: list[tuple[str, int, int]]
) -> None:
    spans = find_spans(token_ids, MARKERS, opened_by_prompt=opened)
    assert [(span.kind, span.start, span.end) for span in spans] == expected


def test_a_model_that_marks_nothing_has_no_spans() -> None:
    assert find_spans([START, 7, END], None, opened_by_prompt=False) == ()


def test_spans_are_those_of_the_wire() -> None:
    assert find_spans([3], MARKERS, opened_by_prompt=True) == (TokenSpan("truncated_reasoning", 0, 1),)
