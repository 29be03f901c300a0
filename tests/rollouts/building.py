"""Rollouts for tests, without a student."""

from __future__ import annotations

import numpy as np

from lynearm.rollouts.waves import Wave, rollout_tags
from lynearm.wire.traces import TopK, Trace

VOCAB = 384


def make_rollout(number: int, step: int, *, positions: int = 5, k: int = 4) -> Trace:
    rng = np.random.default_rng(number)
    ids = np.stack([rng.permutation(np.arange(5, 300))[:k] for _ in range(positions)]).astype(np.int32)
    rows = np.sort(np.log(rng.dirichlet(np.ones(k + 1), positions)[:, :k]), 1)[:, ::-1]
    return Trace(
        prompt_id=f"p{number % 3}",
        prompt_token_ids=rng.integers(5, 300, 4).astype(np.int32),
        completion_token_ids=rng.integers(5, 300, positions).astype(np.int32),
        sampled_logprobs=rng.uniform(-4, 0, positions).astype(np.float32),
        top_k=TopK(ids, rows.astype(np.float32), (1 - np.exp(rows).sum(1)).clip(0, 1).astype(np.float32)),
        finish_reason="length",
        sample_index=number,
        tags=rollout_tags({"domain": "maths"}, step, -2.0),
    )


def make_wave(first: int, count: int, step: int) -> Wave:
    return Wave(tuple(make_rollout(number, step) for number in range(first, first + count)))
