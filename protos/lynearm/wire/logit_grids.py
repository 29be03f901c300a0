"""Exact logprobs of teachers that compute their logits in bf16 or fp16.

Such a teacher's logprobs are float32(float32(logit − top) − log Σ), where logit and top, the row's largest
logit, are numbers of few mantissa bits. A row is then a top logit, its logprob (which is −log Σ), and the
places of the other logits on the type's grid, and float32 arithmetic returns every logprob bit for bit.

The logits themselves are not given, and need not be found: any top logit under which every logprob comes
back will do. A difference that is a multiple of 2^j and no more comes from a logit below 2^(j + m + 1),
m mantissa bits, which bounds the top; the largest one that fits has the coarsest grid, hence the smallest
numbers. A row for which none is found stays plain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lynearm.wire.grids import LogitGrid
from lynearm.wire.jit import Scalar, compiled, inlined

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Uint32Array = npt.NDArray[np.uint32]

MANTISSA_BITS = (7, 10)
"""bf16 and fp16."""

PLAIN = -(1 << 31)
"""In place of a top: the row is on no grid, and its levels are those of plain float32 numbers."""

_PLAIN_SHARE = 8
"""A grid on which more than one row in so many is plain is none."""

_ROUND_TOPS = 16
"""Multiples of a half that are tried."""

_SMALLEST_TOP = 2.0**-6

_FINEST = 14
"""Differences are told apart down to 2^−14; float32 rounds them at about 2^−21."""


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Rows on a logit grid."""

    grid: LogitGrid
    levels_NK: Uint32Array
    """Steps of the grid below the row's top."""
    first_N: Float32Array
    """Logprob of the row's first entry."""
    tops_N: Int32Array
    """Place of the row's top logit: the upper bits of its float32, sign taken as a minus. Or `PLAIN`."""


def find_logit_grid(logprobs_NK: Float32Array, kept_N: Uint32Array) -> LogitRows | None:
    """The coarsest logit grid that returns every logprob bit for bit; None if there is none.

    Args:
        logprobs_NK: Sorted, descending; what lies behind a row's kept entries is not looked at.
        kept_N: Entries of each row.
    """
    for mantissa_bits in MANTISSA_BITS:
        levels_NK = np.zeros(logprobs_NK.shape, np.uint32)
        tops_N = np.zeros(kept_N.size, np.int32)
        if _find(logprobs_NK, kept_N, mantissa_bits, levels_NK, tops_N):
            first_N = np.where(kept_N > 0, logprobs_NK[:, :1].sum(axis=1), np.float32(0)).astype(np.float32)
            return LogitRows(LogitGrid(mantissa_bits), levels_NK, first_N, tops_N)
    return None


@compiled
def logprobs_of(
    mantissa_bits: int,
    levels_NK: Uint32Array,
    first_N: Float32Array,
    tops_N: Int32Array,
    kept_N: Uint32Array,
    out_NK: Float32Array,
) -> None:
    """Logprobs of rows on a logit grid, and of plain ones; −inf where a row keeps less than K entries."""
    bits = np.empty(2, np.uint32)
    floats = bits.view(np.float32)
    for t in range(kept_N.size):
        kept = np.int64(kept_N[t])
        is_plain = tops_N[t] == PLAIN
        bits[0] = _float_bits(np.int64(tops_N[t]), mantissa_bits)
        top = floats[0]
        for i in range(kept):
            if is_plain:
                bits[1] = _flip(levels_NK[t, i])
                out_NK[t, i] = floats[1]
                continue
            bits[1] = _float_bits(np.int64(tops_N[t]) - np.int64(levels_NK[t, i]), mantissa_bits)
            gap = np.float32(floats[1] - top)
            out_NK[t, i] = np.float32(gap + first_N[t])
        for i in range(kept, out_NK.shape[1]):
            out_NK[t, i] = -np.inf


@inlined
def _float_bits(place: Scalar, mantissa_bits: Scalar) -> Scalar:
    """Bits of the float32 at a place of a grid; places outside float32 wrap, and are then some number."""
    size = (abs(place) << (23 - mantissa_bits)) & 0x7FFFFFFF
    return size | (0x80000000 if place < 0 else 0)


@compiled
def _place_of(value: Scalar, mantissa_bits: Scalar, scratch: Uint32Array) -> Scalar:
    """Place of the grid number nearest to a value."""
    scratch.view(np.float32)[0] = np.float32(value)
    shift = 23 - mantissa_bits
    size = (np.int64(scratch[0]) & 0x7FFFFFFF) + (1 << (shift - 1))
    size >>= shift
    return -size if value < 0 else size


