"""Draws from a teacher's whole distribution, in place of its likeliest entries.

A top k is a biased view: what lies outside it is never taught. Draws with their counts are an unbiased
one, and few suffice: the cross-entropy against count / draws has the full distribution's gradient in
expectation (Anshumann et al. 2025, "Sparse Logit Sampling", ACL).

They are drawn where the logits are (`draw_from_logits`), or else from what vLLM returns of the whole
vocabulary (`draw_rows`), which it sorts for every token.

Beside a top k, a few draws from the tail alone stand for its mass (`draw_in_blocks`, `keep_and_draw`).

Shape legend: N = T = rows, V = vocabulary, D = draws, C = blocks of the vocabulary, B = entries of a block.
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

_BLOCK = 1024
"""Entries of a row among whose sums a draw is sought first."""


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


def draw_in_blocks(mass_NV: Tensor, chances_ND: Tensor) -> Tensor:
    """Draws from rows of masses, each at its place in the cumulated mass: first the block, then the entry.

    Cumulated over a few sums of blocks, and over one block, in float64, where a cumulated sum of the whole
    vocabulary would have to be written. Nothing waits for the device.

    Args:
        mass_NV: Float32, at least 0; rows need not sum to 1.
        chances_ND: Float64, in [0, 1).

    Returns:
        Int32, shape [N, D]; -1 in rows without mass, or with NaN. What has no mass is never drawn.
    """
    import torch

    rows, vocab_size = mass_NV.shape
    whole = vocab_size // _BLOCK * _BLOCK
    sums_NC = mass_NV[:, :whole].view(rows, -1, _BLOCK).sum(-1) if whole else mass_NV[:, :0]
    if whole < vocab_size:
        sums_NC = torch.cat((sums_NC, mass_NV[:, whole:].sum(-1, keepdim=True)), dim=1)
    cumulated_NC = sums_NC.double().cumsum(1)
    total_N1 = cumulated_NC[:, -1:]
    wanted_ND = chances_ND * total_N1
    blocks_ND = _first_above(cumulated_NC, wanted_ND)
    before_ND = cumulated_NC.gather(1, blocks_ND) - sums_NC.gather(1, blocks_ND)
    starts_ND1 = (blocks_ND * _BLOCK).unsqueeze(-1)
    places_NDB = starts_ND1 + torch.arange(_BLOCK, device=mass_NV.device)
    is_inside_NDB = places_NDB < vocab_size
    found_NDB = mass_NV.gather(1, places_NDB.clamp_(max=vocab_size - 1).flatten(1)).view(places_NDB.shape)
    cumulated_NDB = found_NDB.mul_(is_inside_NDB).double().cumsum(-1)
    within_ND1 = _first_above(cumulated_NDB, (wanted_ND - before_ND).clamp_(min=0).unsqueeze(-1))
    drawn_ND = (starts_ND1 + within_ND1).squeeze(-1)
    return torch.where(total_N1 > 0, drawn_ND, -1).to(torch.int32)


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


def keep_and_draw(
    token_ids_TV: npt.NDArray[np.generic],
    logprobs_TV: npt.NDArray[np.generic],
    k: int,
    chances_TD: npt.NDArray[np.float64],
) -> tuple[Int32Array, Float32Array]:
    """The top k of rows of whole distributions, and draws from the rest.

    Args:
        token_ids_TV: Token ids, shape [T, V], descending by logprob.
        logprobs_TV: Their logprobs; rows sum to about 1.
        k: Entries to keep; at most V.
        chances_TD: In [0, 1), one for each draw.

    Returns:
        Token ids and logprobs, shape [T, K + D]: the entries, then the draws; id 0 at −inf where there is
        nothing to draw from.
    """
    tail_TU = np.exp(logprobs_TV[:, k:].astype(np.float64))
    cumulated_TU: npt.NDArray[np.float64] = tail_TU.cumsum(axis=1)
    token_ids = np.zeros(chances_TD.shape, np.int32)
    logprobs = np.full(chances_TD.shape, -np.inf, np.float32)
    for t in range(chances_TD.shape[0] if cumulated_TU.shape[1] else 0):
        total = float(cumulated_TU[t, -1])
        if total > 0:
            # A chance that rounds up to all of it is the last token's that has any mass.
            last = cumulated_TU[t].searchsorted(total)
            places = k + np.minimum(cumulated_TU[t].searchsorted(chances_TD[t] * total, side="right"), last)
            token_ids[t], logprobs[t] = token_ids_TV[t, places], logprobs_TV[t, places]
    return (
        np.concatenate((token_ids_TV[:, :k].astype(np.int32), token_ids), axis=1),
        np.concatenate((logprobs_TV[:, :k].astype(np.float32), logprobs), axis=1),
    )


def _first_above(cumulated: Tensor, wanted: Tensor) -> Tensor:
    """Where the last dimension's cumulated mass first exceeds what is wanted; the last mass, if none does."""
    import torch

    last = torch.searchsorted(cumulated, cumulated[..., -1:].contiguous())
    found = torch.minimum(torch.searchsorted(cumulated, wanted, right=True), last)
    return found.clamp_(max=cumulated.shape[-1] - 1)  # NaN is beyond everything


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
