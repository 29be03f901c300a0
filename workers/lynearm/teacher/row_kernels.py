"""Rows of what is recorded from rows of logits, on a CPU core: compiled, one row after the other.

Torch and numpy look at all rows before they look at one for a second time, in which it is not in the core's
cache any more; take three passes and an inexact sum for a normaliser; and cannot leave a search where all is
found.

Shape legend: N = rows, V = vocabulary, K = kept entries, D = draws of the tail.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lynearm.wire.jit import Scalar, intrinsic, ir, types, vectorised

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

_BLOCK = 64
"""Entries of a row that are first looked at as one."""

_BISECTIONS = 14
"""After which a threshold is near enough to the best one."""

_SUMMED = 1024
"""Exponentials that are added up in float32; their sums are added up in float64. A draw of the tail is sought
among these sums first."""

_LOG2_E = np.float32(1 / math.log(2))
_LN_2 = np.float32(math.log(2))
_LOWEST = np.float32(-88)
"""There and below, e^x is 0 here: so much less than the largest entry is nothing, and is never drawn."""
_HALF = np.float32(0.5)
_LEAST_INT = np.int32(-(2**31))
_GREATEST_INT = np.int32(2**31 - 1)
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(term)) for term in range(7))


def _reinterpret(source: Scalar, target: Scalar, target_ir: Scalar) -> Scalar:
    @intrinsic  # type: ignore[untyped-decorator]
    def reinterpret(_context: Scalar, _value: Scalar) -> Scalar:  # pyright: ignore  # numba calls it untyped
        def generate(context: Scalar, builder: Scalar, signature: Scalar, arguments: Scalar) -> Scalar:
            del context, signature
            return builder.bitcast(arguments[0], target_ir)

        return target(source), generate

    return reinterpret


_bits_of_float = _reinterpret(types.float32, types.int32, ir.IntType(32))
_float_of_bits = _reinterpret(types.int32, types.float32, ir.FloatType())


@vectorised
def take_rows(
    logits_NV: Float32Array,
    k: int,
    copy_NV: Float32Array | None,
    chances_ND: Float64Array,
) -> tuple[Float32Array, Int32Array, Float32Array, Int32Array]:
    """What is recorded of each row, and draws from the rest of it.

    A row that holds NaN gets NaN, and no draws.

    Args:
        logits_NV: Contiguous; with draws they are written to, and are as before afterwards.
        k: Up to a few hundred: each is put in its place among those found before.
        copy_NV: Gets a copy of the logits, while they are in the core's cache; None: nothing does.
        chances_ND: One for each draw, in [0, 1); D may be 0.

    Returns:
        Logprobs of the k largest of each row and their places, descending, shape [N, K]; normalisers, shape
        [N], good to about 1e-7 of the sum of exponentials; and the draws' places, shape [N, D], -1 where
        there is nothing to draw from.
    """
    rows, vocab_size = logits_NV.shape
    logprobs_NK = np.empty((rows, k), np.float32)
    places_NK = np.zeros((rows, k), np.int32)
    normalisers_N = np.empty(rows, np.float32)
    drawn_ND = np.empty(chances_ND.shape, np.int32)
    maxima = np.empty((vocab_size + _BLOCK - 1) // _BLOCK, np.float32)
    sums = np.empty((vocab_size + _SUMMED - 1) // _SUMMED, np.float64)
    for n in range(rows):
        row = logits_NV[n]
        if copy_NV is not None:
            copy_NV[n] = row
        _find_maxima(row, maxima)
        if k:
            _find_largest(row, maxima, _threshold(maxima, k), places_NK[n])
        if chances_ND.shape[1]:
            normalisers_N[n] = _draw_from_tail(
                row, places_NK[n], maxima.max(), sums, chances_ND[n], drawn_ND[n]
            )
        else:
            normalisers_N[n] = _log_sum(row, maxima.max(), sums, 0.0)
        for i in range(k):
            logprobs_NK[n, i] = row[places_NK[n, i]] - normalisers_N[n]
    return logprobs_NK, places_NK, normalisers_N, drawn_ND


@vectorised
def _find_maxima(row: Float32Array, maxima: Float32Array) -> None:
    """The largest of each block of a row; the last block may be a short one."""
    for block in range(maxima.size):
        largest: Scalar = _LEAST_INT
        part = row[block * _BLOCK : (block + 1) * _BLOCK]
        for i in range(part.size):
            largest = max(largest, _in_order(_bits_of_float(part[i])))
        maxima[block] = _float_of_bits(_in_order(largest))


@vectorised
def _in_order(bits: Scalar) -> Scalar:
    """The bits of a float as an integer of the same order, and back: vectors take a maximum of integers."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & _GREATEST_INT))


