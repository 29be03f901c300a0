"""Corpora of a teacher's likeliest tokens, and the traces and blocks that benchmarks make of them.

A corpus is an .npz with a row for each generated token: `ids` [N, 256], `logprobs` [N, 256] float32, sorted
descending, `tail_mass` [N] float64, `sampled_id`, `sampled_logprob`, and `seq`, the number of the completion.
`lse` and `lse_bf16logits` are the normalisers of the float32 logits and of the same rounded to bf16;
`vocab_size` is that of SmolLM2 where the file does not say.

Shape legend: N = positions, K = entries kept, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lynearm.wire.traces import TopK, Trace

WIDTH = 256
"""Entries of a row in the file."""

SMOLLM2_VOCAB_SIZE = 49_152
TRAIN_SHARE = 0.6

_SYNTHETIC_VOCAB_SIZE = 16_384
_SYNTHETIC_LENGTH = 96
_HIDDEN = 32
_LOGIT_SHIFT = np.float32(22)
"""Puts the likeliest logits near 25, as SmolLM2's are: it decides how finely bf16 rounds them."""


FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows of one teacher, completion after completion."""

    name: str
    vocab_size: int
    token_ids_NK: IntArray
    logprobs_NK: Float32Array
    tail_mass_N: FloatArray
    sampled_ids_N: IntArray
    sampled_logprobs_N: Float32Array
    sequence_N: IntArray
    lse_N: FloatArray
    bf16_lse_N: FloatArray

    @property
    def positions(self) -> int:
        return self.sequence_N.size

    def select(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Corpus:
        """Rows by a mask, or by their numbers."""
        rows = {
            field.name: getattr(self, field.name)[chosen]
            for field in dataclasses.fields(self)
            if field.name.rpartition("_")[2] in ("N", "NK")
        }
        return dataclasses.replace(self, **rows)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            vocab_size=np.int64(self.vocab_size),
            ids=self.token_ids_NK,
            logprobs=self.logprobs_NK,
            tail_mass=self.tail_mass_N,
            sampled_id=self.sampled_ids_N,
            sampled_logprob=self.sampled_logprobs_N,
            seq=self.sequence_N,
            lse=self.lse_N,
            lse_bf16logits=self.bf16_lse_N,
        )


def load_corpus(path: Path) -> Corpus:
    with np.load(path) as archive:
        return Corpus(
            name=path.name,
            vocab_size=int(archive["vocab_size"]) if "vocab_size" in archive.files else SMOLLM2_VOCAB_SIZE,
            token_ids_NK=archive["ids"].astype(np.int32),
            logprobs_NK=archive["logprobs"],
            tail_mass_N=archive["tail_mass"],
            sampled_ids_N=archive["sampled_id"].astype(np.int32),
            sampled_logprobs_N=archive["sampled_logprob"],
            sequence_N=archive["seq"].astype(np.int32),
            lse_N=archive["lse"],
            bf16_lse_N=archive["lse_bf16logits"],
        )


def make_corpus(positions: int, seed: int = 0) -> Corpus:
    """A made-up teacher, for machines without a real one's rows.

    Logits are a Zipfian prior plus the match of a token's random vector with a state, which drifts and leans
    towards what was just said, so that likely tokens come back; each position has a temperature of its own.
    The constants give SmolLM2's mean entropy, 1.5 nats, and the mass of its 16, 64 and 128 likeliest tokens.
    """
    rng = np.random.default_rng(seed)
    ranks_V = np.arange(_SYNTHETIC_VOCAB_SIZE)
    prior_V = (rng.normal(0, 1.5, ranks_V.size) - 1.7 * np.log(ranks_V + 3.0)).astype(np.float32)
    vectors_VH = rng.standard_normal((ranks_V.size, _HIDDEN), dtype=np.float32)
    completions: list[Corpus] = []
    for start in range(0, positions, _SYNTHETIC_LENGTH):
        state_H = _to_unit(rng.standard_normal(_HIDDEN))
        logits: list[Float32Array] = []
        sampled: list[int] = []
        for _ in range(min(_SYNTHETIC_LENGTH, positions - start)):
            sharpness = np.float32(np.exp(rng.normal(0.2, 0.3)))
            logits.append(sharpness * (prior_V + np.float32(1.2) * (vectors_VH @ state_H)) + _LOGIT_SHIFT)
            weights_V = np.cumsum(np.exp(1.25 * (logits[-1] - logits[-1].max())))
            sampled.append(int(np.searchsorted(weights_V, rng.random() * weights_V[-1])))
            lean_H = 0.15 * vectors_VH[sampled[-1]] + 0.6 * rng.standard_normal(_HIDDEN)
            state_H = _to_unit(0.8 * np.sqrt(_HIDDEN) * state_H + lean_H)
        completions.append(gather_rows(np.stack(logits), np.array(sampled), len(completions)))
    return join_rows("synthetic", completions)


def gather_rows(
    logits_NV: npt.NDArray[np.floating], sampled_N: npt.NDArray[np.integer], sequence_N: npt.ArrayLike
) -> Corpus:
    """The rows of a corpus from whole distributions.

    Args:
        logits_NV: Logits.
        sampled_N: What was drawn.
        sequence_N: Number of each row's completion, or of them all.
    """
    logits_NV = logits_NV.astype(np.float32)
    width = min(WIDTH, logits_NV.shape[1])
    top_NK = np.argpartition(-logits_NV, width - 1, axis=1)[:, :width]
    order_NK = np.argsort(-np.take_along_axis(logits_NV, top_NK, 1), axis=1, kind="stable")
    top_NK = np.take_along_axis(top_NK, order_NK, 1)
    lse_N = _log_sum_exp(logits_NV)
    logprobs_NK = (np.take_along_axis(logits_NV, top_NK, 1) - lse_N[:, None]).astype(np.float32)
    sampled_logprobs_N = logits_NV[np.arange(sampled_N.size), sampled_N] - lse_N
    kept_N = np.exp(logprobs_NK.astype(np.float64)).sum(axis=1)
    return Corpus(
        name="",
        vocab_size=logits_NV.shape[1],
        token_ids_NK=top_NK.astype(np.int32),
        logprobs_NK=logprobs_NK,
        tail_mass_N=np.maximum(0.0, 1.0 - kept_N),
        sampled_ids_N=sampled_N.astype(np.int32),
        sampled_logprobs_N=sampled_logprobs_N.astype(np.float32),
        sequence_N=np.broadcast_to(np.asarray(sequence_N, np.int32), sampled_N.shape),
        lse_N=lse_N,
        bf16_lse_N=_log_sum_exp(round_to_bf16(logits_NV)),
    )


def join_rows(name: str, parts: Sequence[Corpus]) -> Corpus:
    joined = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(Corpus)
        if field.name not in ("name", "vocab_size")
    }
    return Corpus(name=name, vocab_size=parts[0].vocab_size, **joined)


def on_bf16_grid(corpus: Corpus) -> Corpus:
    """The corpus as a teacher with bf16 logits would give it: their log-softmax in float32, sorted again."""
    logits_NK = round_to_bf16(
        (corpus.logprobs_NK.astype(np.float64) + corpus.lse_N[:, None]).astype(np.float32)
    )
    top_N = logits_NK.max(axis=1)
    log_sum_N = (corpus.bf16_lse_N - top_N).astype(np.float32)
    logprobs_NK = (logits_NK - top_N[:, None]) - log_sum_N[:, None]
    order_NK = np.argsort(-logprobs_NK, axis=1, kind="stable")
    logprobs_NK = np.take_along_axis(logprobs_NK, order_NK, 1)
    token_ids_NK = np.take_along_axis(corpus.token_ids_NK, order_NK, 1)
    is_sampled_NK = token_ids_NK == corpus.sampled_ids_N[:, None]
    of_entry_N = logprobs_NK[np.arange(len(logprobs_NK)), is_sampled_NK.argmax(axis=1)]
    return dataclasses.replace(
        corpus,
        name=f"{corpus.name}, bf16 logits",
        token_ids_NK=token_ids_NK,
        logprobs_NK=logprobs_NK,
        tail_mass_N=np.maximum(0.0, 1.0 - np.exp(logprobs_NK.astype(np.float64)).sum(axis=1)),
        sampled_logprobs_N=np.where(is_sampled_NK.any(axis=1), of_entry_N, corpus.sampled_logprobs_N),
    )


def round_to_bf16(values: Float32Array) -> Float32Array:
    """Nearest bf16, ties to even, as float32."""
    bits = values.view(np.uint32)
    rounding = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    rounded: Float32Array = ((bits + rounding) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded


def split_corpus(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Train and test rows, whole completions each."""
    count = int(corpus.sequence_N.max()) + 1
    order = np.random.default_rng(0).permutation(count)
    in_train_N = np.isin(corpus.sequence_N, order[: int(count * TRAIN_SHARE)])
    return corpus.select(in_train_N), corpus.select(~in_train_N)


