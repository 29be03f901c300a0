"""What the writer and the reader of a block's rows agree on.

Shape legend: N = positions of a block, K = entries of the widest row.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import GROWN_PLACES
from lynearm.wire.code_tables import LevelRule, NumberContext
from lynearm.wire.grids import Counts, Grid, Scale
from lynearm.wire.list_kernels import MAX_GROWN_LISTS
from lynearm.wire.traces import Float32Array, Int32Array
from lynearm.wire.value_kernels import foresee_tails, predict_tails

Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]
Uint32Array = npt.NDArray[np.uint32]

OWN_TABLES = 1
KEPT_VARIES = 2
SAMPLED_APART = 4
FOUR_LANES = 8
ORDER_OF_DICTIONARY = 16
SCALE_OF_DICTIONARY = 32
SHORT_TABLES = 64
TAIL_DRAWS = 128
"""Flags of the rows' part."""

LANES: Final = 4

FIRST_SHIFT = 23
"""Logprobs of first entries: sign and exponent as a number, the mantissa as it is."""

USUAL_FIRST = 383
"""Sign and exponent of −1 to −2, from which the number counts."""

TOP_OFFSET = 1 << 20
"""Makes the places of top logits positive."""

_NO_MASSES: Int64Array = np.empty(0, np.int64)
_NO_MASSES.setflags(write=False)


def room_for_lists(rows: int) -> tuple[Int32Array, Int32Array]:
    """Room for the lists that some rows grow, as `assign_token_codes` wants it."""
    count = min(2 * rows, MAX_GROWN_LISTS)
    return np.empty((count + 1, GROWN_PLACES), np.int32), np.empty(count, np.int32)


def expect_tails(
    rule: LevelRule, scale: Scale, levels: Uint32Array, kept: Uint32Array, last_levels: Uint32Array
) -> tuple[Uint8Array, Int64Array]:
    """Number context of each row's tail mass, and the level that it is expected at."""
    contexts, expected = np.empty(kept.size, np.uint8), np.empty(kept.size, np.int64)
    masses, unit = _NO_MASSES, 1.0
    if isinstance(scale, Grid):
        masses, unit = scale.masses(int(last_levels.max(initial=0)) + 1), scale.scale
    foresee_tails(levels, kept, last_levels, rule.numbers, masses, unit, contexts, expected)
    contexts += np.uint8(NumberContext.TAIL)
    return contexts, expected


def predicted_tails(logprobs: Float32Array, kept: Uint32Array, scale: Scale) -> Float32Array:
    """What each row's entries leave over, from which an exact tail mass counts; 0 for draws."""
    predicted = np.zeros(kept.size, np.float32)
    if not isinstance(scale, Counts):
        predict_tails(logprobs, kept, predicted)
    return predicted


def zigzag(values: Int64Array) -> Uint32Array:
    """Small numbers for integers near 0: 0, −1, 1, −2, 2 become 0, 1, 2, 3, 4."""
    return np.where(values < 0, -2 * values - 1, 2 * values).astype(np.uint32)


def unzigzag(numbers: npt.NDArray[np.integer]) -> Int64Array:
    """The integers that `zigzag` made numbers of."""
    values = numbers.astype(np.int64)
    return np.where(values & 1, -(values >> 1) - 1, values >> 1)
