"""Traces of a real teacher for `benchmarks/distill_quality.py`, and what each codec leaves of them.

The teacher is a transformers model in float32. It writes at temperature 1 with its whole distribution at
hand, so that one completion gives rows of the likeliest tokens and rows of draws alike.

Shape legend: B = sequences, V = vocabulary, K = entries kept, D = draws, T = completion positions.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from codec_corpus import count_tokens, group_traces
from distill_quality_runs import Rows, full_logprobs

from lynearm.teacher.dictionary import TRAINING_POSITIONS
from lynearm.teacher.draws import draw_from_logits
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.dictionaries import Dictionary, DictionaryReader
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import SamplingParams, TopK, Trace

TOP_K = 64
DRAWS = 50
"""Draws of a position, as Anshumann et al. (2025) recommend."""

BLOCK_POSITIONS = 2048
"""Of a block: about what 256 KiB hold at k = 64."""

_BATCH = 48
_QUESTIONS_PER_TASK = 2
"""Of GSM8K, for each of self-instruct: there are 175 of the latter."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the teacher is asked."""

    prompt_id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Completions of a teacher, each with two views of its distributions; the lists have one order."""

    top_k: list[Trace]
    """Rows of the `TOP_K` likeliest tokens, float32 bit for bit."""
    draws: list[Trace]
    """Rows of `DRAWS` draws."""

    def from_trace(self, first: int) -> Corpus:
        """The completions from this one on."""
        return Corpus(self.top_k[first:], self.draws[first:])


def read_questions(data: Path) -> list[tuple[str, str]]:
    """Ids and texts of GSM8K's training questions and self-instruct's tasks, mixed; else the demo's."""
    rng = np.random.default_rng(0)
    maths = data / "gsm8k_train.jsonl"
    tasks = data / "self_instruct_seed_tasks.jsonl"
    if not maths.is_file() or not tasks.is_file():
        import lynearm.demo

        print(f"no questions in {data}: the demo's are asked", file=sys.stderr)
        lines = _read_lines(Path(lynearm.demo.__file__).with_name("prompts.jsonl"))
        asked = [(str(line["id"]), str(line["prompt"])) for line in lines]
        return [asked[index] for index in rng.permutation(len(asked))]
    questions = [(f"gsm8k-{n}", str(line["question"])) for n, line in enumerate(_read_lines(maths))]
    instructions = [
        (str(line["id"]), f"{line['instruction']}\n{line['instances'][0]['input']}".strip())
        for line in _read_lines(tasks)
    ]
    questions = [questions[index] for index in rng.permutation(len(questions))]
    mixed: list[tuple[str, str]] = []
    for number, index in enumerate(rng.permutation(len(instructions)).tolist()):
        start = number * _QUESTIONS_PER_TASK
        mixed += [*questions[start : start + _QUESTIONS_PER_TASK], instructions[index]]
    return [*mixed, *questions[len(instructions) * _QUESTIONS_PER_TASK :]]


def encode_prompts(questions: Sequence[tuple[str, str]], tokenizer: Any, *, longest: int) -> list[Prompt]:
    """The questions that, through the chat template, are no longer than `longest` tokens."""
    prompts: list[Prompt] = []
    for prompt_id, text in questions:
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) <= longest:
            prompts.append(Prompt(prompt_id, tuple(ids)))
    return prompts