@compiled
def _find(
    logprobs_NK: Float32Array,
    kept_N: Uint32Array,
    mantissa_bits: int,
    levels_NK: Uint32Array,
    tops_N: Int32Array,
) -> bool:
    """Fill levels and tops; whether this is the grid of all rows but a few, which are left plain."""
    scratch = np.zeros(2, np.uint32)
    plain = 0
    placed = 0
    for t in range(kept_N.size):
        kept = np.int64(kept_N[t])
        if kept == 0:
            tops_N[t] = PLAIN
            continue
        tops_N[t] = _find_top(logprobs_NK[t], kept, mantissa_bits, scratch, levels_NK[t])
        placed += tops_N[t] != PLAIN
        if tops_N[t] == PLAIN:
            plain += 1
            if plain > 1 + t // _PLAIN_SHARE:
                return False
            for i in range(kept):
                scratch.view(np.float32)[0] = logprobs_NK[t, i]
                levels_NK[t, i] = _flip(scratch[0])
    return placed > 0


@inlined
def _flip(bits: Scalar) -> Scalar:
    """Place of a float32 in the descending order of all, from its bits; and its bits from its place."""
    return bits if bits & 0x80000000 else 0x7FFFFFFF - bits


@compiled
def _find_top(
    logprobs_K: Float32Array, kept: Scalar, mantissa_bits: Scalar, scratch: Uint32Array, levels_K: Uint32Array
) -> Scalar:
    """Place of a top logit under which every logprob of a row comes back, and the row's levels; or PLAIN."""
    reach = 2.0 ** (mantissa_bits + 1)
    below = 64.0
    odd = 0
    for i in range(1, kept):
        gap = np.float64(logprobs_K[0]) - np.float64(logprobs_K[i])
        if gap == 0.0:
            continue
        if not gap < 1e4:
            return PLAIN
        grain = 1.0
        while grain > 2.0**-_FINEST and abs(gap / grain - np.rint(gap / grain)) * grain > 2.0**-19:
            grain *= 0.5
        odd += abs(gap / grain - np.rint(gap / grain)) * grain > 2.0**-19
        while grain < 64.0 and abs(gap / (2 * grain) - np.rint(gap / (2 * grain))) * grain <= 2.0**-20:
            grain *= 2.0
        below = min(below, gap + reach * grain)
    if 4 * odd > kept:
        return PLAIN
    # The roundest top that fits: most rows leave room for a multiple of a half, which costs few bits.
    top = np.ceil(below * 2.0) * 0.5 - 0.5
    for _ in range(_ROUND_TOPS):
        if top > 0 and _place_row(logprobs_K, kept, mantissa_bits, top, scratch, levels_K):
            return _place_of(top, mantissa_bits, scratch)
        top -= 0.5
    # Then every place down to the smallest top that is any use.
    place = _place_of(below, mantissa_bits, scratch)
    lowest = _place_of(_SMALLEST_TOP, mantissa_bits, scratch)
    while place >= lowest:
        scratch[0] = _float_bits(place, mantissa_bits)
        top = np.float64(scratch.view(np.float32)[0])
        if _place_row(logprobs_K, kept, mantissa_bits, top, scratch, levels_K):
            return place
        place -= 1
    return PLAIN


@compiled
def _place_row(
    logprobs_K: Float32Array,
    kept: Scalar,
    mantissa_bits: Scalar,
    top: Scalar,
    scratch: Uint32Array,
    levels_K: Uint32Array,
) -> bool:
    """Fill one row's levels under a top logit; whether every logprob comes back."""
    floats = scratch.view(np.float32)
    first = logprobs_K[0]
    place = _place_of(top, mantissa_bits, scratch)
    scratch[0] = _float_bits(place, mantissa_bits)
    top_logit = floats[0]
    for i in range(kept):
        logit = np.float64(top_logit) - (np.float64(first) - np.float64(logprobs_K[i]))
        other = _place_of(logit, mantissa_bits, scratch)
        if other > place:
            return False
        levels_K[i] = place - other
        scratch[1] = _float_bits(other, mantissa_bits)
        gap = np.float32(floats[1] - top_logit)
        # −0 is equal to what comes back, 0, but not the same.
        if np.float32(gap + first) != logprobs_K[i] or (logprobs_K[i] == 0 and np.signbit(logprobs_K[i])):
            return False
    return True
