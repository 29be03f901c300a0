"""How far an exported package is from the checkpoint, and from what its own stored weights say.

Two comparisons, since one number cannot tell a bug from quantisation:

* *fidelity*: the package against torch in float32 holding the very weights that the package stores. Any
  bits, this must be almost zero; a wrong rotary base, mask or cache shows here, and is refused.
* *loss*: the package against torch in float32 holding the checkpoint's weights. At 16 bits it is the same
  number; at 8 and 4 bits it is the price of quantisation: reported, and refused only where nothing is left.

KL is KL(torch ‖ package) in nats over completion positions, rows of full-sequence runs and of cached decode
steps alike.
"""

# T = positions, V = vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import InvalidInputError, ParityError

if TYPE_CHECKING:
    from pathlib import Path

FloatArray: TypeAlias = npt.NDArray[np.float32]

DEFAULT_PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "A baker sells 12 loaves in the morning and twice as many in the afternoon. How many loaves is that?",
    "Write a Python function that returns the largest number of a list.",
    "Name three rivers in Europe and one city on each.",
)
"""What a package is compared on when no held-out traces are given."""

DECODE_STEPS = 8
"""Cached single-token steps checked, and tokens of the greedy continuation."""

FIDELITY_KL_LIMITS = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}
"""Mean KL, by the type of the activations. Measured on SmolLM2-135M: float16 3e-5, bfloat16 3e-3."""

LOSS_KL_LIMITS = {4: 4.0, 8: 0.5, 16: 3e-2}
"""Mean KL, by bits: sanity only, since what is acceptable depends on the student."""


@dataclass(frozen=True, slots=True)
class HeldOutSequence:
    """Token ids that no student was trained on.

    Raises:
        InvalidInputError: if the completion has no token, or no token before it.
    """

    token_ids: tuple[int, ...]
    completion_start: int
    """Index of the first completion token, at least 1: the token before it is what predicts it."""

    def __post_init__(self) -> None:
        if not 1 <= self.completion_start < len(self.token_ids):
            raise InvalidInputError(
                f"completion_start is {self.completion_start} in a sequence of {len(self.token_ids)} tokens",
                "give at least one prompt token and one completion token",
            )


@dataclass(frozen=True, slots=True)
class Parity:
    """Distance between a package and torch in float32."""

    max_abs_logit_error: float
    kl_mean: float
    """Nats per position."""
    kl_max: float
    """Nats."""
    top1_agreement: float
    """Share of positions with the same most likely token."""
    positions: int
    """Full-sequence rows and decode steps compared."""
    decode_positions: int
    """Of these, the rows that came from single-token steps through the cache."""
    greedy_matched: int
    """Tokens of the greedy continuation before the first difference."""
    greedy_total: int

    def summary(self) -> str:
        """One line for logs and model cards."""
        return (
            f"KL mean {self.kl_mean:.2e}, max {self.kl_max:.2e}; max abs logit error "
            f"{self.max_abs_logit_error:.2e}; top-1 agreement {self.top1_agreement:.3f} over "
            f"{self.positions} positions; greedy {self.greedy_matched}/{self.greedy_total}"
        )

    def as_dict(self) -> dict[str, float | int]:
        """The fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PackageLogits:
    """What one implementation computed; rows correspond one to one between implementations."""

    full: tuple[FloatArray, ...]
    """Per sequence, logits at its prediction positions, each [T, V]: row 0 predicts the first completion
    token."""
    decode: FloatArray
    """First rows of sequence 0 again, but computed token by token through the cache, [T, V]."""
    greedy: tuple[int, ...]
    """Most likely continuation of sequence 0's prompt; may be shorter than DECODE_STEPS."""


def select_sequences(
    held_out: Sequence[HeldOutSequence], max_positions: int, max_length: int
) -> list[HeldOutSequence]:
    """Sequences whose completions fit a budget of positions; over-long ones are cut at the end.

    Those that are mostly completion come first: prompts cost as much to compute and are not compared.

    Returns:
        At least one sequence if any had a completion within `max_length` tokens.
    """
    chosen: list[HeldOutSequence] = []
    for sequence in sorted(held_out, key=lambda one: one.completion_start / len(one.token_ids)):
        room = sequence.completion_start + max_positions
        ids = sequence.token_ids[: min(max_length, room)]
        if sequence.completion_start < len(ids):
            chosen.append(HeldOutSequence(ids, sequence.completion_start))
            max_positions -= len(ids) - sequence.completion_start
        if max_positions <= 0:
            break
    return chosen