def choose_prompts(prompts: Sequence[Prompt], *, held_out: int, trained: int) -> list[tuple[Prompt, int]]:
    """Held-out prompts, then those to train on, each with the number of its sample.

    Where there are too few to train on, they are asked again; the held-out ones never.

    Raises:
        ValueError: if none is left to train on.
    """
    rest = prompts[held_out:]
    if not rest:
        raise ValueError(f"{len(prompts)} prompts, of which {held_out} are held out: none is left")
    return [
        *((prompt, 0) for prompt in prompts[:held_out]),
        *((rest[number % len(rest)], number // len(rest)) for number in range(trained)),
    ]


def write_completions(
    model: Any, asked: Sequence[tuple[Prompt, int]], *, ends: Sequence[int], length: int, seed: int = 0
) -> Corpus:
    """Completions at temperature 1, each as far as an end token or `length`, in the order of `asked`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    by_length = sorted(range(len(asked)), key=lambda number: len(asked[number][0].token_ids))
    found: dict[int, tuple[Trace, Trace]] = {}
    for start in range(0, len(asked), _BATCH):
        numbers = by_length[start : start + _BATCH]
        batch = [asked[number] for number in numbers]
        pairs = _write_batch(model, batch, ends=ends, length=length, generator=generator)
        found |= dict(zip(numbers, pairs, strict=True))
        print(f"teacher: {len(found)} of {len(asked)} completions", file=sys.stderr, flush=True)
    ordered = [found[number] for number in range(len(asked))]
    return Corpus([top_k for top_k, _ in ordered], [draws for _, draws in ordered])


@dataclass(frozen=True, slots=True)
class _Step:
    """What one step of generation says of each sequence; arrays of B rows."""

    sampled_ids_B: np.ndarray
    sampled_logprobs_B: np.ndarray
    top_k: TopK
    draws: TopK


def _write_batch(
    model: Any, batch: Sequence[tuple[Prompt, int]], *, ends: Sequence[int], length: int, generator: Any
) -> list[tuple[Trace, Trace]]:
    import torch

    prompts = [prompt.token_ids for prompt, _ in batch]
    longest = max(map(len, prompts))
    # Padded at the beginning, so that all sequences end together.
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache = None
    steps: list[_Step] = []
    ended_B = np.zeros(len(batch), np.bool_)
    while len(steps) < length and not ended_B.all():
        with torch.inference_mode():
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            steps.append(_read_logits(output.logits[:, -1].float(), generator))
        ids = torch.from_numpy(steps[-1].sampled_ids_B.astype(np.int64))[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        ended_B |= np.isin(steps[-1].sampled_ids_B, ends)
    return [_make_traces(*one, steps, row, ends) for row, one in enumerate(batch)]


def _read_logits(logits_BV: Any, generator: Any) -> _Step:
    """Draws the next tokens; normalised in float64, where float32 would leave sums 1e-4 off."""
    import torch

    logprobs_BV = torch.log_softmax(logits_BV.double(), -1)
    sampled_B1 = torch.multinomial(logprobs_BV.exp(), 1, generator=generator)
    kept = logprobs_BV.topk(min(TOP_K, logprobs_BV.shape[1]), dim=-1)
    tail_B = (1.0 - kept.values.exp().sum(-1)).clamp(0.0, 1.0)
    drawn_BD, log_counts_BD = draw_from_logits(logits_BV, DRAWS, generator)
    return _Step(
        sampled_B1[:, 0].numpy().astype(np.int32),
        logprobs_BV.gather(1, sampled_B1)[:, 0].float().numpy(),
        TopK(kept.indices.numpy().astype(np.int32), kept.values.float().numpy(), tail_B.float().numpy()),
        TopK(
            drawn_BD.numpy().astype(np.int32),
            log_counts_BD.numpy(),
            np.zeros(len(drawn_BD), np.float32),
        ),
    )


def _make_traces(
    prompt: Prompt, sample_index: int, steps: Sequence[_Step], row: int, ends: Sequence[int]
) -> tuple[Trace, Trace]:
    sampled_T = np.array([step.sampled_ids_B[row] for step in steps], np.int32)
    stops = np.flatnonzero(np.isin(sampled_T, ends))
    count = int(stops[0]) + 1 if stops.size else len(steps)
    trace = Trace(
        prompt_id=prompt.prompt_id,
        prompt_token_ids=np.array(prompt.token_ids, np.int32),
        completion_token_ids=sampled_T[:count],
        sampled_logprobs=np.array([step.sampled_logprobs_B[row] for step in steps[:count]], np.float32),
        top_k=_rows_of([step.top_k for step in steps[:count]], row),
        finish_reason="stop" if stops.size else "length",
        sample_index=sample_index,
        sampling=SamplingParams(temperature=1.0),
    )
    return trace, replace(trace, top_k=_rows_of([step.draws for step in steps[:count]], row))


def _rows_of(steps: Sequence[TopK], row: int) -> TopK:
    return TopK(
        np.stack([step.token_ids[row] for step in steps]),
        np.stack([step.logprobs[row] for step in steps]),
        np.array([step.tail_mass[row] for step in steps], np.float32),
    )


def save_corpus(corpus: Corpus, directory: Path, vocab_size: int) -> None:
    """Write both views as blocks; the directory is there as a whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        for name, traces, codec in (
            ("top_k", corpus.top_k, CodecSpec("exact", TOP_K)),
            ("draws", corpus.draws, CodecSpec("sampled", DRAWS, draws=DRAWS)),
        ):
            for number, group in enumerate(group_traces(traces, BLOCK_POSITIONS)):
                block = encode_block(group, codec=codec, vocab_size=vocab_size)
                (unfinished / f"{name}.{number:05}.block").write_bytes(block)
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_corpus(directory: Path) -> Corpus:
    """What `save_corpus` wrote."""
    views = [
        [
            trace
            for path in sorted(directory.glob(f"{name}.*.block"))
            for trace in decode_block(path.read_bytes())
        ]
        for name in ("top_k", "draws")
    ]
    return Corpus(views[0], views[1])


@dataclass(frozen=True, slots=True)
class Coded:
    """Traces as a trainer reads them from a stream."""

    traces: list[Trace]
    bits_per_token: float
    """Headers and metadata included; of the blocks that have a dictionary, or of all where none has."""
    mean_kept: float
    """Entries of a row."""


def pass_through_codec(traces: Sequence[Trace], codec: CodecSpec, vocab_size: int) -> Coded:
    """Write traces as a teacher publishes them, and read them again.

    The stream begins without a dictionary and learns one from its first blocks, as `DictionaryKeeper` does.
    """
    known: dict[bytes, Dictionary] = {}
    reader = DictionaryReader(lambda digest: known[digest].encoded)
    current: Dictionary | None = None
    seen: list[list[Trace]] = []
    decoded: list[Trace] = []
    sizes: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for block in group_traces(traces, BLOCK_POSITIONS):
        data = encode_block(block, codec=codec, vocab_size=vocab_size, dictionary=current)
        decoded += decode_block(data, dictionaries=reader)
        sizes[current is not None].append((len(data), count_tokens(block)))
        seen.append(block)
        if current is None and sum(map(count_tokens, seen)) >= TRAINING_POSITIONS[0]:
            current = train_dictionary(seen, codec=codec, vocab_size=vocab_size)
            known[current.digest] = current
    measured = sizes[True] or sizes[False]
    kept = [(trace.top_k.logprobs > -np.inf).sum(axis=1) for trace in decoded]
    return Coded(
        decoded,
        8 * sum(size for size, _ in measured) / sum(tokens for _, tokens in measured),
        float(np.concatenate(kept).mean()),
    )


def make_rows(corpus: Corpus, rows: Rows, tail_draws: int = 0, *, teacher: Any) -> list[Trace]:
    """The corpus as traces of one kind of rows.

    Args:
        corpus: All of it.
        rows: Which.
        tail_draws: Draws from each tail, where rows have them.
        teacher: The model that wrote it, which is asked again where tails are drawn from.
    """
    import torch

    if rows == "draws":
        return corpus.draws
    if rows == "none":
        return [without_rows(trace) for trace in corpus.top_k]
    if rows == "tail draws":
        generator = torch.Generator().manual_seed(1)
        return [with_tail_draws(teacher, trace, tail_draws, generator) for trace in corpus.top_k]
    return corpus.top_k


def without_rows(trace: Trace) -> Trace:
    """The trace as a stream of k = 0 has it: its tokens, and no distributions."""
    positions = trace.completion_token_ids.size
    nothing = TopK(
        np.zeros((positions, 0), np.int32),
        np.zeros((positions, 0), np.float32),
        np.ones(positions, np.float32),
    )
    return replace(trace, top_k=nothing)


def with_tail_draws(teacher: Any, trace: Trace, count: int, generator: Any) -> Trace:
    """The trace with tokens drawn from each row's tail.

    Args:
        teacher: The model that wrote it.
        trace: Rows of likely entries, as many in each.
        count: Of tokens.
        generator: Of torch.
    """
    import torch

    kept_ids_TK = torch.from_numpy(trace.top_k.token_ids.astype(np.int64))
    tail_TV = full_logprobs(teacher, trace).exp().scatter_(1, kept_ids_TK, 0.0)
    drawn_TD = torch.multinomial(tail_TV, count, replacement=True, generator=generator)
    return replace(trace, top_k=replace(trace.top_k, tail_draws=drawn_TD.numpy().astype(np.int32)))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
