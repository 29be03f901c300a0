"""From a rollout and what the teacher thinks of it to the trace that a student learns from; no I/O.

Shape legend: T = completion positions, K = entries of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lynearm.rollouts.config import RolloutConfig, Support
from lynearm.wire.scoring import ScoredCompletion, ScoreSettings, StudentCompletion
from lynearm.wire.traces import Float32Array, Int32Array, TopK, Trace


def score_settings(config: RolloutConfig, session: str) -> ScoreSettings:
    """What is asked of the teacher.

    Args:
        config: Says what a row holds.
        session: Within which rollouts are named; the same for a process that takes another's place, so that
            the teacher need not score twice what it remembers.
    """
    on_teacher = config.support == "teacher"
    return ScoreSettings(
        session=session,
        top_k=config.top_k if on_teacher else 0,
        temperature=config.score_temperature,
        # The tail of the student's support is what its entries leave: in steps of 1/1024 nat it would be
        # off by a thousandth.
        codec="fine" if on_teacher else "exact",
        tail_draws=config.tail_draws,
    )


def score_request(rollout: Trace, support: Support) -> StudentCompletion:
    """The rollout as the teacher is asked about it, under a name that no other content has."""
    chosen = rollout.top_k.token_ids if support == "student" else None
    digest = hashlib.blake2b(digest_size=8)
    for ids in (rollout.prompt_token_ids, rollout.completion_token_ids):
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    name = f"{rollout.sample_index}-{digest.hexdigest()}"
    return StudentCompletion(name, rollout.prompt_token_ids, rollout.completion_token_ids, chosen)


def scored_rollout(rollout: Trace, scored: ScoredCompletion, support: Support) -> Trace:
    """The rollout with the teacher's distributions in place of the student's.

    Args:
        rollout: With the student's distributions.
        scored: What the teacher said of it.
        support: Whose likeliest tokens the rows keep.
    """
    top_k = scored.trace.top_k
    if support == "student":
        top_k = rows_at(rollout.top_k.token_ids, scored.chosen_logprobs)
    return replace(rollout, sampled_logprobs=scored.trace.sampled_logprobs, top_k=top_k)


def rows_at(token_ids_TK: Int32Array, logprobs_TK: Float32Array) -> TopK:
    """A distribution at given tokens, and what it holds elsewhere.

    Args:
        token_ids_TK: All different within a row.
        logprobs_TK: Natural log, of the whole vocabulary's distribution.
    """
    order_TK = np.argsort(-logprobs_TK, axis=1, kind="stable")
    kept_TK = np.take_along_axis(logprobs_TK, order_TK, 1)
    tail_T = 1.0 - np.exp(kept_TK.astype(np.float64)).sum(1)
    return TopK(
        np.ascontiguousarray(np.take_along_axis(token_ids_TK, order_TK, 1), np.int32),
        np.ascontiguousarray(kept_TK, np.float32),
        np.clip(tail_T, 0.0, 1.0).astype(np.float32),
    )


def into_blocks(traces: Sequence[Trace], bytes_per_token: float, block_bytes: int) -> list[list[Trace]]:
    """Traces cut into runs of about a block each, in their order."""
    runs: list[list[Trace]] = []
    size = float("inf")
    for trace in traces:
        trace_bytes = 64 + bytes_per_token * trace.completion_token_ids.size + 2 * trace.prompt_token_ids.size
        if size + trace_bytes > block_bytes:
            runs.append([])
            size = 0.0
        runs[-1].append(trace)
        size += trace_bytes
    return runs
