"""Adaptive k: rows that keep the entries above a probability, and put the rest into the tail.

A probability threshold spends entries where a distribution is wide and saves them where it is narrow; at
equal bits it loses less than keeping a fixed number, or a fixed mass, of entries.

What was drawn from a tail stays a draw when the tail grows: each draw gives way to one of the dropped entries
as often as the larger tail would give one. That takes chance, which is a function of the trace, so that a
trace always becomes the same bytes.

Shape legend: T = positions, K = entries kept before, D = draws from each tail.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import xxhash

from lynearm.wire.traces import Int32Array, TopK, Trace

Float64Array = npt.NDArray[np.float64]


def keep_likely(trace: Trace, min_probability: float) -> Trace:
    """The trace with rows that keep what has at least a probability, and at least one entry.

    Args:
        trace: Rows sorted descending.
        min_probability: 0 returns the trace itself.
    """
    if min_probability <= 0:
        return trace
    prompt = trace.prompt_top_k
    chance = None if trace.top_k.tail_draws is None else _chance_of(trace)
    return dataclasses.replace(
        trace,
        top_k=_keep(trace.top_k, min_probability, chance),
        prompt_top_k=None if prompt is None else _keep(prompt, min_probability, chance),
    )


def _keep(top_k: TopK, min_probability: float, chance: np.random.Generator | None) -> TopK:
    drop_TK = top_k.logprobs < np.float32(math.log(min_probability))
    drop_TK[:, :1] = False
    dropped_TK = np.exp(np.where(drop_TK, top_k.logprobs, np.float32(-np.inf)).astype(np.float64))
    tail_T = top_k.tail_mass + dropped_TK.sum(axis=1)
    draws_TD = top_k.tail_draws
    if draws_TD is not None and chance is not None:
        draws_TD = _redraw(top_k, draws_TD, dropped_TK, chance)
    return TopK(
        token_ids=np.where(drop_TK, 0, top_k.token_ids).astype(np.int32),
        logprobs=np.where(drop_TK, np.float32(-np.inf), top_k.logprobs),
        tail_mass=tail_T.astype(np.float32),
        tail_draws=draws_TD,
    )


def _redraw(
    top_k: TopK, draws_TD: Int32Array, dropped_TK: Float64Array, chance: np.random.Generator
) -> Int32Array:
    """Draws from the tails with what was dropped into them.

    Args:
        top_k: Before.
        draws_TD: Its draws.
        dropped_TK: Probabilities of the dropped entries, 0 of the others.
        chance: Of the trace.
    """
    if top_k.k == 0:
        return draws_TD
    tail_T1 = np.maximum(top_k.tail_mass.astype(np.float64), 0)[:, None]
    cumulated_TK = dropped_TK.cumsum(axis=1)
    points_DT1 = chance.random((draws_TD.shape[1], len(draws_TD), 1)) * (cumulated_TK[:, -1:] + tail_T1)
    # How many sums are not above a point is the entry in which it lies, never one of probability 0.
    entry_TD = np.stack([(cumulated_TK <= point_T1).sum(axis=1) for point_T1 in points_DT1], axis=1)
    # Where nothing was drawn from a tail, nothing is drawn from the larger one.
    gives_way_TD = (entry_TD < top_k.k) & ((draws_TD >= 0) | (tail_T1 == 0))
    ids_TD = np.take_along_axis(top_k.token_ids, np.minimum(entry_TD, top_k.k - 1), axis=1)
    return np.where(gives_way_TD, ids_TD, draws_TD).astype(np.int32)


def _chance_of(trace: Trace) -> np.random.Generator:
    """A stream of chance that belongs to a trace."""
    digest = xxhash.xxh3_64(f"{trace.sample_index}\0{trace.prompt_id}".encode("utf-8", "surrogatepass"))
    digest.update(trace.completion_token_ids.tobytes())
    return np.random.Generator(np.random.Philox(key=digest.intdigest()))
