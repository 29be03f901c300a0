"""Profiles by hand, and what a model computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lynearm.student.cutting.shape import read_shape
from lynearm.student.model import load_student
from lynearm.wire.profiles import Float64Array, LayerStatistics, TeacherProfile

INPUT_IDS = torch.tensor([[7, 30, 31, 200, 5, 77]])
POSITIONS = 10


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_student(directory, device="cpu").model(INPUT_IDS, use_cache=True).logits
    return found


def profile_of(
    directory: Path,
    *,
    influence: Sequence[float],
    heads: Float64Array | None = None,
    neurons: Float64Array | None = None,
) -> TeacherProfile:
    """A profile of so many layers, all with the same heads and neurons."""
    shape = read_shape(load_student(directory, device="cpu").model.config)
    heads = np.ones(shape.heads) if heads is None else heads
    neurons = np.ones(shape.neurons) if neurons is None else neurons
    layers = {
        number: LayerStatistics(
            POSITIONS, value * POSITIONS, heads * POSITIONS, heads * POSITIONS, neurons * POSITIONS
        )
        for number, value in enumerate(influence)
    }
    return TeacherProfile("teacher", "sha256:00", layers)
