"""Compiled loops over the values of rows: levels to logprobs, and what rows foretell of their tails.

Shape legend: N = positions of a block, K = entries of the widest row.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lynearm.wire.jit import Scalar, compiled, inlined

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Uint8Array = npt.NDArray[np.uint8]
Uint32Array = npt.NDArray[np.uint32]

U64 = np.uint64

TAIL_STEPS = 8
REST_OCTAVES = 8
"""How many last levels, and how many sizes of a rest, the tables of tails tell apart."""

_RECIPROCAL_FACTORIALS = 1.0 / np.array([math.factorial(term) for term in range(14)], np.float64)

_LOWEST_POWER = 1010
_POWERS_OF_TWO = 2.0 ** np.arange(-_LOWEST_POWER, 3)
"""e^−700 is about 2^−1010."""


@compiled
def look_up(levels_NK: Uint32Array, kept_N: Uint32Array, table: Float32Array, out_NK: Float32Array) -> None:
    """Value of every level, each below the table's size; −inf where a row keeps less than K entries.

    Args:
        levels_NK: Levels.
        kept_N: Entries of each row.
        table: Value of each level.
        out_NK: Filled; may be the memory of `levels_NK`.
    """
    width = U64(levels_NK.shape[1])
    for t in range(U64(0), U64(kept_N.size)):
        kept = U64(kept_N[t])
        for i in range(U64(0), kept):
            out_NK[t, i] = table[levels_NK[t, i]]
        for i in range(kept, width):
            out_NK[t, i] = -np.inf


@compiled
def foresee_tails(
    levels_NK: Uint32Array,
    kept_N: Uint32Array,
    last_levels_N: Uint32Array,
    rule: tuple[int, int, int, int],
    masses: Int64Array,
    scale: float,
    contexts_N: Uint8Array,
    expected_N: Int64Array,
) -> None:
    """What a row's entries foretell of its tail: the context of its number, and its level.

    Args:
        levels_NK: Levels; below the size of `masses`, if that has any.
        kept_N: Entries of each row.
        last_levels_N: Level of each row's last entry; 0 for a row without entries.
        rule: Origin, shift, base and slope of a `LevelRule`.
        masses: Of a grid: probability of each level, in units of 2^−40, since sums of integers are the same
            on every machine. Of other scales: none.
        scale: The grid's.
        contexts_N: Filled: `TAIL_STEPS` contexts by the last level, then those by what the masses leave of 1.
        expected_N: Filled.
    """
    origin, shift, base, slope = rule
    for t in range(kept_N.size):
        away: Scalar = max(np.int64(last_levels_N[t]) - origin, 0)
        step = min(away >> shift, TAIL_STEPS - 1)
        context = step
        expected: Scalar = base + slope * step
        if masses.size:
            rest = np.int64(1 << 40)
            for i in range(np.int64(kept_N[t])):
                rest -= masses[levels_NK[t, i]]
            if rest > 0:
                mass = np.float64(rest) * 2.0**-40
                # The rest is known about as well as an entry of mass scale² / 12.
                octave = min(_exponent(mass / scale) + 3, REST_OCTAVES)
                if octave > 0:
                    context = TAIL_STEPS - 1 + octave
                    expected = np.int64(np.rint((1.0 - np.sqrt(mass)) * (2.0 / scale)))
        contexts_N[t] = context
        expected_N[t] = expected


@inlined
def _exponent(value: Scalar) -> Scalar:
    """⌊log2⌋ of a float64 above 2^−1022."""
    return (np.float64(value).view(np.int64) >> 52) - 1023


@compiled
def read_tails(numbers_N: Uint32Array, expected_N: Int64Array, max_level: int, levels_N: Int64Array) -> int:
    """Level of each row's tail mass, −1 where there is none.

    Args:
        numbers_N: The tails' numbers.
        expected_N: Level that each is expected at.
        max_level: Largest level allowed.
        levels_N: Filled.

    Returns:
        The highest one; −2 when one is out of range.
    """
    highest: Scalar = np.int64(-1)
    lowest: Scalar = np.int64(0)
    for t in range(numbers_N.size):
        number = np.int64(numbers_N[t])
        zigzag = number - 1
        level = expected_N[t] + ((zigzag >> 1) ^ -(zigzag & 1))
        level = level if number > 0 else np.int64(-1)
        lowest = min(lowest, level if number > 0 else np.int64(0))
        highest = max(highest, level)
        levels_N[t] = level
    return highest if lowest >= 0 and highest <= max_level else -2


@compiled
def pick_sampled(
    sampled_index_N: Uint32Array, loose: Float32Array, logprobs_NK: Float32Array, out_N: Float32Array
) -> None:
    """Logprob of each sampled token: its entry's, or the next loose one where it has none (index 0)."""
    next_loose = 0
    for t in range(sampled_index_N.size):
        index = np.int64(sampled_index_N[t])
        if index > 0:
            out_N[t] = logprobs_NK[t, index - 1]
        else:
            out_N[t] = loose[next_loose]
            next_loose += 1


@compiled
def exponentials(values: Float64Array) -> Float64Array:
    """e^x of values up to 1, the same to the bit on every machine."""
    results = np.empty_like(values)
    for index in range(values.size):
        results[index] = _exponential(values[index])
    return results


@compiled
def predict_tails(logprobs_NK: Float32Array, kept_N: Uint32Array, tails_N: Float32Array) -> None:
    """Fill in 1 − Σ p of each row, at least 0, the same to the bit on every machine.

    Sums and products of float64, in this order and never fused: library exponentials differ between
    machines.
    """
    for t in range(kept_N.size):
        rest = 1.0
        for i in range(np.int64(kept_N[t])):
            rest -= _exponential(np.float64(logprobs_NK[t, i]))
        tails_N[t] = max(rest, 0.0)


@inlined
def _exponential(x: Scalar) -> Scalar:
    """e^x to about 1e-15, 0 below −700: e^x = 2^n · e^r, |r| ≤ ln 2 / 2, and Taylor's polynomial for e^r.

    A logprob above 1, or NaN, has some value here: blocks with such are refused by others.
    """
    bounded = min(x, 1.0) if x >= -700.0 else 0.0
    n = np.rint(bounded * 1.4426950408889634)
    r = (bounded - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    result = 0.0
    for term in range(13, -1, -1):
        result = result * r + _RECIPROCAL_FACTORIALS[term]
    result *= _POWERS_OF_TWO[np.int64(n) + _LOWEST_POWER]
    return result if x >= -700.0 else 0.0
