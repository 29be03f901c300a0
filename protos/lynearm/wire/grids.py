"""Levels: what a block writes in place of logprobs, and how they become logprobs again.

Levels are integers that rise as probability falls. Four scales:

- **Grid**: the step between neighbouring levels is min(D, c · e^(−logprob/2)) nats: uniform in √p for
  likely tokens, where that spends the added KL divergence evenly (the KL of a small error δ in p is
  δ²/p, and d√p = dp / 2√p), and at most D for unlikely ones. Level 0 is p = 1.
- **Bits**: float32 numbers in their own order; exact.
- **LogitGrid**: logprobs that are log-softmaxes of bf16 or fp16 logits, as steps of that type; exact.
- **Counts**: draws, of a fixed number of them; exact.

A uniform error inside a step of width s nats adds about p · s²/24 nats of KL for an entry of probability
p (Gish & Pierce 1968), less what all entries of a row have in common, since rows are normalised. So a row's
added KL is (1 − p) · c²/24 for each entry above p = (c/D)², and D²/24 times the mass below. `choose_grid`
solves that for c: every block meets its mode's bound with its own rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.jit import Scalar, compiled
from lynearm.wire.specs import MAX_DRAWS, CodecMode
from lynearm.wire.value_kernels import exponentials

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Uint32Array = npt.NDArray[np.uint32]

MAX_GRID_LEVEL: Final = (1 << 16) - 1
"""What lies below is put here; its probability is 0 for any purpose."""

MAX_BITS_LEVEL: Final = (1 << 32) - 1

SCALE_UNIT = 1e-6
CAP_UNIT = 1e-5
_FINEST_SCALE, _COARSEST_SCALE = 150, 500_000
_FINEST_CAP, _COARSEST_CAP = 400, 500_000

_TABLE_STEP = 256
_TABLES_KEPT = 8
"""Each takes half a megabyte at most."""

_SIGN = np.uint32(1 << 31)


@dataclass(frozen=True, slots=True)
class Grid:
    """Levels uniform in √p above a knee, and in log p below it."""

    scale_millionths: int
    """c · 10^6."""
    cap_hundred_thousandths: int
    """D · 10^5, nats."""

    def __post_init__(self) -> None:
        """Refuse grids that no level fits.

        Raises:
            CorruptBlockError: naming the value.
        """
        if not _FINEST_SCALE <= self.scale_millionths <= _COARSEST_SCALE:
            raise CorruptBlockError(f"grid scale {self.scale_millionths} is outside {_FINEST_SCALE}..500000")
        if not _FINEST_CAP <= self.cap_hundred_thousandths <= _COARSEST_CAP or self.scale > self.cap:
            raise CorruptBlockError(f"grid cap {self.cap_hundred_thousandths} is outside its range")

    @property
    def scale(self) -> float:
        """c: step in logprob at p = 1, nats."""
        return self.scale_millionths * SCALE_UNIT

    @property
    def cap(self) -> float:
        """D: largest step in logprob, nats."""
        return self.cap_hundred_thousandths * CAP_UNIT

    @property
    def knee_logprob(self) -> float:
        """Where the two laws of the step meet."""
        return 2.0 * math.log(self.scale / self.cap)

    @property
    def knee_level(self) -> float:
        """Level of the knee; not an integer."""
        return 2.0 / self.scale - 2.0 / self.cap

    def to_levels(self, logprobs: npt.NDArray[np.floating]) -> Uint32Array:
        """Nearest level of each logprob; positive logprobs count as 0.

        Args:
            logprobs: Natural logs, any shape, no NaN; −inf becomes `MAX_GRID_LEVEL`.
        """
        # float32 suffices: it is off by a hundredth of a level at the finest grid.
        flat = np.ascontiguousarray(logprobs, np.float32).ravel()
        levels = np.empty(flat.size, np.uint32)
        _grid_levels(
            flat,
            np.exp(flat * np.float32(0.5)),
            np.float32(self.scale),
            np.float32(self.cap),
            np.float32(self.knee_logprob),
            np.float32(self.knee_level),
            levels,
        )
        return levels.reshape(logprobs.shape)

    def table(self, count: int = MAX_GRID_LEVEL + 1) -> Float32Array:
        """Logprob of each of the first `count` levels, read-only."""
        return _grid_table(self, _round_up(count))[:count]

    def masses(self, count: int) -> Int64Array:
        """Probability of each of the first `count` levels in units of 2^−40, the same on every machine."""
        return _grid_masses(self, _round_up(count))[:count]

    def added_kl(self, logprobs: Float32Array, tail_mass: Float32Array) -> float:
        """Expected KL that this grid adds to all rows together, nats.

        Args:
            logprobs: Any shape; −inf where padded.
            tail_mass: Shape [N].
        """
        above, below = _masses(logprobs, tail_mass, self.scale / self.cap)
        return (self.scale**2 * above + self.cap**2 * below) / 24.0


def _round_up(count: int) -> int:
    return -(-count // _TABLE_STEP) * _TABLE_STEP


# Kept, since a stream's blocks mostly have the grid of their dictionary: a table takes as long as many rows.
@lru_cache(maxsize=_TABLES_KEPT)
def _grid_table(grid: Grid, count: int) -> Float32Array:
    levels = np.arange(count, dtype=np.float64)
    below_knee = np.minimum(levels, grid.knee_level)
    likely = 2.0 * np.log1p(-below_knee * grid.scale / 2.0)
    unlikely = grid.knee_logprob - (levels - grid.knee_level) * grid.cap
    table: Float32Array = np.where(levels < grid.knee_level, likely, unlikely).astype(np.float32)
    table.setflags(write=False)
    return table


@lru_cache(maxsize=_TABLES_KEPT)
def _grid_masses(grid: Grid, count: int) -> Int64Array:
    levels = np.arange(count, dtype=np.float64)
    root = 1.0 - np.minimum(levels, grid.knee_level) * (grid.scale / 2.0)
    knee_root = grid.scale / grid.cap
    beyond = np.minimum((grid.knee_level - levels) * grid.cap, 0.0)
    masses = np.where(levels < grid.knee_level, root * root, knee_root * knee_root * exponentials(beyond))
    table: Int64Array = np.floor(masses * float(1 << 40)).astype(np.int64)
    table.setflags(write=False)
    return table


@dataclass(frozen=True, slots=True)
class Bits:
    """float32 logprobs in descending order of value, bit for bit."""

    def to_levels(self, logprobs: Float32Array) -> Uint32Array:
        """Place of each float32 in the descending order of all float32 numbers."""
        bits = logprobs.view(np.uint32)
        return np.where(bits & _SIGN, bits, (_SIGN - np.uint32(1)) - bits).astype(np.uint32)

    def from_levels(self, levels: Uint32Array) -> Float32Array:
        """The float32 numbers at these places."""
        bits: Uint32Array = np.where(levels & _SIGN, levels, (_SIGN - np.uint32(1)) - levels)
        return bits.astype(np.uint32).view(np.float32)


@dataclass(frozen=True, slots=True)
class LogitGrid:
    """Logprobs whose logits are floats of few mantissa bits; see `lynearm.wire.logit_grids`."""

    mantissa_bits: int
    """7 for bf16, 10 for fp16."""

    def __post_init__(self) -> None:
        """Refuse other types.

        Raises:
            CorruptBlockError: naming the value.
        """
        if self.mantissa_bits not in (7, 10):
            raise CorruptBlockError(f"logits of {self.mantissa_bits} mantissa bits; known are 7 and 10")


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each token was drawn, of `draws` times: level = draws − count."""

    draws: int

    def __post_init__(self) -> None:
        """Refuse no draws, and too many.

        Raises:
            CorruptBlockError: naming the value.
        """
        if not 0 < self.draws <= MAX_DRAWS:
            raise CorruptBlockError(f"{self.draws} draws, expected 1 to {MAX_DRAWS}")

    def to_levels(self, logprobs: Float32Array) -> Uint32Array:
        """Levels of entries at log(count / draws)."""
        counts = np.rint(np.exp(logprobs.astype(np.float64)) * self.draws)
        levels: Float64Array = np.clip(self.draws - counts, 0, self.draws - 1)
        return levels.astype(np.uint32)

    def table(self, count: int | None = None) -> Float32Array:
        """log(count / draws) of each of the first `count` levels, or of all."""
        counts = self.draws - np.arange(self.draws if count is None else count, dtype=np.float64)
        return np.log(counts / self.draws).astype(np.float32)