def build_traces(corpus: Corpus, k: int, tail_draws: int = 0) -> list[Trace]:
    """A trace of each completion, with its k likeliest entries, draws from their tails, and no prompt.

    Tails are drawn from as far as the corpus has their tokens, which are the next likeliest ones: a teacher's
    draws reach further, and cost a third of a bit more.
    """
    likely_NK = np.exp(corpus.logprobs_NK[:, k:].astype(np.float64))
    rows = TopK(
        token_ids=np.ascontiguousarray(corpus.token_ids_NK[:, :k]),
        logprobs=np.ascontiguousarray(corpus.logprobs_NK[:, :k]),
        tail_mass=(corpus.tail_mass_N + likely_NK.sum(axis=1)).astype(np.float32),
        tail_draws=_draw_entries(corpus.token_ids_NK[:, k:], likely_NK, tail_draws) if tail_draws else None,
    )
    return _traces_of(corpus, rows)


def _draw_entries(token_ids_NK: IntArray, likely_NK: FloatArray, draws: int) -> IntArray:
    """Entries of each row drawn by their probabilities, with replacement."""
    rng = np.random.default_rng(0)
    cumulated_NK = likely_NK.cumsum(axis=1)
    points_DN1 = rng.random((draws, len(likely_NK), 1)) * cumulated_NK[:, -1:]
    drawn_ND = np.stack([(cumulated_NK <= point_N1).sum(axis=1) for point_N1 in points_DN1], axis=1)
    return np.take_along_axis(token_ids_NK, drawn_ND, axis=1)


