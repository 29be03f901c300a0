"""What a user may choose about an export: one frozen dataclass per format.

Fields hold simple types only, so that a TOML file or a flag can fill them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.wire.errors import ConfigError

BITS = (4, 8, 16)
MLX_GROUP_SIZES = (0, 32, 64, 128)
MLX_DTYPES = ("auto", "float16", "bfloat16")
ROUNDINGS = ("auto", "nearest", "feedback")
MAX_COREML_CONTEXT = 32_768


@dataclass(frozen=True, slots=True)
class MlxExportConfig:
    """Choices for a directory that stock `mlx_lm.load` reads.

    Raises:
        ConfigError: when constructed with a value that no exporter understands.
    """

    bits: int = 8
    """Bits per weight: 4, 8 or 16. 8 by default: 4 costs a small model a visible share of its skill."""
    group_size: int = 0
    """Weights that share a scale and a bias: 32, 64, 128, or 0 to choose. At 4 bits, 0 takes 32: half a
    bit per weight more than 64, and a KL a sixth lower; at 8 bits it is 64. Ignored at 16 bits."""
    dtype: str = "auto"
    """Type of activations and of what is not quantised: float16, bfloat16, or auto: float16
    where every weight is within its range (SmolLM2-135M's KL: 2e-5 against bfloat16's 3e-3)."""
    rounding: str = "auto"
    """How 4-bit codes are chosen. nearest: each weight alone, on a grid of least squared error. feedback:
    column by column, spreading each error over the columns to come (needs held-out traces). auto: feedback
    where held-out traces are given."""
    calibration_tokens: int = 1024
    """Most tokens of held-out traces used for feedback; about 10 ms of CPU each at 135M parameters."""
    parity_tokens: int = 256
    """Most positions at which the package is compared with the checkpoint; they cost memory, 4 bytes times
    the vocabulary each."""
    check_parity: bool = True
    """Refuse to publish a package that does not compute what its weights say."""
    overwrite: bool = False
    """Replace an existing directory even if lynearm did not write it."""

    def __post_init__(self) -> None:
        _check_choice("bits", self.bits, BITS)
        _check_choice("group_size", self.group_size, MLX_GROUP_SIZES)
        _check_choice("dtype", self.dtype, MLX_DTYPES)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_range("calibration_tokens", self.calibration_tokens, 1, 1 << 20)
        _check_range("parity_tokens", self.parity_tokens, 8, 1 << 16)


@dataclass(frozen=True, slots=True)
class CoreMlExportConfig:
    """Choices for a directory that holds a stateful `.mlpackage` for iOS 18 and macOS 15.

    Raises:
        ConfigError: when constructed with a value that no exporter understands.
    """

    bits: int = 16
    """Bits per weight: 16 (float16), 8 or 4 (signed integers, one scale per block). 16 by default: it is
    what the checkpoint computes."""
    block_size: int = 32
    """Weights that share a scale at 4 and 8 bits. 32 loses least; it costs half a bit per weight."""
    context_length: int = 2048
    """Tokens that the key-value cache holds; its memory grows with it (90 MB at 2048 for SmolLM2-135M)."""
    rounding: str = "auto"
    """As `MlxExportConfig.rounding`."""
    calibration_tokens: int = 1024
    """As `MlxExportConfig.calibration_tokens`."""
    parity_tokens: int = 64
    """Most positions compared; fewer than for MLX, since decode steps run in a slow interpreter."""
    hub_id: str = ""
    """Hugging Face repository of the tokenizer, written into the metadata where swift-transformers looks
    for it; empty writes the name of the checkpoint's directory."""
    check_parity: bool = True
    """Refuse to publish a package that does not compute what its weights say."""
    overwrite: bool = False
    """Replace an existing directory even if lynearm did not write it."""

    def __post_init__(self) -> None:
        _check_choice("bits", self.bits, BITS)
        _check_choice("block_size", self.block_size, (16, 32, 64, 128))
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_range("context_length", self.context_length, 16, MAX_COREML_CONTEXT)
        _check_range("calibration_tokens", self.calibration_tokens, 1, 1 << 20)
        _check_range("parity_tokens", self.parity_tokens, 8, 1 << 16)


def _check_choice(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field} is {value!r}", f"use one of {', '.join(map(str, allowed))}")


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{field} is {value}", f"use a number from {low} to {high}")