Scale: TypeAlias = Grid | Bits | LogitGrid | Counts


@dataclass(frozen=True, slots=True)
class GridLaw:
    """How a mode chooses its grids."""

    added_kl: float
    """Bound on the added KL of a block's mean position, nats."""
    cap_per_scale: float
    """D / c: how much coarser unlikely entries may be."""
    largest_cap: float
    """Nats: an entry is never off by more than half of it."""


GRID_LAWS: Final[dict[CodecMode, GridLaw]] = {
    "fine": GridLaw(1e-6, 30.0, 0.05),
    "standard": GridLaw(1e-4, 50.0, 0.5),
    "compact": GridLaw(1e-3, 40.0, 1.0),
}
"""Wider caps would save a few per cent more: D / c = 300 at standard saves 18 bits of 780, and leaves
entries at p = 1e-5 off by a nat."""


_CAUTION = 0.985


def choose_grid(mode: CodecMode, logprobs_NK: Float32Array, tail_mass_N: Float32Array) -> Grid:
    """The coarsest grid of a mode that keeps the expected added KL of some rows under its bound.

    Args:
        mode: A mode in `GRID_LAWS`.
        logprobs_NK: −inf where padded.
        tail_mass_N: Mass outside the entries.
    """
    law = GRID_LAWS[mode]
    above, below = _masses(logprobs_NK, tail_mass_N, 1.0 / law.cap_per_scale)
    weight = (above + law.cap_per_scale**2 * below) / 24.0 / max(len(tail_mass_N), 1)
    # A block of few rows may come out some per cent above what is expected of it.
    scale = math.sqrt(_CAUTION * law.added_kl / weight) if weight > 0 else 1.0
    scale = min(max(scale, _FINEST_SCALE * SCALE_UNIT), law.largest_cap / 4)
    cap = min(scale * law.cap_per_scale, law.largest_cap)
    return Grid(math.floor(scale / SCALE_UNIT), max(math.floor(cap / CAP_UNIT), _FINEST_CAP))


