"""What weights compute, measured on a few fixed prompts, so that two holders of them can be compared.

A checksum of parameters would not do: engines fuse, pad and pack them, and a head that was packed from
earlier weights has the right parameter and computes the wrong thing. Shape legend: N = prompts of the probe,
L = their length, V = vocabulary, K = entries that an engine reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lynearm.wire.errors import CheckpointError
from lynearm.wire.traces import Float32Array, Int32Array

PROBE_PROMPTS = 4
PROBE_TOKENS = 16

FIRST_TOLERANCE = 0.5
"""Nats by which an engine may differ at its first load: half precision comes to a tenth of a nat, and an
architecture that is computed otherwise to several."""

LEAST_TOLERANCE = 1e-3
"""Nats. In float32, vLLM and transformers differ by up to 4e-5."""

_ROUNDING = 4.0
"""Times the difference at the first load, which vLLM does in its usual way, that later ones may have."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """What some weights make of the probe's prompts."""

    token_ids: Int32Array
    """Shape [N, L]."""
    logprobs: Float32Array
    """Of the token after each prompt, natural log, shape [N, V]."""

    def error_of(self, token_ids: Int32Array, logprobs: Float32Array) -> float:
        """Largest distance of what an engine says from this, nats; infinite where it says NaN.

        Args:
            token_ids: The engine's likeliest tokens after each prompt, shape [N, K].
            logprobs: Its logprobs there.
        """
        ours_NK = np.take_along_axis(self.logprobs, token_ids.astype(np.int64), 1)
        error = float(np.abs(ours_NK - logprobs).max())
        return error if np.isfinite(error) else np.inf


def probe_token_ids(vocab_size: int) -> Int32Array:
    """The probe's prompts: ids from all over a vocabulary, always the same, shape [N, L]."""
    # Multiples of an odd number that is no divisor of usual sizes.
    numbers = np.arange(PROBE_PROMPTS * PROBE_TOKENS, dtype=np.int64) * 7919 + 11
    return (numbers % vocab_size).astype(np.int32).reshape(PROBE_PROMPTS, PROBE_TOKENS)


def save_probe(path: Path, probe: Probe) -> None:
    """Write a probe; not synced."""
    with path.open("wb") as file:
        np.savez(file, token_ids=probe.token_ids, logprobs=probe.logprobs)


def load_probe(path: Path) -> Probe:
    """Read a probe.

    Raises:
        CheckpointError: if it is not there, or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Probe(arrays["token_ids"], arrays["logprobs"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no probe of weights: {error}") from error


def tolerance_after(first_error: float) -> float:
    """Error that weights may have which were refreshed in place.

    Args:
        first_error: Of the same engine with weights that it loaded when it started: what its type of numbers
            and its kernels come to.
    """
    return max(LEAST_TOLERANCE, _ROUNDING * first_error)
