"""Compiled loops over the values of rows: levels to logprobs, and what rows foretell of their tails.

Shape legend: N = positions of a block, K = entries of the widest row.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lynearm.wire.jit import Scalar, address_of, compiled, inlined
from lynearm.wire.number_kernels import read_number

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Uint8Array = npt.NDArray[np.uint8]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]

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
    for t in range(kept_N.size):
        rest = np.int64(0)
        if masses.size:
            rest = np.int64(1 << 40)
            for i in range(np.int64(kept_N[t])):
                rest -= masses[levels_NK[t, i]]
        contexts_N[t], expected_N[t] = _foresee_tail(np.int64(last_levels_N[t]), rule, rest, scale)


@inlined
def _foresee_tail(last_level: Scalar, rule: Scalar, rest: Scalar, scale: Scalar) -> tuple[Scalar, Scalar]:
    """Context and expected level of one row's tail; `rest`, in units of 2^−40, is left over if above 0."""
    origin, shift, base, slope = rule
    step = min(max(last_level - origin, 0) >> shift, TAIL_STEPS - 1)
    context = step
    expected = base + slope * step
    if rest > 0:
        mass = np.float64(rest) * 2.0**-40
        # The rest is known about as well as an entry of mass scale² / 12.
        octave = min(_exponent(mass / scale) + 3, REST_OCTAVES)
        if octave > 0:
            context = TAIL_STEPS - 1 + octave
            expected = np.int64(np.rint((1.0 - np.sqrt(mass)) * (2.0 / scale)))
    return context, expected


@compiled
def read_grid_values(
    stream: Uint8Array,
    bit: int,
    end_bit: int,
    tables: Uint64Array,
    first_context: int,
    levels_NK: Uint32Array,
    kept_N: Uint32Array,
    last_levels_N: Uint32Array,
    rule: tuple[int, int, int, int],
    masses: Int64Array,
    values: Float32Array,
    scale: float,
    logprobs_NK: Float32Array,
    tail_levels_N: Int64Array,
) -> tuple[int, int, int]:
    """Logprobs of a grid's levels, and the levels of the tail masses, whose numbers are read.

    What `look_up`, `foresee_tails` and `kernels.read_numbers` do one after the other, in one pass: while one
    row's number waits for the end of the one before, the next row's masses are summed.

    Args:
        stream: As for `kernels.read_numbers`, like the next three.
        bit: Where the first number begins.
        end_bit: Where the stream ends.
        tables: Of all contexts.
        first_context: Context of tails to which that of a row is added.
        levels_NK: Levels, each below the size of `masses` and of `values`.
        kept_N: Entries of each row.
        last_levels_N: Level of each row's last entry; 0 for a row without entries.
        rule: As for `foresee_tails`.
        masses: Of each level, as for `foresee_tails`.
        values: Logprob of each level.
        scale: The grid's.
        logprobs_NK: Filled, with −inf behind a row's entries; may be the memory of `levels_NK`.
        tail_levels_N: Filled; −1 where there is no tail.

    Returns:
        The bit behind the last number, −1 when one does not decode; the lowest level of a tail, or 0; the
        highest one, or −1.
    """
    stream_at, tables_at = address_of(stream), address_of(tables)
    position, end = U64(bit), U64(end_bit)
    width = U64(levels_NK.shape[1])
    lowest, highest = np.int64(0), np.int64(-1)
    for t in range(U64(0), U64(kept_N.size)):
        kept = U64(kept_N[t])
        rest = np.int64(1 << 40)
        for i in range(U64(0), kept):
            level = levels_NK[t, i]
            rest -= masses[level]
            logprobs_NK[t, i] = values[level]
        for i in range(kept, width):
            logprobs_NK[t, i] = -np.inf
        context, expected = _foresee_tail(np.int64(last_levels_N[t]), rule, rest, scale)
        position, number, bad = read_number(stream_at, position, tables_at, U64(first_context + context))
        if (position > end) | bad:
            return -1, 0, -1
        zigzag = np.int64(number) - 1
        tail_level: Scalar = expected + ((zigzag >> 1) ^ -(zigzag & 1))
        lowest = min(lowest, tail_level if zigzag >= 0 else np.int64(0))
        tail_level = tail_level if zigzag >= 0 else np.int64(-1)
        highest = max(highest, tail_level)
        tail_levels_N[t] = tail_level
    return int(np.int64(position)), int(lowest), int(highest)


@inlined
def _exponent(value: Scalar) -> Scalar:
    """⌊log2⌋ of a float64 above 2^−1022."""
    return (np.float64(value).view(np.int64) >> 52) - 1023


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
