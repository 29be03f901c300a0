"""Rows of what is recorded from rows of logits, on a CPU core: compiled, one row after the other.

Torch and numpy look at all rows before they look at one for a second time, in which it is not in the core's
cache any more; take three passes and an inexact sum for a normaliser; and cannot leave a search where all is
found.

Shape legend: N = rows, V = vocabulary, K = kept entries.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lynearm.wire.jit import Scalar, intrinsic, ir, types, vectorised

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

_BLOCK = 64
"""Entries of a row that are first looked at as one."""

_BISECTIONS = 14
"""After which a threshold is near enough to the best one."""

_SUMMED = 1024
"""Exponentials that are added up in float32; their sums are added up in float64."""

_LOG2_E = np.float32(1 / math.log(2))
_LN_2 = np.float32(math.log(2))
_LOWEST = np.float32(-87)
"""Below it e^x is no normal float32; so much less than the largest entry is nothing."""
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
    logits_NV: Float32Array, k: int, copy_NV: Float32Array | None
) -> tuple[Float32Array, Int32Array, Float32Array]:
    """Logprobs of the k largest of each row and their places, descending, shape [N, K], and normalisers [N].

    Normalisers are good to about 1e-7 of the sum of exponentials. A row that holds NaN gets NaN.

    Args:
        logits_NV: Contiguous.
        k: Up to a few hundred: each is put in its place among those found before.
        copy_NV: Gets a copy of the logits, while they are in the core's cache; None: nothing does.
    """
    rows, vocab_size = logits_NV.shape
    logprobs_NK = np.empty((rows, k), np.float32)
    places_NK = np.zeros((rows, k), np.int32)
    normalisers_N = np.empty(rows, np.float32)
    maxima = np.empty((vocab_size + _BLOCK - 1) // _BLOCK, np.float32)
    for n in range(rows):
        row = logits_NV[n]
        if copy_NV is not None:
            copy_NV[n] = row
        _find_maxima(row, maxima)
        if k:
            _find_largest(row, maxima, _threshold(maxima, k), places_NK[n])
        normalisers_N[n] = _log_sum(row, maxima.max())
        for i in range(k):
            logprobs_NK[n, i] = row[places_NK[n, i]] - normalisers_N[n]
    return logprobs_NK, places_NK, normalisers_N


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
def _log_sum(row: Float32Array, largest: Scalar) -> float:
    """Log of the sum of a row's exponentials."""
    total = 0.0
    for start in range(0, row.size, _SUMMED):
        part = row[start : start + _SUMMED]
        added = np.float32(0)
        for i in range(part.size):
            x = part[i] - largest
            x = _LOWEST if x < _LOWEST else x  # NaN stays
            # e^x = 2^power e^rest, the rest at most ln(2) / 2 from 0: its series is good to 1.2e-7.
            power = np.int32(x * _LOG2_E - _HALF)
            r = x - np.float32(power) * _LN_2
            series = ((((((_C6 * r) + _C5) * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
            added += series * _float_of_bits(np.int32((power + np.int32(127)) << np.int32(23)))
        total += float(added)
    return float(largest + math.log(total))
