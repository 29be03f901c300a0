"""The distributions of a block: one row for each position.

A row is the kept entries, the mass outside them, and the token that was sampled. Rows go through three steps:
logprobs become levels (`lynearm.wire.grids`), tokens become token codes and entries symbols
(`lynearm.wire.row_naming`), symbols become bits (`lynearm.wire.row_writing`; `row_reading` goes back).
docs/format.md specifies what comes out.

Shape legend: N = positions of a block, K = entries of the widest row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lynearm.wire.token_kernels import AS_SAMPLED
from lynearm.wire.traces import Float32Array, Int32Array

Uint32Array = npt.NDArray[np.uint32]

ROUNDING = 1e-2
"""How far a float32 log-softmax may put a logprob above 0, or a mass outside [0, 1]; measured: 2e-4."""


@dataclass(frozen=True, slots=True)
class Positions:
    """The rows of a block, one after the other."""

    kept: Uint32Array
    """How many entries of each row are entries and not padding, shape [N]."""
    token_ids: Int32Array
    """Shape [N, K]; 0 where padded."""
    logprobs: Float32Array
    """Shape [N, K]; −inf where padded."""
    tail_mass: Float32Array
    """Shape [N]."""
    sampled_ids: Int32Array
    """Shape [N]."""
    sampled_logprobs: Float32Array
    """Shape [N]."""
    tail_draws: Int32Array | None = None
    """Shape [N, D], as `TopK` has them; None: nothing was drawn from the tails."""

    def select(self, rows: slice) -> Positions:
        """Some of the rows, in the memory of these."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Positions(**{name: array[rows] for name, array in arrays.items() if array is not None})


def first_previous_tokens(lengths: Sequence[int], before: Sequence[int]) -> Int32Array:
    """What stands before each row: a token for the first of a trace, and the sampled one before otherwise.

    Args:
        lengths: Rows of each trace.
        before: Last token before the rows of each trace; −1 for none.

    Returns:
        Shape [N]: a token, −1, or `AS_SAMPLED`.
    """
    previous_N = np.full(sum(lengths), AS_SAMPLED, np.int32)
    start = 0
    for length, token in zip(lengths, before, strict=True):
        if length:
            previous_N[start] = token
        start += length
    return previous_N
