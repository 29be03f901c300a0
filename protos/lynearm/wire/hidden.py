"""Hidden states of a teacher: what its layers hand on, in the two floating-point types in which they travel.

Position t's row is the state from which completion token t was predicted, as with logprobs. The states of
layer n are the residual stream after decoder layer n, counted from 0; those of "norm" are the output of the
final norm, which the language-model head reads.

Shape legend: L = layers, T = completion positions, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import CodecError, InvalidInputError

Float32Array: TypeAlias = npt.NDArray[np.float32]
StateArray: TypeAlias = "npt.NDArray[np.uint16] | npt.NDArray[np.uint8]"

FINAL_NORM: Final = "norm"
Layer: TypeAlias = int | Literal["norm"]
"""A decoder layer, or the final norm."""

HiddenDtype: TypeAlias = Literal["bf16", "fp8"]
HIDDEN_DTYPES: tuple[HiddenDtype, ...] = get_args(HiddenDtype)

MAX_CAPTURED_LAYERS = 256
MAX_LAYER = (1 << 16) - 1
MAX_HIDDEN_SIZE = 1 << 16

FP8_MAX = 448.0
"""Largest number of E4M3."""

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""That a writer gives a row: rows of zeros have a scale too."""

LARGEST_SCALE = float(np.finfo(np.float32).max) / FP8_MAX
"""Beyond it, the largest number would be infinite."""

_FP8_NAN = 0x7F
_BF16_EXPONENT = np.uint16(0x7F80)


