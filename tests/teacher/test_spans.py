"""Reasoning and answer spans, from token ids."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynearm.teacher.spans import (
    HarmonyMarkers,
    ReasoningMarkers,
    find_harmony_spans,
    find_spans,
    split_at_answer,
    tokens_after_start,
)
from lynearm.wire.traces import TokenSpan

START, END = 1, 2
MARKERS = ReasoningMarkers((START,), (END,))
LONG = ReasoningMarkers((START, 5), (END, 5, 6))

HEAD, CHANNEL, BODY, STOP, RETURN, ANALYSIS, FINAL = range(10, 17)
HARMONY = HarmonyMarkers(HEAD, CHANNEL, BODY, frozenset({STOP, RETURN}), (ANALYSIS,))
ASSISTANT = 20
PROMPT = (HEAD, 9, BODY, 8, 8, STOP, HEAD, ASSISTANT)

SMALL_IDS = st.lists(st.sampled_from([START, END, 5, 6, 7]), max_size=12)
HARMONY_IDS = st.lists(st.sampled_from([HEAD, CHANNEL, BODY, STOP, RETURN, ANALYSIS, FINAL, 7]), max_size=14)


def flat(spans: tuple[TokenSpan, ...]) -> list[tuple[str, int, int]]:
    return [(span.kind, span.start, span.end) for span in spans]


def assert_cover(spans: tuple[TokenSpan, ...], length: int) -> None:
    """Nothing or everything, in order and without gaps."""
    ends = [0, *(span.end for span in spans)]
    assert [span.start for span in spans] == ends[:-1]
    assert all(span.end > span.start for span in spans)
    assert not spans or ends[-1] == length


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
    assert flat(find_spans(token_ids, MARKERS, opened_by_prompt=opened)) == expected


@pytest.mark.parametrize(
    ("token_ids", "opened", "expected"),
    [
        ([START, 5, 7, END, 5, 6, 8], False, [("reasoning", 0, 6), ("answer", 6, 7)]),
        ([START, 7, END, 5, 6, 8], False, []),
        ([START, 5, END, 5, 7], False, [("truncated_reasoning", 0, 5)]),
        ([END, END, 5, 6], True, [("reasoning", 0, 4)]),
    ],
)
def test_markers_of_several_tokens_count_only_as_a_whole(
    token_ids: list[int], opened: bool, expected: list[tuple[str, int, int]]
) -> None:
    assert flat(find_spans(token_ids, LONG, opened_by_prompt=opened)) == expected


@settings(deadline=None)
@given(SMALL_IDS, st.sampled_from([MARKERS, LONG]), st.booleans())
def test_spans_cover_all_or_nothing(token_ids: list[int], markers: ReasoningMarkers, opened: bool) -> None:
    assert_cover(find_spans(token_ids, markers, opened_by_prompt=opened), len(token_ids))


@settings(deadline=None)
@given(SMALL_IDS, st.integers(0, 12), st.sampled_from([MARKERS, LONG]), st.booleans())
def test_what_comes_later_moves_no_closed_reasoning(
    token_ids: list[int], cut: int, markers: ReasoningMarkers, opened: bool
) -> None:
    """A completion that is cut off has the reasoning that it closed, where it is in the whole one."""
    whole = find_spans(token_ids, markers, opened_by_prompt=opened)
    part = find_spans(token_ids[:cut], markers, opened_by_prompt=opened)
    closed = [span for span in part if span.kind == "reasoning"]
    assert closed == [span for span in whole if span.kind == "reasoning"][: len(closed)]


def test_a_model_that_marks_nothing_has_no_spans() -> None:
    assert find_spans([START, 7, END], None, opened_by_prompt=False) == ()


def test_what_follows_the_last_start_marker_is_found() -> None:
    assert tokens_after_start([START, 5, START, 5, 7], LONG) == (7,)
    assert tokens_after_start([7, START, 5], LONG) == ()
    assert tokens_after_start([START], LONG) is None


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        (
            [CHANNEL, ANALYSIS, BODY, 7, STOP, HEAD, ASSISTANT, CHANNEL, FINAL, BODY, 8, RETURN],
            [("reasoning", 0, 5), ("answer", 5, 12)],
        ),
        ([CHANNEL, FINAL, BODY, 8, RETURN], [("answer", 0, 5)]),
        ([CHANNEL, ANALYSIS, BODY, 7], [("truncated_reasoning", 0, 4)]),
        ([CHANNEL, ANALYSIS], [("truncated_reasoning", 0, 2)]),
        ([CHANNEL], [("answer", 0, 1)]),
        (
            [CHANNEL, ANALYSIS, BODY, 7, STOP, HEAD, ASSISTANT, CHANNEL],
            [("reasoning", 0, 5), ("answer", 5, 8)],
        ),
        # A channel's name in the text is text.
        ([CHANNEL, FINAL, BODY, ANALYSIS, CHANNEL, ANALYSIS, RETURN], [("answer", 0, 7)]),
        ([7, 8, RETURN], []),
        ([], []),
    ],
)
def test_channels_tell_reasoning_from_answer(
    token_ids: list[int], expected: list[tuple[str, int, int]]
) -> None:
    assert flat(find_harmony_spans(PROMPT, token_ids, HARMONY)) == expected


def test_a_prompt_may_open_the_channel() -> None:
    prompt = (*PROMPT, CHANNEL, ANALYSIS, BODY)
    spans = find_harmony_spans(
        prompt, [7, 7, STOP, HEAD, ASSISTANT, CHANNEL, FINAL, BODY, 8, RETURN], HARMONY
    )
    assert flat(spans) == [("reasoning", 0, 3), ("answer", 3, 10)]
    assert flat(find_harmony_spans(prompt, [7], HARMONY)) == [("truncated_reasoning", 0, 1)]


@settings(deadline=None)
@given(HARMONY_IDS)
def test_channels_cover_all_or_nothing(token_ids: list[int]) -> None:
    assert_cover(find_harmony_spans(PROMPT, token_ids, HARMONY), len(token_ids))


def test_an_answer_splits_a_completion() -> None:
    assert flat(split_at_answer(3, 5, was_cut_off=False)) == [("reasoning", 0, 3), ("answer", 3, 5)]
    assert flat(split_at_answer(0, 5, was_cut_off=False)) == [("answer", 0, 5)]
    assert flat(split_at_answer(5, 5, was_cut_off=True)) == [("reasoning", 0, 5)]
    assert flat(split_at_answer(None, 5, was_cut_off=True)) == [("truncated_reasoning", 0, 5)]
    assert split_at_answer(None, 5, was_cut_off=False) == split_at_answer(None, 0, was_cut_off=True) == ()
