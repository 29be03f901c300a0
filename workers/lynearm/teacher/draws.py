"""Draws from a teacher's whole distribution, in place of its likeliest entries.

A top k is a biased view: what lies outside it is never taught. Draws with their counts are an unbiased
one, and few suffice: the cross-entropy against count / draws has the full distribution's gradient in
expectation (Anshumann et al. 2025, "Sparse Logit Sampling", ACL).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


def draw_rows(
    token_ids_TV: npt.NDArray[np.generic],
    logprobs_TV: npt.NDArray[np.generic],
    draws: int,
    generator: np.random.Generator,
) -> tuple[Int32Array, Float32Array]:
    """Rows of draws from rows of whole distributions.

    Args:
        token_ids_TV: Token ids, shape [T, V]; any order.
        logprobs_TV: Their logprobs; rows sum to about 1.
        draws: How many for each row, independent of each other.
        generator: Source of chance.

    Returns:
        Token ids and log(count / draws), shape [T, draws]: distinct tokens, the most drawn first, padded
        with id 0 at −inf.
    """
    positions = token_ids_TV.shape[0]
    token_ids = np.zeros((positions, draws), np.int32)
    logprobs = np.full((positions, draws), -np.inf, np.float32)
    for t in range(positions):
        mass_V = np.exp(logprobs_TV[t].astype(np.float64))
        counts_V = generator.multinomial(draws, mass_V / mass_V.sum())
        distinct = np.flatnonzero(counts_V)
        distinct = distinct[np.argsort(-counts_V[distinct], kind="stable")]
        token_ids[t, : distinct.size] = token_ids_TV[t, distinct]
        logprobs[t, : distinct.size] = np.log(counts_V[distinct] / draws)
    return token_ids, logprobs
