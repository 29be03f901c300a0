"""Draws from whole distributions: their law, and those of a real vLLM engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lynearm.teacher.draws import draw_rows
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.logprob_arrays import LogprobRows
from lynearm.teacher.prompts import Prompt
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import Trace

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

DRAWS = 12


def test_counts_estimate_the_distribution_without_bias() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=40) * 2
    logprobs = logits - np.log(np.exp(logits).sum())
    order = np.argsort(-logprobs)
    rows = 4000
    ids, drawn = draw_rows(np.tile(order, (rows, 1)), np.tile(logprobs[order], (rows, 1)), 10, generator)
    assert (drawn[:, 1:] <= drawn[:, :-1]).all()
    counts = np.rint(np.exp(drawn.astype(np.float64)) * 10)
    assert (counts.sum(axis=1) == 10).all()
    means = np.bincount(ids.ravel(), counts.ravel(), minlength=40) / (rows * 10)
    p = np.exp(logprobs)
    # Five standard errors of a mean of 40,000 draws.
    assert (np.abs(means - p) < 5 * np.sqrt(p * (1 - p) / (rows * 10)) + 1e-9).all()


@pytest.fixture
def sampling_engine(engine: TeacherEngine, monkeypatch: pytest.MonkeyPatch) -> TeacherEngine:
    """The session's engine, asked for draws: vLLM takes no second one in a process."""
    monkeypatch.setattr(engine, "_config", replace(engine._config, codec="sampled", draws=DRAWS))
    monkeypatch.setattr(engine, "_logprob_count", engine.vocab_size)
    monkeypatch.setattr(engine._engine.model_config, "max_logprobs", -1)
    monkeypatch.setattr(LogprobRows, "reduce", engine._draw)
    return engine


def test_an_engine_draws_from_its_whole_distribution(sampling_engine: TeacherEngine) -> None:
    engine = sampling_engine
    token_ids = engine.tokenizer.encode(Prompt("sum", "What is three plus four?"))
    for index in range(6):
        engine.add(f"{index}:sum", token_ids.tolist(), engine.sampling("sum", index, token_ids.size))
    seen = 0
    while engine.unfinished:
        for completion in engine.step():
            counts = np.rint(np.exp(completion.top_k.logprobs.astype(np.float64)) * DRAWS)
            assert (counts.sum(axis=1) == DRAWS).all()
            assert (completion.top_k.tail_mass == 0).all()
            assert (completion.sampled_logprobs < 0).all()
            trace = Trace(
                prompt_id="sum",
                prompt_token_ids=token_ids,
                completion_token_ids=completion.token_ids,
                sampled_logprobs=completion.sampled_logprobs,
                top_k=completion.top_k,
                finish_reason=completion.finish_reason,
            )
            codec = CodecSpec("sampled", DRAWS, draws=DRAWS)
            (decoded,) = decode_block(encode_block([trace], codec=codec, vocab_size=engine.vocab_size))
            back = np.rint(np.exp(decoded.top_k.logprobs.astype(np.float64)) * DRAWS)
            assert (back == counts).all()
            assert (decoded.sampled_logprobs == completion.sampled_logprobs).all()
            # The tiny model is nearly uniform over its 384 tokens: a top 12 would be the same ones again.
            seen = max(seen, len(set(completion.top_k.token_ids[counts > 0].tolist())))
    assert seen > 2 * DRAWS