def split_for_calibration(
    held_out: Sequence[HeldOutSequence],
) -> tuple[list[HeldOutSequence], list[HeldOutSequence]]:
    """Sequences to calibrate on and others to measure on: never the same ones.

    Three of four calibrate. Fewer than four sequences are all measured on.
    """
    if len(held_out) < 4:
        return [], list(held_out)
    measure = list(held_out[::4])
    return [sequence for i, sequence in enumerate(held_out) if i % 4], measure


def compare(reference: PackageLogits, package: PackageLogits) -> Parity:
    """Distance of a package's logits from the reference's.

    Raises:
        ParityError: if the package's logits have another shape.
    """
    references, packages = [*reference.full, reference.decode], [*package.full, package.decode]
    expected, found = [rows.shape for rows in references], [rows.shape for rows in packages]
    if expected != found:
        raise ParityError(
            f"logits have shapes {found}, not {expected}",
            "the package was built for another vocabulary; export again",
        )
    kl: list[npt.NDArray[np.float64]] = []
    top1: list[npt.NDArray[np.bool_]] = []
    error = 0.0
    for expected_TV, found_TV in zip(references, packages, strict=True):
        if len(expected_TV) == 0:
            continue
        kl.append(kl_divergence(expected_TV, found_TV))
        top1.append(expected_TV.argmax(-1) == found_TV.argmax(-1))
        error = max(error, _max_abs_difference(expected_TV, found_TV))
    kl_T = np.concatenate(kl)
    return Parity(
        max_abs_logit_error=error,
        kl_mean=float(kl_T.mean()),
        kl_max=float(kl_T.max()),
        top1_agreement=float(np.concatenate(top1).mean()),
        positions=len(kl_T),
        decode_positions=len(reference.decode),
        greedy_matched=_common_prefix(reference.greedy, package.greedy),
        greedy_total=len(reference.greedy),
    )


def kl_divergence(expected_TV: FloatArray, found_TV: FloatArray) -> npt.NDArray[np.float64]:
    """KL(softmax(expected) ‖ softmax(found)) per row, nats, shape [T]; inf where found is not finite."""
    expected, found = _log_softmax(expected_TV), _log_softmax(found_TV)
    kl_T = (np.exp(expected) * (expected - found)).sum(-1)
    return np.where(np.isfinite(kl_T), kl_T, np.inf)


def check_fidelity(parity: Parity, activation_dtype: str, package: Path) -> None:
    """Refuses a package that does not compute what its stored weights say.

    Raises:
        ParityError: if the mean KL exceeds the limit for the type of the activations.
    """
    limit = FIDELITY_KL_LIMITS[activation_dtype]
    if not parity.kl_mean <= limit:
        raise ParityError(
            f"{package.name} differs from its own weights in torch: {parity.summary()}; mean KL must not "
            f"exceed {limit}",
            "the graph or a file is wrong, not the rounding: do not ship it; report it with config.json",
        )


def check_loss(parity: Parity, bits: int, package: Path) -> None:
    """Refuses a package that has lost the student.

    Raises:
        ParityError: if the mean KL exceeds the sanity limit for these bits.
    """
    limit = LOSS_KL_LIMITS[bits]
    if not parity.kl_mean <= limit:
        raise ParityError(
            f"{package.name} at {bits} bits is far from the checkpoint: {parity.summary()}; mean KL must not "
            f"exceed {limit}",
            "export with more bits, a smaller group size, or held-out traces to calibrate on",
        )


def _max_abs_difference(expected_TV: FloatArray, found_TV: FloatArray) -> float:
    difference = float(np.abs(expected_TV - found_TV).max())
    return difference if math.isfinite(difference) else math.inf


def _log_softmax(logits_TV: FloatArray) -> npt.NDArray[np.float64]:
    # Non-finite logits come out as nan and are turned into an infinite KL by the caller.
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = logits_TV.astype(np.float64) - logits_TV.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _common_prefix(expected: Sequence[int], found: Sequence[int]) -> int:
    for count, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            return count
    return min(len(expected), len(found))
