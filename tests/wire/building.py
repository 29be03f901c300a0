"""Traces to encode: softmax rows about as peaked as a language model's, and rows that are given."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from lynearm.wire.frames import publish_block_parts
from lynearm.wire.traces import Float32Array, TopK, Trace

VOCAB_SIZE = 49_152


def build_trace(
    seed: int = 0,
    *,
    positions: int = 24,
    k: int = 16,
    prompt: int = 7,
    vocab_size: int = VOCAB_SIZE,
    slope: float = 1.0,
    dtype: str = "float32",
    prompt_rows: bool = False,
    **overrides: Any,
) -> Trace:
    """A trace of drawn tokens.

    Args:
        seed: Of everything random.
        positions: Completion positions.
        k: Entries of each row.
        prompt: Prompt tokens.
        vocab_size: Ids are below it.
        slope: How peaked rows are; 0 is flat.
        dtype: Of the logits, "bfloat16" and "float16" being rounded to before the log-softmax.
        prompt_rows: Whether prompt positions have distributions too.
        overrides: Fields of the trace.
    """
    rng = np.random.default_rng(seed)
    prompt_token_ids = rng.integers(0, vocab_size, prompt).astype(np.int32)
    top_k, sampled, sampled_logprobs = draw_rows(
        rng, positions, k, vocab_size=vocab_size, slope=slope, dtype=dtype
    )
    fields: dict[str, Any] = {
        "prompt_id": f"prompt-{seed}",
        "prompt_token_ids": prompt_token_ids,
        "completion_token_ids": sampled,
        "sampled_logprobs": sampled_logprobs,
        "top_k": top_k,
        "finish_reason": "stop",
    }
    if prompt_rows:
        scored, ids, logprobs = draw_rows(rng, prompt - 1, k, vocab_size=vocab_size, slope=slope, dtype=dtype)
        fields |= {
            "prompt_token_ids": np.concatenate([prompt_token_ids[:1], ids]),
            "prompt_top_k": scored,
            "prompt_logprobs": logprobs,
        }
    return Trace(**{**fields, **overrides})


def draw_rows(
    rng: np.random.Generator, positions: int, k: int, *, vocab_size: int, slope: float, dtype: str
) -> tuple[TopK, npt.NDArray[np.int32], Float32Array]:
    """Rows, and for each one a token drawn from it and its logprob."""
    size = min(vocab_size, max(512, k))
    k = min(k, size)
    ids_NS = np.sort(rng.integers(0, vocab_size, (positions, size)), axis=1)
    # Few ids meet twice; a row whose ids do counts upwards instead.
    again = (np.diff(ids_NS, axis=1) == 0).any(axis=1)
    ids_NS[again] = (np.arange(size) * (vocab_size // size))[None]
    ids_NS = rng.permuted(ids_NS, axis=1)
    zipf_NS = rng.uniform(1, 5, (positions, 1)) * np.log1p(np.arange(size))
    logits_NS = round_logits(20 + rng.normal(0, 0.7, (positions, size)) - slope * zipf_NS, dtype)
    logprobs_NS = log_softmax(logits_NS)
    order_NS = np.argsort(-logprobs_NS, axis=1, kind="stable")
    ids_NS = np.take_along_axis(ids_NS, order_NS, 1).astype(np.int32)
    logprobs_NS = np.take_along_axis(logprobs_NS, order_NS, 1)
    masses_NS = np.exp(logprobs_NS.astype(np.float64))
    drawn_N = (masses_NS.cumsum(axis=1) < rng.uniform(0, 0.999, (positions, 1))).sum(axis=1)
    drawn_N = np.minimum(drawn_N, size - 1)[:, None]
    top_k = TopK(
        np.ascontiguousarray(ids_NS[:, :k]),
        np.ascontiguousarray(logprobs_NS[:, :k]),
        np.clip(masses_NS[:, k:].sum(axis=1), 0, 1).astype(np.float32),
    )
    sampled = np.take_along_axis(ids_NS, drawn_N, 1)[:, 0]
    return top_k, sampled, np.take_along_axis(logprobs_NS, drawn_N, 1)[:, 0]


def round_logits(logits: npt.NDArray[np.float64], dtype: str) -> Float32Array:
    """Logits as a forward pass in that type has them."""
    floats = logits.astype(np.float32)
    if dtype == "float16":
        return floats.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = floats.view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32)
    return floats


def log_softmax(logits: Float32Array) -> Float32Array:
    """As torch computes it in float32: (x − max) − log Σ e^(x − max)."""
    gaps = logits - logits.max(axis=1, keepdims=True)
    total: Float32Array = np.exp(gaps).sum(axis=1, keepdims=True, dtype=np.float32)
    return gaps - np.log(total)


def build_sampled_trace(
    seed: int = 0, *, positions: int = 24, draws: int = 50, vocab_size: int = VOCAB_SIZE, **overrides: Any
) -> Trace:
    """A trace whose rows are draws and their counts."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for _ in range(positions):
        exponents = rng.exponential(rng.uniform(0.1, 4), draws)
        tokens = np.minimum(np.exp(np.minimum(exponents, 40)).astype(np.int64), vocab_size) - 1
        ids, counts = np.unique(tokens, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        rows.append((ids[order], counts[order]))
    width = max((ids.size for ids, _ in rows), default=0)
    token_ids = np.zeros((positions, width), np.int32)
    logprobs = np.full((positions, width), -np.inf, np.float32)
    for t, (ids, counts) in enumerate(rows):
        token_ids[t, : ids.size] = ids
        logprobs[t, : ids.size] = np.log(counts / draws)
    fields: dict[str, Any] = {
        "prompt_id": f"prompt-{seed}",
        "prompt_token_ids": rng.integers(0, vocab_size, 5).astype(np.int32),
        "completion_token_ids": token_ids[:, 0].copy() if width else np.zeros(0, np.int32),
        "sampled_logprobs": rng.uniform(-3, 0, positions).astype(np.float32),
        "top_k": TopK(token_ids, logprobs, np.zeros(positions, np.float32)),
        "finish_reason": "length",
    }
    return Trace(**{**fields, **overrides})


def build_rows(logprobs: npt.ArrayLike, token_ids: npt.ArrayLike, **overrides: Any) -> Trace:
    """A trace whose rows are given; the sampled token is the first entry of each row."""
    rows = np.atleast_2d(np.asarray(logprobs, np.float32))
    ids = np.atleast_2d(np.asarray(token_ids, np.int32))
    tail = np.maximum(0, 1 - np.exp(rows.astype(np.float64)).sum(axis=1)).astype(np.float32)
    fields: dict[str, Any] = {
        "prompt_id": "rows",
        "prompt_token_ids": np.zeros(0, np.int32),
        "completion_token_ids": ids[:, 0].copy(),
        "sampled_logprobs": rows[:, 0].copy(),
        "top_k": TopK(ids, rows, tail),
        "finish_reason": "stop",
    }
    return Trace(**{**fields, **overrides})


def draw_tails(trace: Trace, draws: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Trace:
    """The trace with tokens drawn from each row's tail, likely ones more often; every fifth row has none."""
    rng = np.random.default_rng(seed)

    def draw(top_k: TopK) -> TopK:
        draws_TD = np.full((top_k.positions, draws), -1, np.int32)
        for t in range(top_k.positions):
            kept = top_k.token_ids[t, top_k.logprobs[t] > -np.inf]
            free = np.ones(vocab_size, np.bool_)
            free[kept] = False
            others = np.flatnonzero(free)
            if others.size and t % 5 != 4:
                draws_TD[t] = others[(others.size * rng.random(draws) ** 4).astype(np.int64)]
        return dataclasses.replace(top_k, tail_draws=draws_TD)

    prompt = trace.prompt_top_k
    prompt_top_k = None if prompt is None else draw(prompt)
    return dataclasses.replace(trace, top_k=draw(trace.top_k), prompt_top_k=prompt_top_k)


def replace_top_k(trace: Trace, **arrays: npt.NDArray[Any]) -> Trace:
    """The trace with other arrays in its completion's rows."""
    return dataclasses.replace(trace, top_k=dataclasses.replace(trace.top_k, **arrays))


def publish_request(
    sequence: int, block: bytes, finished_prompt_ids: tuple[str, ...] = (), **more: Any
) -> bytes:
    """A `PublishRequest` with one block."""
    return b"".join(publish_block_parts(sequence, block, finished_prompt_ids, **more))