@vectorised
def _threshold(maxima: Float32Array, k: int) -> Scalar:
    """A logit that at least k of a row reach, and few more: k of its blocks do, where it has so many."""
    low, high = np.float32(-np.inf), maxima.max()
    if maxima.size >= k:
        low = maxima.min()
        for _ in range(_BISECTIONS):
            middle, reached = _HALF * (low + high), np.int32(0)
            for block in range(maxima.size):
                reached += np.int32(1) if maxima[block] >= middle else np.int32(0)
            if reached >= k:
                low = middle
            else:
                high = middle
    return low


@vectorised
def _find_largest(row: Float32Array, maxima: Float32Array, threshold: Scalar, places: Int32Array) -> None:
    """Where the largest entries of a row are, descending, if as many as are sought reach the threshold."""
    count = 0
    for block in range(maxima.size):
        if maxima[block] < threshold:
            continue
        for place in range(block * _BLOCK, min((block + 1) * _BLOCK, row.size)):
            logit = row[place]
            if logit < threshold or (count == places.size and logit <= row[places[-1]]):
                continue
            count = min(count + 1, places.size)
            at = count - 1
            while at > 0 and row[places[at - 1]] < logit:
                places[at] = places[at - 1]
                at -= 1
            places[at] = place


@vectorised
def _log_sum(row: Float32Array, largest: Scalar, sums: Float64Array, more: float) -> float:
    """Log of the sum of a row's exponentials and of `more`; leaves the sums of the row's parts in `sums`."""
    total = more
    for part in range(sums.size):
        exponents = row[part * _SUMMED : (part + 1) * _SUMMED]
        added = np.float32(0)
        for i in range(exponents.size):
            added += _exponential(exponents[i] - largest)
        sums[part] = float(added)
        total += float(added)
    return float(largest + math.log(total))


@vectorised
def _exponential(x: Scalar) -> Scalar:
    """e^x for x of at most 0, float32."""
    x = _LOWEST if x < _LOWEST else x  # NaN stays
    # e^x = 2^power e^rest, the rest at most ln(2) / 2 from 0: its series is good to 1.2e-7.
    power = np.int32(x * _LOG2_E - _HALF)
    r = x - np.float32(power) * _LN_2
    series = ((((((_C6 * r) + _C5) * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
    return series * _float_of_bits(np.int32((power + np.int32(127)) << np.int32(23)))


@vectorised
def _draw_from_tail(
    row: Float32Array,
    places: Int32Array,
    largest: Scalar,
    sums: Float64Array,
    chances: Float64Array,
    drawn: Int32Array,
) -> float:
    """Draws from a row without its kept entries, and the normaliser of the whole row."""
    # Out of the row in the meantime, not subtracted from sums that they are in: of a small tail, that would
    # leave rounding errors.
    held, of_held = np.empty(places.size, np.float32), 0.0
    for i in range(places.size):
        held[i] = row[places[i]]
        row[places[i]] = -np.inf
        of_held += float(_exponential(held[i] - largest))
    normaliser = _log_sum(row, largest, sums, of_held)
    tail, weights = sums.sum(), np.empty(_SUMMED, np.float32)
    for d in range(drawn.size):
        drawn[d] = _find_draw(row, largest, sums, chances[d] * tail, weights) if tail > 0 else -1
    # Backwards, so that the row is whole again even if a search among NaN named a place twice.
    for i in range(places.size - 1, -1, -1):
        row[places[i]] = held[i]
    return normaliser


@vectorised
def _find_draw(
    row: Float32Array, largest: Scalar, sums: Float64Array, mass: float, weights: Float32Array
) -> int:
    """The place at which a row's cumulated exponentials exceed a mass; the last that has any, if none does.

    Args:
        row: One that has a place with mass.
        largest: What the exponentials are relative to.
        sums: Of its parts.
        mass: At least 0.
        weights: Scratch of `_SUMMED` entries.
    """
    part, rest = 0, mass
    for i in range(sums.size):
        if sums[i] > 0:
            part, rest = i, mass
            if mass < sums[i]:
                break
            mass -= sums[i]
    exponents = row[part * _SUMMED : (part + 1) * _SUMMED]
    for i in range(exponents.size):
        weights[i] = _exponential(exponents[i] - largest)
    place = 0
    for i in range(exponents.size):
        if weights[i] > 0:
            place = i
            if rest < weights[i]:
                break
            rest -= weights[i]
    return part * _SUMMED + place
