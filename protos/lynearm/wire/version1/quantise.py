"""The grid on which the standard codec mode puts logprobs.

The step between neighbouring levels is min(MAX_STEP, STEP_SCALE · e^(−logprob/2)) nats: uniform in √p
for likely tokens, where that spends the added KL divergence evenly (the KL of a small error δ in p is
δ²/p, and d√p = dp / 2√p), and uniform in log p for unlikely ones. Level 0 is p = 1; levels rise as p
falls. With these constants a top-64 and its tail gain about 1e-4 nats of KL.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from lynearm.wire.traces import Float32Array

Int64Array = npt.NDArray[np.int64]

STEP_SCALE = 0.014
MAX_STEP = 0.11
"""Nats."""

KNEE_LOGPROB = 2.0 * math.log(STEP_SCALE / MAX_STEP)
"""Where the two laws of the step meet, about -4.12."""

KNEE_LEVEL = 2.0 / STEP_SCALE - 2.0 / MAX_STEP
"""Level of the knee, about 124.7; not an integer."""

MAX_LEVEL = (1 << 16) - 1
"""Logprob about -7200; what lies below is put here, since its probability is 0 in any float."""


def from_levels(levels: Int64Array) -> Float32Array:
    """Logprob of each level.

    Args:
        levels: In 0..`MAX_LEVEL`, any shape.
    """
    return _level_logprobs()[levels]


@functools.cache
def _level_logprobs() -> Float32Array:
    levels = np.arange(MAX_LEVEL + 1, dtype=np.float64)
    below_knee = np.minimum(levels, KNEE_LEVEL)
    likely = 2.0 * np.log1p(-below_knee * STEP_SCALE / 2.0)
    unlikely = KNEE_LOGPROB - (levels - KNEE_LEVEL) * MAX_STEP
    return np.where(levels < KNEE_LEVEL, likely, unlikely).astype(np.float32)
