"""Tokens drawn from the tails of rows, as the numbers of a block.

Draws are independent, so that their order says nothing: a row's are written as ranks in the vocabulary's
order, ascending, the first one plain and the others by their distance from the one before. Of the log2(D!)
bits of a row's order that saves most: measured were 1.0 bits a draw at D = 4, and 2.4 at D = 16.

A rank takes 14.2 bits, measured on SmolLM2 with 64 kept entries, where the best code of tokens that does not
look at the row would take 14.3. Token codes, which look into the lists of followers, companions and recent
tokens, would save 0.2 of them: a list holds what rows keep, which is just what a draw is not.

Shape legend: N = positions of a block, D = draws of each, K = entries of the widest row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lynearm.wire.code_tables import DrawContext
from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.jit import compiled
from lynearm.wire.number_stream import NumberStream
from lynearm.wire.traces import Int32Array

Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]
Uint32Array = npt.NDArray[np.uint32]


def number_draws(draws_ND: Int32Array, rank_of_token: Int32Array) -> tuple[Uint8Array, Uint32Array]:
    """Context and number of every draw, in the order of the stream.

    Args:
        draws_ND: Token ids; all of a row are −1 where it has none.
        rank_of_token: The vocabulary's order.
    """
    some_N = draws_ND[:, 0] >= 0
    ranks: Int64Array = np.sort(rank_of_token[draws_ND[some_N]].astype(np.int64), axis=1)
    first_N = np.zeros(some_N.size, np.uint32)
    first_N[some_N] = ranks[:, 0] + 1
    gaps = np.diff(ranks, axis=1).astype(np.uint32).ravel()
    contexts = np.repeat(np.array([DrawContext.FIRST, DrawContext.GAP], np.uint8), (some_N.size, gaps.size))
    return contexts, np.concatenate([first_N, gaps])


def read_draws(numbers: NumberStream, count: int, draws: int, token_of_rank: Int32Array) -> Int32Array:
    """The draws of some rows, ascending by rank; −1 in rows that have none.

    Args:
        numbers: A block's, up to the tail masses.
        count: N.
        draws: D.
        token_of_rank: The vocabulary's order.

    Raises:
        CorruptBlockError: if the numbers do not decode, or name a token that is not there.
    """
    vocab_size = token_of_rank.size
    first_N = numbers.read_draws(DrawContext.FIRST, count, vocab_size)
    some_N = first_N > 0
    drawn = int(some_N.sum())
    gaps = numbers.read_draws(DrawContext.GAP, drawn * (draws - 1), vocab_size)
    steps: Int64Array = np.empty((drawn, draws), np.int64)
    steps[:, 0] = first_N[some_N].astype(np.int64) - 1
    steps[:, 1:] = gaps.reshape(drawn, draws - 1)
    ranks = steps.cumsum(axis=1)
    if drawn and int(ranks[:, -1].max()) >= vocab_size:
        raise CorruptBlockError(f"a draw of token rank {ranks[:, -1].max()} in a vocabulary of {vocab_size}")
    draws_ND = np.full((count, draws), -1, np.int32)
    draws_ND[some_N] = token_of_rank[ranks]
    return draws_ND


@compiled
def find_kept_draw(draws_ND: Int32Array, token_ids_NK: Int32Array, kept_N: Uint32Array) -> int:
    """The first row with a draw that is one of its kept entries; −1 where there is none."""
    for t in range(kept_N.size):
        for d in range(draws_ND.shape[1]):
            for i in range(np.int64(kept_N[t])):
                if token_ids_NK[t, i] == draws_ND[t, d]:
                    return t
    return -1
