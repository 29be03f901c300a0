"""Real vLLM over a tiny Llama: its logprobs against transformers, arrays against vLLM's own lists."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.engine import Completion, TeacherEngine, completion_seed
from lynearm.teacher.logprob_arrays import LogprobRows, collect_as_arrays
from lynearm.teacher.prompts import ChatMessage, Prompt
from lynearm.teacher.tokenizer import PromptTokenizer
from lynearm.wire.errors import ConfigError, PromptTooLongError
from lynearm.wire.specs import hash_chat_template, hash_vocab

# torch and vLLM warn about each other's old names while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPTS = [Prompt("france", "The capital of France is"), Prompt("sum", "What is three plus four?")]


def generate(engine: TeacherEngine, samples: int = 6) -> list[Completion]:
    for prompt in PROMPTS:
        token_ids = engine.tokenizer.encode(prompt)
        for index in range(samples):
            sampling = engine.sampling(prompt.prompt_id, index, token_ids.size)
            engine.add(f"{index}:{prompt.prompt_id}", token_ids.tolist(), replace(sampling, max_tokens=3))
    done: list[Completion] = []
    while engine.unfinished:
        done += engine.step()
    return sorted(done, key=lambda completion: completion.request_id)


@pytest.fixture(scope="module")
def completions(engine: TeacherEngine) -> list[Completion]:
    return generate(engine)


def reference_logprobs(
    model_dir: Path, prompt_ids: list[int], completion_ids: list[int]
) -> npt.NDArray[np.float64]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0].double()
    rows = torch.log_softmax(logits, dim=-1)[len(prompt_ids) - 1 : -1]
    return np.asarray(rows.numpy())


def test_logprobs_are_those_of_transformers_at_every_position(
    engine: TeacherEngine, tiny_model: Path, completions: list[Completion]
) -> None:
    prompt_ids = {prompt.prompt_id: engine.tokenizer.encode(prompt).tolist() for prompt in PROMPTS}
    for completion in completions:
        ids = completion.token_ids.tolist()
        expected = reference_logprobs(tiny_model, prompt_ids[completion.request_id.partition(":")[2]], ids)
        rows = np.arange(len(ids))
        kept = np.take_along_axis(expected, completion.top_k.token_ids.astype(np.int64), axis=1)
        assert np.abs(completion.top_k.logprobs - kept).max() < 1e-3
        assert np.abs(completion.sampled_logprobs - expected[rows, ids]).max() < 1e-3
        best = np.sort(expected, axis=1)[:, ::-1][:, : engine.top_k]
        assert np.abs(completion.top_k.logprobs - best).max() < 1e-3
        assert np.abs(completion.top_k.tail_mass - (1 - np.exp(best).sum(axis=1))).max() < 1e-3
        assert all(len(set(row)) == engine.top_k for row in completion.top_k.token_ids.tolist())


def test_completions_end_with_an_end_token_or_at_their_bound(
    engine: TeacherEngine, completions: list[Completion]
) -> None:
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        ended = int(completion.token_ids[-1]) in engine.eos_token_ids
        assert ended == (completion.finish_reason == "stop")
        assert not set(completion.token_ids[:-1].tolist()) & set(engine.eos_token_ids)


def test_arrays_hold_exactly_what_vllms_lists_hold(
    engine: TeacherEngine, completions: list[Completion]
) -> None:
    assert engine._restore is not None, "this vLLM does not take the arrays"
    engine._restore()
    seen = LogprobRows.rows_seen
    try:
        from_lists = generate(engine)
        assert LogprobRows.rows_seen == seen, "the arrays were collected although the change was undone"
    finally:
        engine._restore = collect_as_arrays()
    from_arrays = generate(engine)
    assert LogprobRows.rows_seen - seen == sum(completion.token_ids.size for completion in from_arrays)
    for first, second, third in zip(completions, from_lists, from_arrays, strict=True):
        for other in (second, third):
            np.testing.assert_array_equal(first.token_ids, other.token_ids)
            np.testing.assert_array_equal(first.top_k.token_ids, other.top_k.token_ids)
            np.testing.assert_array_equal(first.top_k.logprobs, other.top_k.logprobs)
            np.testing.assert_array_equal(first.top_k.tail_mass, other.top_k.tail_mass)
            np.testing.assert_array_equal(first.sampled_logprobs, other.sampled_logprobs)


def test_a_vllm_that_collects_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.logprobs import LogprobsProcessor

    def other(self: object, rows: object, more: object) -> None: ...

    monkeypatch.setattr(LogprobsProcessor, "_update_sample_logprobs", other)
    assert collect_as_arrays() is None
    assert list(inspect.signature(LogprobsProcessor._update_sample_logprobs).parameters)[-1] == "more"


def test_the_specs_name_weights_tokenizer_and_conventions(engine: TeacherEngine, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    teacher, spec = engine.describe()
    assert (teacher.model, teacher.dtype, teacher.vocab_size) == ("tiny", "float32", 384)
    assert (teacher.max_model_len, teacher.logprobs_mode, teacher.logprobs_temperature) == (128, "raw", 1.0)
    assert teacher.revision.startswith("sha256:")
    assert teacher.engine.startswith("vllm ")
    assert spec.vocab_sha256 == hash_vocab(tokenizer.get_vocab().items())
    assert spec.chat_template_sha256 == hash_chat_template(tokenizer.chat_template)
    assert spec.eos_token_ids == (0, 2, *range(300, 384))


def test_a_plain_prompt_goes_through_the_chat_template(engine: TeacherEngine, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = engine.tokenizer.encode(Prompt("a", "Hi"))
    chat = engine.tokenizer.encode(Prompt("a", messages=(ChatMessage("user", "Hi"),)))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(plain) == text
    np.testing.assert_array_equal(plain, chat)
    raw = PromptTokenizer(tokenizer, make_config(tiny_model, chat=False), max_model_len=128)
    assert tokenizer.decode(raw.encode(Prompt("a", "Hi"))) == "Hi"


def test_a_prompt_that_fills_the_context_is_refused(engine: TeacherEngine) -> None:
    with pytest.raises(PromptTooLongError, match=r"tokens, and the context of 128"):
        engine.tokenizer.encode(Prompt("long", "number " * 200))


def test_only_a_prompt_that_ends_in_the_start_marker_opens_the_reasoning(
    engine: TeacherEngine, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    opens = [
        engine.tokenizer.opens_reasoning(tokenizer.encode(text))
        for text in ("Hi<think>\n", "Hi<think>", "Hi", "what does <think> mean?", "<think>x</think>\n")
    ]
    assert opens == [True, True, False, False, False]


def test_an_unknown_reasoning_marker_is_refused(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ConfigError, match="<reason>"):
        PromptTokenizer(tokenizer, make_config(tiny_model, reasoning_start="<reason>"), max_model_len=128)


def test_seeded_prompts_beyond_one_prefill_step_are_generated(engine: TeacherEngine) -> None:
    # 40 × 100 tokens need two steps of 2048. vLLM turns the generator of a partly prefilled request back,
    # which CPU generators cannot do, so that no prompt may be prefilled in parts.
    for index in range(40):
        sampling = replace(engine.sampling(f"long-{index}", 0, 100), max_tokens=2)
        assert sampling.seed is not None
        engine.add(f"long-{index}", [5 + index] * 100, sampling)
    done = 0
    while engine.unfinished:
        done += len(engine.step())
    assert done == 40


def test_seeds_differ_between_prompts_samples_and_runs() -> None:
    seeds = {completion_seed(seed, name, index) for seed in (0, 1) for name in "ab" for index in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 31 for seed in seeds)


def make_config(model: Path, *, chat: bool = True, reasoning_start: str = "auto") -> TeachConfig:
    return TeachConfig(str(model), Path("p"), "s", "Apache-2.0", chat=chat, reasoning_start=reasoning_start)
