"""Penalties and stops in real vLLM: what is drawn changes, what is recorded of it does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models.teaching import teach_config

from lynearm.teacher.engine import Completion, TeacherEngine
from lynearm.teacher.logprob_arrays import LogprobRows
from lynearm.teacher.preflight import load_checker
from lynearm.teacher.scoring import ScoreTask
from lynearm.wire.errors import ConfigError
from lynearm.wire.traces import SamplingParams

# torch and vLLM warn about each other's old names while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LONG = SamplingParams(temperature=0.0, max_tokens=40, min_tokens=40)

FREE = SamplingParams(temperature=0.0, max_tokens=110)

PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3}


def prompts_of(engine: TeacherEngine) -> dict[str, list[int]]:
    generator = np.random.default_rng(11)
    made = {f"p{n}": generator.integers(5, engine.vocab_size, n).tolist() for n in (1, 3, 17, 40)}
    # Of this one the model writes 16 tokens before an end token, more than of most.
    return made | {"talkative": [42, 77, 107]}


def generate(engine: TeacherEngine, sampling: SamplingParams) -> dict[str, Completion]:
    for name, token_ids in prompts_of(engine).items():
        engine.add(name, token_ids, sampling)
    done: dict[str, Completion] = {}
    while engine.unfinished:
        done |= {completion.request_id: completion for completion in engine.step()}
    return done


def check_against_scoring(engine: TeacherEngine, done: Mapping[str, Completion]) -> None:
    prompts = prompts_of(engine)
    for name, completion in done.items():
        prompt = np.asarray(prompts[name], np.int32)
        engine.scoring.add(ScoreTask(name, prompt, completion.token_ids, top_k=engine.top_k))
    while engine.unfinished:
        engine.step()
    for score in engine.scoring.take_finished():
        completion = done[score.request_id]
        assert np.abs(score.sampled_logprobs - completion.sampled_logprobs).max() < 1e-4
        assert np.abs(score.top_k.logprobs - completion.top_k.logprobs).max() < 1e-4
        assert np.abs(score.top_k.tail_mass - completion.top_k.tail_mass).max() < 1e-4


def text_of(engine: TeacherEngine, token_ids: list[int]) -> str:
    return engine.tokenizer.decode(token_ids, ())


def first_ascii(text: str, start: int, length: int) -> str:
    """Characters of a text that are whole: a random model writes halves of others, too."""
    for at in range(start, len(text) - length):
        if text[at : at + length].isascii():
            return text[at : at + length]
    raise AssertionError(f"no {length} ASCII characters in {text!r}")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_with_penalties_the_rows_are_the_models_own(engine: TeacherEngine, temperature: float) -> None:
    plain = generate(engine, replace(LONG, temperature=temperature, seed=3))
    done = generate(engine, replace(LONG, temperature=temperature, seed=3, **PENALTIES))
    check_against_scoring(engine, done)

    def most_often(found: Mapping[str, Completion]) -> int:
        return max(max(Counter(one.token_ids.tolist()).values()) for one in found.values())

    assert most_often(done) < most_often(plain), "the penalties changed nothing"


def test_no_completion_ends_before_min_tokens_and_its_rows_stay_whole(engine: TeacherEngine) -> None:
    sampling = SamplingParams(max_tokens=40, seed=1)
    short = generate(engine, sampling)
    assert min(one.token_ids.size for one in short.values()) < 12
    done = generate(engine, replace(sampling, min_tokens=12))
    assert all(one.token_ids.size >= 12 for one in done.values())
    # End tokens could not be drawn, but the model still thinks of them.
    assert all(np.isfinite(one.top_k.logprobs).all() for one in done.values())
    assert any(np.isin(one.top_k.token_ids[:12], engine.eos_token_ids).any() for one in done.values())
    check_against_scoring(engine, done)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(engine: TeacherEngine) -> None:
    whole = generate(engine, FREE)["talkative"].token_ids.tolist()
    stop = first_ascii(text_of(engine, whole), 5, 2)
    needed = next(end for end in range(1, len(whole)) if stop in text_of(engine, whole[:end]))
    seen = LogprobRows.rows_seen
    done = generate(engine, replace(FREE, stop=("not in any text", stop)))
    assert LogprobRows.rows_seen > seen, "the rows were not collected as arrays"
    completion = done["talkative"]
    assert (completion.finish_reason, completion.stop_string) == ("stop", stop)
    assert completion.token_ids.tolist() == whole[:needed]
    assert completion.top_k.positions == completion.sampled_logprobs.size == needed
    check_against_scoring(engine, done)


def test_a_stop_string_counts_after_min_tokens_alone(engine: TeacherEngine) -> None:
    whole = generate(engine, LONG)["p17"].token_ids.tolist()
    stop = first_ascii(text_of(engine, whole), 3, 1)
    late = generate(engine, replace(LONG, min_tokens=30, stop=(stop,)))["p17"]
    assert late.token_ids.size > 30
    assert stop in text_of(engine, late.token_ids.tolist()[:30])


def test_a_stop_token_ends_a_completion_and_is_its_last(engine: TeacherEngine) -> None:
    whole = generate(engine, FREE)["talkative"].token_ids.tolist()
    stop = whole[6]
    done = generate(engine, replace(FREE, stop_token_ids=(stop,)))["talkative"]
    assert done.token_ids.tolist() == whole[: whole.index(stop) + 1]
    assert (done.finish_reason, done.stop_string) == ("stop", "")


def test_the_text_of_an_end_token_is_no_stop_string(engine: TeacherEngine) -> None:
    sampling = SamplingParams(max_tokens=60, seed=1)
    ended = {name: one for name, one in generate(engine, sampling).items() if one.finish_reason == "stop"}
    assert ended
    stops = tuple({text_of(engine, one.token_ids.tolist()[-1:]) for one in ended.values()})
    for name, completion in generate(engine, replace(sampling, stop=stops)).items():
        last = int(completion.token_ids[-1])
        assert completion.stop_string == "" or last not in engine.eos_token_ids, name


def test_a_streamed_request_stops_alike(engine: TeacherEngine) -> None:
    whole = generate(engine, FREE)["talkative"].token_ids.tolist()
    sampling = replace(FREE, stop=(first_ascii(text_of(engine, whole), 5, 2),))
    expected = generate(engine, sampling)["talkative"]
    engine.add("streamed", prompts_of(engine)["talkative"], sampling, streamed=True, top_k=3)
    (done,) = [completion for _ in range(60) for completion in engine.step()]
    assert done.token_ids.tolist() == expected.token_ids.tolist()
    assert (done.stop_string, done.top_k.k) == (expected.stop_string, 3)


def test_a_stop_token_that_the_vocabulary_lacks_is_refused_before_anything_starts(tiny_model: Path) -> None:
    config = teach_config(tiny_model, stop_token_ids=(5, 384), ray_address="local")
    with pytest.raises(ConfigError, match="stop token 384 is outside the vocabulary, 0 to 383"):
        load_checker(config)


def test_what_the_engine_is_told_is_what_the_config_says(
    engine: TeacherEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**PENALTIES, "stop": ("\n\n",), "stop_token_ids": (7,), "min_tokens": 20}
    monkeypatch.setattr(engine, "_config", replace(engine._config, **changes))
    sampling = engine.sampling("a", 0, 3)
    assert {name: getattr(sampling, name) for name in changes} == changes
    # The context of 128 ends before.
    short = engine.sampling("a", 0, 120)
    assert (short.min_tokens, short.max_tokens) == (8, 8)
