"""Completions and scores on the wire: what goes in comes out, and what is wrong is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.wire.errors import (
    CorruptBlockError,
    InvalidInputError,
    LynearmError,
    PromptTooLongError,
    UnsupportedFormatError,
)
from lynearm.wire.scoring import (
    ScoredCompletion,
    ScoreSettings,
    StudentCompletion,
    completion_from_proto,
    completion_to_proto,
    failure_from_proto,
    failure_to_proto,
    finish_reason_from_proto,
    finish_reason_to_proto,
    result_bytes_bound,
    results_from_proto,
    results_to_proto,
    settings_from_proto,
    settings_to_proto,
    with_prompt,
)
from lynearm.wire.traces import FINISH_REASONS, Float32Array, TopK, Trace

VOCAB = 70_000


def make_completion(positions: int = 5, chosen: int = 3, largest: int = VOCAB) -> StudentCompletion:
    generator = np.random.default_rng(positions)
    ids = generator.integers(0, largest, (positions, chosen)).astype(np.int32)
    written = generator.integers(0, largest, positions).astype(np.int32)
    return StudentCompletion("c", np.asarray([1, 2, 3], np.int32), written, ids if chosen else None)


def make_scored(name: str, positions: int, chosen: int, top_k: int = 4) -> ScoredCompletion:
    generator = np.random.default_rng(positions)
    logprobs = np.sort(generator.uniform(-9, -2, (positions, top_k)).astype(np.float32), axis=1)[:, ::-1]
    ids = np.argsort(generator.random((positions, 1000)), axis=1)[:, :top_k].astype(np.int32)
    tail = (1 - np.exp(logprobs.astype(np.float64)).sum(axis=1)).astype(np.float32)
    trace = Trace(
        name,
        np.zeros((0,), np.int32),
        generator.integers(0, VOCAB, positions).astype(np.int32),
        generator.uniform(-20, -1, positions).astype(np.float32),
        TopK(ids, np.ascontiguousarray(logprobs), tail),
        "length",
    )
    return ScoredCompletion(trace, generator.uniform(-63, 0, (positions, chosen)).astype(np.float32))


@given(st.integers(0, 40), st.integers(0, 20), st.sampled_from([1, 255, 1 << 16, VOCAB]))
@settings(max_examples=60, deadline=None)
def test_a_completion_comes_out_as_it_went_in(positions: int, chosen: int, largest: int) -> None:
    sent = make_completion(positions, chosen, largest)
    message = pb.Completion.FromString(completion_to_proto(sent).SerializeToString())
    received = completion_from_proto(message)
    np.testing.assert_array_equal(received.prompt_token_ids, sent.prompt_token_ids)
    np.testing.assert_array_equal(received.completion_token_ids, sent.completion_token_ids)
    if chosen:
        assert received.chosen_ids is not None
        np.testing.assert_array_equal(received.chosen_ids, sent.chosen_ids)
    else:
        assert received.chosen_ids is None


def test_ids_below_two_bytes_take_two() -> None:
    assert len(completion_to_proto(make_completion(largest=1 << 16)).chosen_token_ids) == 5 * 3 * 2
    wide = replace(make_completion(), chosen_ids=np.full((5, 3), 1 << 16, np.int32))
    assert len(completion_to_proto(wide).chosen_token_ids) == 5 * 3 * 4


@pytest.mark.parametrize("codec", ["exact", "fine", "standard", "compact"])
def test_results_come_out_in_order_with_their_chosen_logprobs(codec: Any) -> None:
    sent = [make_scored("a", 7, 3), make_scored("b", 0, 3), make_scored("c", 4, 0)]
    asked = ScoreSettings(top_k=4, codec=codec)
    message = results_to_proto(sent, asked, vocab_size=VOCAB)
    received = results_from_proto(pb.ScoreResults.FromString(message.SerializeToString()))
    assert [one.request_id for one in received] == ["a", "b", "c"]
    tolerance = 0.0 if codec == "exact" else 0.5 / 1024 + 1e-6
    for one, other in zip(sent, received, strict=True):
        assert one.chosen_logprobs.shape == other.chosen_logprobs.shape
        np.testing.assert_allclose(other.chosen_logprobs, one.chosen_logprobs, rtol=0, atol=tolerance)


def chosen_round_trip(logprobs: Float32Array) -> Float32Array:
    scored = make_scored("a", logprobs.shape[0], 0)
    message = results_to_proto([replace(scored, chosen_logprobs=logprobs)], ScoreSettings(), vocab_size=VOCAB)
    return results_from_proto(message)[0].chosen_logprobs


def test_very_unlikely_and_certain_ids_stay_finite() -> None:
    edge = np.asarray([[0.0, 1e-4, -63.99, -64.0, -1e4, -np.inf]], np.float32)
    received = chosen_round_trip(edge)
    assert np.isfinite(received).all()
    assert received[0, :2].tolist() == [0.0, 0.0]
    assert np.abs(received[0, 2] + 63.99) < 0.0006
    assert set(received[0, 3:].tolist()) == {-65535 / 1024}


@given(st.integers(0, 300), st.integers(0, 64), st.sampled_from(["exact", "fine", "standard", "compact"]))
@settings(max_examples=20, deadline=None)
def test_the_bound_on_a_result_holds(positions: int, chosen: int, codec: Any) -> None:
    asked = ScoreSettings(top_k=16, codec=codec)
    scored = make_scored("a", positions, chosen, top_k=16)
    assert results_to_proto([scored], asked, vocab_size=VOCAB).ByteSize() <= result_bytes_bound(
        positions, asked, chosen
    )


def test_the_prompt_comes_back_and_a_mixed_up_result_does_not_pass() -> None:
    sent = make_completion(7, 3)
    scored = make_scored("c", 7, 3)
    scored = replace(scored, trace=replace(scored.trace, completion_token_ids=sent.completion_token_ids))
    np.testing.assert_array_equal(with_prompt(scored, sent).trace.prompt_token_ids, [1, 2, 3])
    for wrong in (make_completion(6, 3), replace(sent, chosen_ids=None)):
        with pytest.raises(CorruptBlockError, match="another completion"):
            with_prompt(scored, wrong)


def test_settings_come_out_as_they_went_in() -> None:
    asked = ScoreSettings("s-1", 7, 0.25, 2.0, "compact")
    assert settings_from_proto(settings_to_proto(asked)) == asked
    # What an older or a lazy client leaves out: the teacher's own distribution.
    assert settings_from_proto(pb.ScoreOpen(session="s", codec_mode=2)).temperature == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"session": "Not a name"}, "session"),
        ({"top_k": 1025}, "top_k 1025"),
        ({"min_probability": 1.5}, "min_probability 1.5"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"codec": "sampled"}, "codec 'sampled'"),
        ({"tail_draws": 17}, "tail_draws 17"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        ScoreSettings(**changes)


def test_an_opening_needs_a_session_and_a_codec() -> None:
    with pytest.raises(InvalidInputError, match="session ''"):
        settings_from_proto(pb.ScoreOpen(codec_mode=2))
    with pytest.raises(InvalidInputError, match="codec_mode 0"):
        settings_from_proto(pb.ScoreOpen(session="s"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"request_id": ""}, "request id of 0 bytes"),
        ({"request_id": "x" * 257}, "request id of 257 bytes"),
        ({"chosen_token_ids": b"123"}, "3 bytes of chosen ids"),
        ({"chosen_per_position": 1 << 30}, "chosen ids of 2 bytes"),
        ({"chosen_id_bytes": 3}, "chosen ids of 3 bytes"),
        ({"chosen_per_position": 0}, "expected 5 x 0 x 2"),
    ],
)
def test_a_completion_whose_parts_contradict_each_other_is_refused(
    changes: dict[str, Any], words: str
) -> None:
    message = completion_to_proto(make_completion(largest=100))
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(InvalidInputError, match=words):
        completion_from_proto(message)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": np.asarray([-1], np.int32)},
        {"chosen_ids": np.zeros((4, 3), np.int32)},
        {"chosen_ids": np.zeros((5,), np.int32)},
        {"chosen_ids": np.full((5, 3), -7, np.int32)},
        {"request_id": "\ud800"},
    ],
)
def test_a_completion_that_cannot_be_sent_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        completion_to_proto(replace(make_completion(), **changes))


def test_ids_beyond_any_vocabulary_stay_beyond_it() -> None:
    message = completion_to_proto(make_completion(0, 0))
    message.prompt_token_ids.append((1 << 32) - 1)
    assert completion_from_proto(message).prompt_token_ids.max() == (1 << 31) - 1


def test_columns_that_fit_no_trace_are_corrupt() -> None:
    message = results_to_proto([make_scored("a", 3, 2)], ScoreSettings(), vocab_size=VOCAB)
    message.chosen[0].values = message.chosen[0].values[:-1]
    with pytest.raises(CorruptBlockError, match="logprobs at chosen ids"):
        results_from_proto(message)
    message.chosen.add()
    with pytest.raises(CorruptBlockError, match="2 columns of chosen ids for 1 traces"):
        results_from_proto(message)
    assert results_from_proto(pb.ScoreResults()) == ()


def test_failures_are_raised_again_as_what_they_were() -> None:
    error = PromptTooLongError("the prompt is long", "shorten it")
    received = failure_from_proto(failure_to_proto("a", error))
    assert type(received) is PromptTooLongError
    assert (received.message, received.remedy) == (error.message, error.remedy)
    unknown = failure_from_proto(pb.RequestFailure(code=3, message="odd", reason="NEVER_HEARD_OF"))
    assert type(unknown) is InvalidInputError
    assert isinstance(failure_from_proto(pb.RequestFailure(code=99)), LynearmError)


def test_finish_reasons_come_out_as_they_went_in() -> None:
    for reason in FINISH_REASONS:
        assert finish_reason_from_proto(finish_reason_to_proto(reason)) == reason
    with pytest.raises(UnsupportedFormatError, match="finish reason 0"):
        finish_reason_from_proto(0)
