"""Draws from a teacher's whole distribution, in place of its likeliest entries.

A top k is a biased view: what lies outside it is never taught. Draws with their counts are an unbiased
one, and few suffice: the cross-entropy against count / draws has the full distribution's gradient in
expectation (Anshumann et al. 2025, "Sparse Logit Sampling", ACL).

They are drawn where the logits are (`draw_from_logits`), or else from what vLLM returns of the whole
vocabulary (`draw_rows`), which it sorts for every token.

Shape legend: N = T = rows, V = vocabulary, D = draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Generator, Tensor

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

_CHUNK_ROWS = 16
"""Rows whose cumulated probabilities, in float64, exist at a time."""


def draw_from_logits(logits_NV: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows of draws from logits; what `draw_rows` returns, as tensors on the logits' device.

    Args:
        logits_NV: Float32.
        draws: How many for each row, independent of each other.
        generator: Source of chance, on the logits' device.
    """
    import torch

    drawn_ND = torch.empty((logits_NV.shape[0], draws), dtype=torch.int64, device=logits_NV.device)
    for start in range(0, logits_NV.shape[0], _CHUNK_ROWS):
        part = logits_NV[start : start + _CHUNK_ROWS]
        # In float64: cumulated in float32, no token of a probability below 1e-8 would ever be drawn.
        cumulated = torch.softmax(part, dim=-1).cumsum(-1, dtype=torch.float64)
        chances = torch.rand(
            (part.shape[0], draws), dtype=torch.float64, device=part.device, generator=generator
        )
        found = torch.searchsorted(cumulated, chances * cumulated[:, -1:], right=True)
        drawn_ND[start : start + _CHUNK_ROWS] = found.clamp_(max=part.shape[1] - 1)
    return _count(drawn_ND)


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
        Token ids and log(count / draws), shape [T, D]: distinct tokens, the most drawn first, padded
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


def _count(drawn_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct tokens of each row and log(count / draws), the most drawn first."""
    import torch

    draws = drawn_ND.shape[1]
    in_order_ND = drawn_ND.sort(dim=1).values
    begins_ND = torch.ones_like(in_order_ND)
    begins_ND[:, 1:] = in_order_ND[:, 1:] != in_order_ND[:, :-1]
    places_ND = begins_ND.cumsum(1) - 1
    counts_ND = torch.zeros_like(in_order_ND).scatter_add_(1, places_ND, torch.ones_like(in_order_ND))
    tokens_ND = torch.zeros_like(in_order_ND).scatter_(1, places_ND, in_order_ND)
    counts_ND, order_ND = counts_ND.sort(dim=1, descending=True, stable=True)
    return tokens_ND.gather(1, order_ND), (counts_ND.double() / draws).log().float()