def draw_traces(corpus: Corpus, draws: int) -> list[Trace]:
    """Traces whose rows are draws from the teacher: entries at log(count / draws), no tail.

    The rows of the corpus stand for the teacher: their tails are dropped, and the rest is made to sum to 1.
    """
    rng = np.random.default_rng(0)
    likely_NK = np.exp(corpus.logprobs_NK.astype(np.float64))
    counts_NK = rng.multinomial(draws, likely_NK / likely_NK.sum(axis=1, keepdims=True))
    width = int((counts_NK > 0).sum(axis=1).max())
    order_NK = np.argsort(-counts_NK, axis=1, kind="stable")[:, :width]
    counts_NK = np.take_along_axis(counts_NK, order_NK, 1)
    with np.errstate(divide="ignore"):
        logprobs_NK = np.log(counts_NK / draws).astype(np.float32)
    token_ids_NK = np.take_along_axis(corpus.token_ids_NK, order_NK, 1)
    rows = TopK(
        token_ids=np.where(counts_NK > 0, token_ids_NK, 0).astype(np.int32),
        logprobs=logprobs_NK,
        tail_mass=np.zeros(corpus.positions, np.float32),
    )
    return _traces_of(corpus, rows)


def group_traces(traces: Sequence[Trace], block_tokens: int) -> list[list[Trace]]:
    """Whole traces until a group has at least `block_tokens` tokens; the rest as a last group."""
    groups: list[list[Trace]] = [[]]
    for trace in traces:
        if count_tokens(groups[-1]) >= block_tokens:
            groups.append([])
        groups[-1].append(trace)
    return groups


def cut_trace(trace: Trace, length: int) -> list[Trace]:
    """Pieces of a completion, each a trace of at most `length` tokens."""
    pieces = [slice(start, start + length) for start in range(0, trace.completion_token_ids.size, length)]
    return [
        dataclasses.replace(
            trace,
            completion_token_ids=trace.completion_token_ids[piece],
            sampled_logprobs=trace.sampled_logprobs[piece],
            top_k=select_rows(trace.top_k, piece),
        )
        for piece in pieces
    ]


def select_rows(rows: TopK, piece: slice) -> TopK:
    draws = None if rows.tail_draws is None else rows.tail_draws[piece]
    return TopK(rows.token_ids[piece], rows.logprobs[piece], rows.tail_mass[piece], draws)


def count_tokens(traces: Sequence[Trace]) -> int:
    return sum(trace.completion_token_ids.size for trace in traces)


def _traces_of(corpus: Corpus, rows: TopK) -> list[Trace]:
    starts = np.flatnonzero(np.diff(corpus.sequence_N, prepend=-1)).tolist()
    pieces = [slice(*bounds) for bounds in zip(starts, [*starts[1:], corpus.positions], strict=True)]
    return [
        Trace(
            prompt_id=f"prompt-{corpus.sequence_N[piece.start]}",
            prompt_token_ids=np.zeros(0, np.int32),
            completion_token_ids=corpus.sampled_ids_N[piece],
            sampled_logprobs=corpus.sampled_logprobs_N[piece],
            top_k=select_rows(rows, piece),
            finish_reason="stop",
        )
        for piece in pieces
    ]


def _to_unit(vector_H: npt.NDArray[np.floating]) -> Float32Array:
    unit_H: Float32Array = (vector_H / np.linalg.norm(vector_H)).astype(np.float32)
    return unit_H


def _log_sum_exp(logits_NV: Float32Array) -> FloatArray:
    top_N1 = logits_NV.max(axis=1, keepdims=True)
    total_N: FloatArray = np.exp(logits_NV - top_N1).sum(axis=1, dtype=np.float64)
    lse_N: FloatArray = top_N1[:, 0] + np.log(total_N)
    return lse_N