def _masses(logprobs: Float32Array, tail_mass: Float32Array, knee_root: float) -> tuple[float, float]:
    """Σ 1 − p of the buckets (entries and tails) above √p = `knee_root`, and the mass of those below."""
    roots = np.exp(logprobs.ravel() * np.float32(0.5))
    above, below = _count_above(roots, np.float32(knee_root))
    tails_above, tails_below = _count_above(np.sqrt(np.maximum(tail_mass, 0)), np.float32(knee_root))
    return above + tails_above, below + tails_below


@compiled
def _count_above(roots: Float32Array, knee_root: Scalar) -> tuple[float, float]:
    above = 0.0
    below = 0.0
    for index in range(roots.size):
        root = roots[index]
        is_low = root <= knee_root
        mass = np.float64(root) * np.float64(root)
        # What all entries of a row have in common is lost when the row is normalised: hence 1 − p.
        above += 0.0 if is_low else 1.0 - mass
        below += mass if is_low else 0.0
    return above, below


@compiled
def _grid_levels(
    logprobs: Float32Array,
    roots: Float32Array,
    scale: np.float32,
    cap: np.float32,
    knee_logprob: np.float32,
    knee_level: np.float32,
    levels: Uint32Array,
) -> None:
    per_scale = np.float32(2.0) / scale
    per_cap = np.float32(1.0) / cap
    for index in range(logprobs.size):
        logprob = max(min(logprobs[index], np.float32(0.0)), np.float32(-3e4))
        likely = (np.float32(1.0) - min(roots[index], np.float32(1.0))) * per_scale
        unlikely = (knee_logprob - logprob) * per_cap + knee_level
        level = likely if logprob > knee_logprob else unlikely
        levels[index] = np.uint32(np.int32(min(np.rint(level), np.float32(65535.0))))