@dataclass(frozen=True, slots=True)
class HiddenStatesSpec:
    """Which hidden states the traces of a stream carry.

    Raises:
        InvalidInputError: naming the field that is out of range.
    """

    layers: tuple[Layer, ...]
    """Ascending, the final norm last."""
    dtype: HiddenDtype
    """"bf16" is off by 0.16 % of a row's norm, "fp8" (E4M3 and a scale for each row) by 2 % in half the
    bytes."""
    hidden_size: int

    def __post_init__(self) -> None:
        """Check every field."""
        decoders = [layer for layer in self.layers if layer != FINAL_NORM]
        ordered = decoders == sorted(set(decoders)) and FINAL_NORM not in self.layers[:-1]
        checks = {
            f"{len(self.layers)} layers, expected 1 to {MAX_CAPTURED_LAYERS}": (
                1 <= len(self.layers) <= MAX_CAPTURED_LAYERS
            ),
            f"layers {self.layers} do not ascend, with {FINAL_NORM!r} last": ordered,
            f"layers {self.layers} leave 0..{MAX_LAYER}": all(0 <= layer <= MAX_LAYER for layer in decoders),
            f"dtype {self.dtype!r} is none of {', '.join(HIDDEN_DTYPES)}": self.dtype in HIDDEN_DTYPES,
            f"hidden_size {self.hidden_size} is outside 1..{MAX_HIDDEN_SIZE}": (
                1 <= self.hidden_size <= MAX_HIDDEN_SIZE
            ),
        }
        for problem, holds in checks.items():
            if not holds:
                raise InvalidInputError(f"hidden states: {problem}")

    @property
    def bytes_per_position(self) -> int:
        """Of all layers, as arrays; on the wire bf16 takes about 0.7 of it, fp8 0.86."""
        row_bytes = 2 * self.hidden_size if self.dtype == "bf16" else self.hidden_size + 4
        return len(self.layers) * row_bytes


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The states of some layers at each completion position of a trace.

    `values` are the bits of the type, so that torch takes them without a copy:
    `torch.from_numpy(states.values).view(torch.bfloat16)`, or `.view(torch.float8_e4m3fn)` times `scales`.

    Raises:
        CodecError: if arrays contradict each other or the type, or hold what is no finite number.
    """

    layers: tuple[Layer, ...]
    """Ascending, the final norm last."""
    dtype: HiddenDtype
    values: StateArray
    """Shape [L, T, H]; uint16 for "bf16", uint8 for "fp8"."""
    scales: Float32Array | None = None
    """What the values of each row are multiplied by, shape [L, T], above 0; "fp8" only."""

    def __post_init__(self) -> None:
        """Check shapes, types and values."""
        expected = np.uint16 if self.dtype == "bf16" else np.uint8
        if self.values.ndim != 3 or self.values.dtype != expected:
            raise CodecError(
                f"hidden states of dtype {self.dtype!r} have values of shape {self.values.shape}, "
                f"{self.values.dtype}; expected [layers, positions, hidden size], {np.dtype(expected)}"
            )
        if self.values.shape[0] != len(self.layers):
            raise CodecError(f"hidden states of {self.values.shape[0]} layers, {self.layers} are named")
        try:
            HiddenStatesSpec(self.layers, self.dtype, self.hidden_size)
        except InvalidInputError as error:
            raise CodecError(error.message) from error
        if (self.scales is None) != (self.dtype == "bf16"):
            raise CodecError(f"hidden states of dtype {self.dtype!r}: only 'fp8' has scales, and always")
        self._check_numbers()

    @property
    def spec(self) -> HiddenStatesSpec:
        """What a stream says of these states."""
        return HiddenStatesSpec(self.layers, self.dtype, self.hidden_size)

    @property
    def positions(self) -> int:
        """T."""
        return int(self.values.shape[1])

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.values.shape[2])

    @property
    def size_bytes(self) -> int:
        """Of all arrays."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def to_float32(self) -> Float32Array:
        """The states as numbers, shape [L, T, H]."""
        if self.scales is None:
            bits: npt.NDArray[np.uint32] = self.values.astype(np.uint32) << np.uint32(16)
            return bits.view(np.float32)
        return fp8_numbers()[self.values] * self.scales[:, :, None]

    @classmethod
    def from_float32(
        cls, states_LTH: Float32Array, layers: Sequence[Layer], dtype: HiddenDtype
    ) -> HiddenStates:
        """States rounded to a type, to nearest and ties to even; with a scale a row for "fp8".

        Args:
            states_LTH: Shape [L, T, H].
            layers: Names of the L layers.
            dtype: The type.

        Raises:
            CodecError: if a number is not finite, or too large for bf16.
        """
        if not np.isfinite(states_LTH).all():
            raise CodecError("hidden states hold NaN or infinity")
        if dtype == "bf16":
            return cls(tuple(layers), dtype, _to_bf16(states_LTH))
        largest_LT = np.abs(states_LTH).max(axis=2, initial=0.0)
        scales_LT = np.maximum(largest_LT / np.float32(FP8_MAX), np.float32(SMALLEST_SCALE))
        return cls(tuple(layers), dtype, _to_fp8(states_LTH / scales_LT[:, :, None]), scales_LT)

    def _check_numbers(self) -> None:
        if self.scales is None:
            if bool(((self.values & _BF16_EXPONENT) == _BF16_EXPONENT).any()):
                raise CodecError("hidden states hold NaN or infinity")
            return
        if self.scales.shape != self.values.shape[:2] or self.scales.dtype != np.float32:
            raise CodecError(
                f"scales of shape {self.scales.shape}, {self.scales.dtype}, "
                f"expected {self.values.shape[:2]}, float32"
            )
        # NaN compares as false.
        if not ((self.scales > 0) & (self.scales <= np.float32(LARGEST_SCALE))).all():
            raise CodecError(f"scales of hidden states are not all above 0, and at most {LARGEST_SCALE:g}")
        if bool(((self.values & np.uint8(_FP8_NAN)) == _FP8_NAN).any()):
            raise CodecError("hidden states hold NaN")


@cache
def fp8_numbers() -> Float32Array:
    """The number of each E4M3 code, shape [256]: sign, four bits of exponent, three of mantissa.

    Without infinities; 0x7F and 0xFF are NaN (Micikevicius et al. 2022, "FP8 Formats for Deep Learning").
    """
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 15, codes & 7
    sizes = np.where(
        exponents == 0,
        np.ldexp(mantissas / 8.0, -6),
        np.ldexp(1 + mantissas / 8.0, exponents - 7),
    )
    sizes[codes & 0x7F == _FP8_NAN] = np.nan
    numbers: Float32Array = np.where(codes < 128, sizes, -sizes).astype(np.float32)
    numbers.setflags(write=False)
    return numbers


def _to_bf16(states: Float32Array) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(states).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype(np.uint16)


def _to_fp8(numbers: Float32Array) -> npt.NDArray[np.uint8]:
    sizes = np.abs(numbers)
    _, exponents = np.frexp(sizes)
    # Of the last mantissa bit; below 2^-6 numbers have one exponent in common.
    exponents = np.where(sizes == 0, -6, np.clip(exponents - 1, -6, 8))
    steps = np.rint(np.ldexp(sizes, 3 - exponents)).astype(np.int32)
    codes = np.minimum(((exponents + 6) << 3) + steps, 126)
    signed: npt.NDArray[np.uint8] = (codes | np.where(np.signbit(numbers), 0x80, 0)).astype(np.uint8)
    return signed
