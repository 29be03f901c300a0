"""Verifiers, and what is published of what they judged."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynearm.teacher.config import Keep, TeachConfig
from lynearm.teacher.selection import TraceSelection, record_trace, select, verifier_of
from lynearm.teacher.verifiers import (
    MAX_HANGS,
    OUTCOMES,
    CallableVerifier,
    Outcome,
    Verdict,
    Verifier,
    make_verifier,
    verdict_tags,
)
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.errors import ConfigError
from lynearm.wire.specs import CODEC_MODES, CodecSpec
from lynearm.wire.traces import TopK, Trace


def make_trace(
    text: str = "7", *, sample: int = 0, length: int = 1, tags: Mapping[str, str] | None = None
) -> Trace:
    return Trace(
        prompt_id="p",
        prompt_token_ids=np.array([1], np.int32),
        completion_token_ids=np.arange(length, dtype=np.int32),
        sampled_logprobs=np.zeros(length, np.float32),
        top_k=TopK(
            np.zeros((length, 1), np.int32), np.zeros((length, 1), np.float32), np.zeros(length, np.float32)
        ),
        finish_reason="stop",
        sample_index=sample,
        tags=tags or {},
        completion_text=text,
    )


def make(description: str, **more: Any) -> Verifier:
    settings: dict[str, Any] = {"answer_tag": "answer", "timeout_seconds": 10.0} | more
    return make_verifier(description, **settings)


@pytest.mark.parametrize(
    ("answer", "reference", "outcome"),
    [
        ("7", "7", "correct"),
        ("It is 7 apples.", "3 + 4 = 7\n#### 7", "correct"),
        (r"\boxed{0.5}", "1/2", "correct"),
        ("x + 1", "x+1", "correct"),
        ("8", "7", "incorrect"),
        ("x + 1", "1", "incorrect"),
        ("", "7", "incorrect"),
        ("7", "", "unverifiable"),
    ],
)
def test_maths_is_compared_with_the_reference_of_the_prompt(
    answer: str, reference: str, outcome: Outcome
) -> None:
    tags = {"answer": reference} if reference else {}
    assert make("maths")(answer, make_trace(tags=tags)).outcome == outcome


def test_the_reference_may_have_a_tag_of_another_name() -> None:
    assert make("maths", answer_tag="gold")("7", make_trace(tags={"gold": "7"})).outcome == "correct"
    verdict = make("maths", answer_tag="gold")("7", make_trace(tags={"answer": "7"}))
    assert verdict == Verdict("unverifiable", "the prompt has no tag 'gold'")


def test_a_pattern_is_looked_for_in_the_answer() -> None:
    verifier = make("regex:^def \\w+")
    assert verifier("def add(a, b):", make_trace()).outcome == "correct"
    assert verifier("x = 1", make_trace()).outcome == "incorrect"
    slow = make("regex:^(a|aa)+$")("a" * 80 + "b", make_trace())
    assert slow == Verdict("unverifiable", "the pattern took longer than 1 s")


def test_json_is_checked_against_the_schema(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": ["sum"]}))
    verifier = make(f"json-schema:{schema}")
    assert verifier('{"sum": 7}', make_trace()).outcome == "correct"
    assert verifier('```json\n{"sum": 7}\n```', make_trace()).outcome == "correct"
    assert verifier("{}", make_trace()) == Verdict("incorrect", "'sum' is a required property")
    assert verifier("{", make_trace()).reason.startswith("not JSON")
    assert verifier("[" * 100_000, make_trace()).outcome == "incorrect"


def test_a_schema_fetches_nothing(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"$ref": "http://127.0.0.1:1/schema"}))
    selection = TraceSelection(make(f"json-schema:{schema}"), "all", lambda trace: trace.completion_text)
    (trace,) = selection([make_trace("{}")])
    assert trace.tags["verdict"] == "unverifiable"


@pytest.mark.parametrize(
    ("description", "complaint"),
    [
        ("", "'' is no verifier"),
        ("math", "'math' is no verifier"),
        ("maths:x", "is no verifier"),
        ("regex:", "is no verifier"),
        ("regex:(", "is no regular expression"),
        ("json-schema:missing.json", "cannot read JSON schema"),
        ("python:json", "is not MODULE:FUNCTION"),
        ("python:no_such_module:f", "cannot import verifier"),
        ("python:json:no_such_function", "cannot import verifier"),
        ("python:json:__name__", "is str, expected a function"),
    ],
)
def test_a_verifier_that_is_none_is_refused(description: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make(description)


@pytest.mark.parametrize(("text", "complaint"), [("{", "not JSON"), ('{"type": 1}', "no JSON schema")])
def test_a_schema_that_is_none_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        make(f"json-schema:{schema}")


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (True, "correct"),
        (False, "incorrect"),
        (None, "unverifiable"),
        (Verdict("incorrect", "too long"), "incorrect"),
        (Verdict("perhaps"), "unverifiable"),  # type: ignore[arg-type]  # what a user may write
        ("yes", "unverifiable"),
    ],
)
def test_a_function_says_what_it_thinks(said: object, outcome: Outcome) -> None:
    verdict = CallableVerifier(lambda answer, trace: said, timeout_seconds=10)("7", make_trace())
    assert verdict.outcome == outcome
    assert outcome == "correct" or said is False or said is None or verdict.reason


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_what_a_function_raises_is_recorded(error: BaseException) -> None:
    def fail(answer: str, trace: Trace) -> bool:
        raise error

    verdict = CallableVerifier(fail, timeout_seconds=10)("7", make_trace())
    assert verdict.outcome == "unverifiable"
    assert type(error).__name__ in verdict.reason


def test_a_function_that_hangs_is_left_alone_and_after_some_times_not_called_again() -> None:
    calls: list[str] = []
    release = threading.Event()

    def hang(answer: str, trace: Trace) -> bool:
        calls.append(answer)
        return release.wait(60)

    verifier = CallableVerifier(hang, timeout_seconds=0.05)
    verdicts = [verifier(str(number), make_trace()) for number in range(MAX_HANGS + 2)]
    release.set()
    assert {verdict.outcome for verdict in verdicts} == {"unverifiable"}
    assert calls == [str(number) for number in range(MAX_HANGS)]
    assert "took longer than 0.05 s" in verdicts[0].reason
    assert "not called any more" in verdicts[-1].reason


@settings(deadline=None)  # the codec compiles at its first use
@given(st.text(max_size=600))
def test_a_reason_is_one_short_line_of_a_trace(reason: str) -> None:
    tags = verdict_tags(Verdict("incorrect", reason))
    assert tags["verdict"] == "incorrect"
    assert len(tags.get("verdict_reason", "")) <= 200
    assert "\n" not in tags.get("verdict_reason", "")
    (decoded,) = decode_block(encode_block([make_trace(tags=tags)], codec="exact", vocab_size=8))
    assert decoded.tags == tags


JUDGED = st.lists(st.tuples(st.sampled_from(OUTCOMES), st.integers(1, 4)), min_size=1, max_size=5)


def judge(outcomes: list[tuple[Outcome, int]], keep: Keep) -> tuple[TraceSelection, tuple[Trace, ...]]:
    """A selection that judges as told, and what it publishes."""
    traces = [
        make_trace(outcome, sample=sample, length=length, tags={"topic": "sums", "verdict": "old"})
        for sample, (outcome, length) in enumerate(outcomes)
    ]
    selection = TraceSelection(
        lambda answer, trace: Verdict(cast("Outcome", answer)),
        keep,
        lambda trace: trace.completion_text,
    )
    return selection, selection(traces)


@settings(deadline=None)
@given(JUDGED, st.sampled_from(["all", "correct", "shortest-correct"]))
def test_what_is_kept_is_what_was_asked_for(outcomes: list[tuple[Outcome, int]], keep: Keep) -> None:
    selection, published = judge(outcomes, keep)
    correct = [length for outcome, length in outcomes if outcome == "correct"]
    lengths = [trace.completion_token_ids.size for trace in published]
    assert published
    assert sum(selection.verdicts.values()) == len(outcomes)
    if keep == "all":
        assert lengths == [length for _, length in outcomes]
        assert [trace.tags["verdict"] for trace in published] == [outcome for outcome, _ in outcomes]
    elif correct:
        assert lengths == ([min(correct)] if keep == "shortest-correct" else correct)
        assert {trace.tags["verdict"] for trace in published} == {"correct"}
    else:
        assert lengths == [0]
    kept = sum(1 for length in lengths if length)
    assert selection.left_out == len(outcomes) - kept
    assert all(trace.tags["topic"] == "sums" and trace.prompt_id == "p" for trace in published)


def test_a_record_says_that_nothing_was_kept() -> None:
    _, (record,) = judge([("unverifiable", 2), ("incorrect", 3)], "correct")
    assert record.tags == {"topic": "sums", "verdict": "incorrect", "kept": "0"}
    assert record.finish_reason == "abort"
    assert (record.prompt_token_ids.size, record.completion_token_ids.size) == (0, 0)
    assert select([record], "all") == (record,)


@pytest.mark.parametrize("mode", CODEC_MODES)
def test_every_codec_carries_records(mode: Any) -> None:
    codec = CodecSpec(mode, 1, draws=1 if mode == "sampled" else 0)
    for traces in ([record_trace("q", {"verdict": "incorrect"})], [make_trace(), record_trace("q", {})]):
        decoded = decode_block(encode_block(traces, codec=codec, vocab_size=8))
        assert [(trace.prompt_id, trace.completion_token_ids.size) for trace in decoded] == [
            (trace.prompt_id, trace.completion_token_ids.size) for trace in traces
        ]


def test_without_a_verifier_everything_is_published_as_it_is() -> None:
    selection = TraceSelection(None, "all", lambda trace: trace.completion_text)
    traces = (make_trace(), make_trace(sample=1))
    assert selection(traces) == traces
    assert selection.verdicts == {}


def test_a_verifier_that_raises_stops_nothing() -> None:
    def fail(answer: str, trace: Trace) -> Verdict:
        raise RecursionError("too deep")

    selection = TraceSelection(fail, "all", lambda trace: trace.completion_text)
    (trace,) = selection([make_trace()])
    assert trace.tags["verdict"] == "unverifiable"
    assert trace.tags["verdict_reason"] == "the verifier failed: RecursionError: too deep"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"keep": "correct"}, "keep 'correct' without verify"),
        ({"keep": "best"}, "keep 'best' is none of all, correct, shortest-correct"),
        ({"verify_seconds": 0.0}, "verify_seconds 0.0 is not positive"),
    ],
)
def test_settings_that_contradict_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        TeachConfig("m", Path("p"), "s", "MIT", **fields)


def test_the_configuration_names_the_verifier() -> None:
    assert verifier_of(TeachConfig("m", Path("p"), "s", "MIT")) is None
    verifier = verifier_of(TeachConfig("m", Path("p"), "s", "MIT", verify="maths", answer_tag="gold"))
    assert verifier is not None
    assert verifier("7", make_trace(tags={"gold": "7"})).outcome == "correct"
