"""Teacher profiles that were saved with `lynearm teacher profile STREAM --json`. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from lynearm.wire.errors import CodecError, InvalidInputError
from lynearm.wire.profiles import Float64Array, LayerStatistics, TeacherProfile

_HOW = "save it with: lynearm teacher profile STREAM --json > profile.json"


def read_profile_file(path: Path) -> TeacherProfile:
    """The profile in a file.

    Raises:
        InvalidInputError: if it cannot be read, or is no profile.
    """
    try:
        parsed: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as a teacher profile: {error}", _HOW) from error
    try:
        fields = cast("Mapping[str, Any]", parsed)
        layers = {int(layer["layer"]): _read_layer(layer) for layer in fields["layers"]}
        return TeacherProfile(str(fields["model"]), str(fields["revision"]), dict(sorted(layers.items())))
    except (CodecError, KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(f"{path} is no teacher profile: {error}", _HOW) from error


def _read_layer(fields: Mapping[str, Any]) -> LayerStatistics:
    """Sums again, out of means and their number."""
    positions = int(fields["positions"])

    def sums(name: str) -> Float64Array:
        return np.asarray(fields[name], np.float64) * positions

    return LayerStatistics(
        positions,
        float(fields["block_influence"]) * positions,
        sums("head_norms"),
        sums("head_contributions"),
        sums("neuron_activations"),
    )
