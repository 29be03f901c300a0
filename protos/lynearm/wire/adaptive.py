"""Adaptive k: rows that keep the entries above a probability, and put the rest into the tail.

A probability threshold spends entries where a distribution is wide and saves them where it is narrow; at
equal bits it loses less than keeping a fixed number, or a fixed mass, of entries.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from lynearm.wire.traces import TopK, Trace


def keep_likely(trace: Trace, min_probability: float) -> Trace:
    """The trace with rows that keep what has at least a probability, and at least one entry.

    Args:
        trace: Rows sorted descending.
        min_probability: 0 returns the trace itself.
    """
    if min_probability <= 0:
        return trace
    prompt = trace.prompt_top_k
    return dataclasses.replace(
        trace,
        top_k=_keep(trace.top_k, min_probability),
        prompt_top_k=None if prompt is None else _keep(prompt, min_probability),
    )


def _keep(top_k: TopK, min_probability: float) -> TopK:
    drop_TK = top_k.logprobs < np.float32(math.log(min_probability))
    drop_TK[:, :1] = False
    dropped_TK = np.where(drop_TK, top_k.logprobs, np.float32(-np.inf)).astype(np.float64)
    tail_T = top_k.tail_mass + np.exp(dropped_TK).sum(axis=1)
    return TopK(
        token_ids=np.where(drop_TK, 0, top_k.token_ids).astype(np.int32),
        logprobs=np.where(drop_TK, np.float32(-np.inf), top_k.logprobs),
        tail_mass=tail_T.astype(np.float32),
    )
