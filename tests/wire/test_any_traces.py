from __future__ import annotations

import functools
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire.building import VOCAB_SIZE, build_sampled_trace, build_trace, draw_tails
from wire.round_trip import DRAWS, MODES, assert_round_trip, codec_of

from lynearm.wire.dictionaries import Dictionary
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.specs import CodecMode
from lynearm.wire.traces import SamplingParams, TokenSpan, TopK, Trace


@st.composite
def rows_of(
    draw: st.DrawFn, mode: CodecMode, vocab_size: int, positions: int, tail_draws: int
) -> tuple[TopK, Any, Any]:
    """Any rows: uneven widths, ties, odd floats; sampled tokens inside and outside; draws from some tails."""
    width = draw(st.integers(0, min(6, vocab_size)))
    token_ids = np.zeros((positions, width), np.int32)
    logprobs = np.full((positions, width), -np.inf, np.float32)
    sampled = np.zeros(positions, np.int32)
    sampled_logprobs = np.zeros(positions, np.float32)
    drawn = np.full((positions, tail_draws), -1, np.int32)
    any_id = st.one_of(st.integers(0, vocab_size - 1), st.integers(0, min(vocab_size, 90) - 1))
    any_logprob = st.one_of(
        st.floats(-20, 0, width=32),
        st.floats(max_value=0.0078125, allow_nan=False, allow_infinity=False, width=32),
        st.sampled_from([-0.5, -1.0, -1.0, -3.0, 0.0, -0.0]),
    )
    if mode == "sampled":
        any_logprob = st.integers(1, DRAWS).map(lambda count: float(np.float32(np.log(count / DRAWS))))
    for t in range(positions):
        ids = draw(st.lists(any_id, max_size=width, unique=True))
        values = sorted(draw(st.lists(any_logprob, min_size=len(ids), max_size=len(ids))), reverse=True)
        token_ids[t, : len(ids)] = ids
        logprobs[t, : len(ids)] = values
        if ids and draw(st.booleans()):
            place = draw(st.integers(0, len(ids) - 1))
            sampled[t], sampled_logprobs[t] = ids[place], values[place]
        else:
            sampled[t] = draw(any_id)
            sampled_logprobs[t] = draw(st.one_of(any_logprob, st.just(-np.inf)))
        if len(ids) < vocab_size and draw(st.booleans()):
            others = any_id.filter(lambda token, ids=ids: token not in ids)
            drawn[t] = draw(st.lists(others, min_size=tail_draws, max_size=tail_draws))
    tails = draw(st.lists(st.floats(0, 1, width=32), min_size=positions, max_size=positions))
    rows = TopK(token_ids, logprobs, np.array(tails, np.float32), drawn if tail_draws else None)
    return rows, sampled, sampled_logprobs


@st.composite
def traces_of(draw: st.DrawFn, mode: CodecMode, vocab_size: int, tail_draws: int) -> Trace:
    """Any trace."""
    positions = draw(st.integers(0, 5))
    top_k, sampled, sampled_logprobs = draw(rows_of(mode, vocab_size, positions, tail_draws))
    prompt = draw(st.lists(st.integers(0, vocab_size - 1), max_size=4))
    scored: dict[str, Any] = {}
    if len(prompt) > 1 and draw(st.booleans()):
        prompt_top_k, ids, logprobs = draw(rows_of(mode, vocab_size, len(prompt) - 1, tail_draws))
        # Both are as wide as the wider one when they come back.
        width = max(top_k.k, prompt_top_k.k)
        top_k, prompt_top_k = widen(top_k, width), widen(prompt_top_k, width)
        scored = {"prompt_top_k": prompt_top_k, "prompt_logprobs": logprobs}
        prompt = [prompt[0], *ids.tolist()]
    text = st.text(max_size=5)
    cut = draw(st.integers(0, positions))
    return Trace(
        prompt_id=draw(text),
        prompt_token_ids=np.array(prompt, np.int32),
        completion_token_ids=sampled,
        sampled_logprobs=sampled_logprobs,
        top_k=top_k,
        finish_reason=draw(st.sampled_from(("stop", "length", "abort"))),
        sample_index=draw(st.integers(-(2**63), 2**63 - 1)),
        spans=(TokenSpan("reasoning", 0, cut),) if cut else (),
        sampling=draw(
            st.builds(
                SamplingParams,
                temperature=st.floats(0, 2),
                seed=st.none() | st.integers(-(2**63), 2**63 - 1),
                presence_penalty=st.floats(-2, 2),
                frequency_penalty=st.floats(-2, 2),
                repetition_penalty=st.floats(0, exclude_min=True, allow_infinity=False),
                min_tokens=st.integers(0, 2**63 - 1),
                stop=st.lists(st.text(min_size=1, max_size=5), max_size=3, unique=True).map(tuple),
                stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3, unique=True).map(tuple),
            )
        ),
        tags=draw(st.dictionaries(text, text, max_size=2)),
        completion_text=draw(text),
        **scored,
    )


def widen(top_k: TopK, width: int) -> TopK:
    """The rows with padding up to a width."""
    more = ((0, 0), (0, width - top_k.k))
    return TopK(
        np.pad(top_k.token_ids, more),
        np.pad(top_k.logprobs, more, constant_values=-np.inf),
        top_k.tail_mass,
        top_k.tail_draws,
    )


@functools.cache
def foreign_dictionary(mode: CodecMode, vocab_size: int, tail_draws: int) -> Dictionary:
    """A dictionary that was trained on other traces."""
    if mode == "sampled":
        traces = [build_sampled_trace(5, draws=DRAWS, vocab_size=vocab_size)]
    else:
        traces = [build_trace(5, k=4, vocab_size=vocab_size)]
    traces = [draw_tails(trace, tail_draws, vocab_size) for trace in traces] if tail_draws else traces
    return train_dictionary([traces], codec=codec_of(mode, tail_draws), vocab_size=vocab_size)


@MODES
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_traces_come_back(mode: CodecMode, data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([1, 2, 300, VOCAB_SIZE, VOCAB_SIZE, 1 << 20]))
    tail_draws = 0 if mode == "sampled" else data.draw(st.sampled_from([0, 0, 1, 1, 2, 16]))
    traces = data.draw(st.lists(traces_of(mode, vocab_size, tail_draws), min_size=1, max_size=3))
    dictionary = None
    with_dictionary = data.draw(st.sampled_from(["none", "own", "foreign"]))
    if with_dictionary == "own":
        dictionary = train_dictionary([traces], codec=codec_of(mode, tail_draws), vocab_size=vocab_size)
    elif with_dictionary == "foreign":
        # One that knows of draws from tails, or not, whatever the traces have.
        knows_draws = mode != "sampled" and data.draw(st.booleans())
        dictionary = foreign_dictionary(mode, vocab_size, 2 if knows_draws else 0)
    assert_round_trip(traces, mode, vocab_size, dictionary)
