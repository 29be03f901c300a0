"""What a cut says while it works, and what came of it. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CutProgress:
    """How far a cut is."""

    message: str
    dropped: tuple[int, ...] = ()
    """Layers left out so far, in the order of their choice."""
    kl: float | None = None
    """KL to the teacher without them, nats per position."""


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer of the teacher, and what became of it."""

    layer: int
    influence: float
    """Block influence: 0 where the layer changes nothing."""
    kept: bool
    heads: tuple[int, ...] = ()
    """Query heads that were kept, ascending; of the teacher's numbers."""
    neurons: int = 0
    """How many were kept."""
    head_share: float = 1.0
    """Of what all heads of the layer add to the residual stream, the part that stays."""
    neuron_share: float = 1.0
    """The same of the neurons' activations."""


@dataclass(frozen=True, slots=True)
class CutReport:
    """What was cut."""

    directory: Path
    layers: tuple[int, ...]
    """The teacher's layers that were kept, ascending."""
    dropped: tuple[int, ...]
    """The others; in the order of their choice where they were chosen by measurement or influence."""
    kl: float
    """KL to the teacher on the calibration sequences, nats per position, before any training."""
    rows: tuple[LayerRow, ...]
    """One for each layer of the teacher."""
    parameters: int
    teacher_parameters: int
    measured_on: str
    """Where influence, heads and neurons were measured, in words."""
