"""The teacher profile: what each layer of a teacher does, as sums over completion positions.

Sums and counts are kept, never means, so that what several workers measured, or one before and after a
restart, adds up to what one would have measured: in any order, to the rounding of float64. A profile is
stored in parts (`encode_profile`), each with some of the layers.

Block influence is 1 − cos(residual stream before a layer, after it), by which layers are dropped (Men et al.
2024, "ShortGPT"); heads and neurons are ranked by the size of what they put out (Muralidharan et al. 2024,
"Compact Language Models via Pruning and Knowledge Distillation").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard
from google.protobuf.message import DecodeError

from lynearm.v1 import profile_pb2
from lynearm.wire.compression import decompress
from lynearm.wire.errors import CodecError, CorruptBlockError, MisalignmentError, UnsupportedFormatError
from lynearm.wire.hidden import MAX_LAYER

Float64Array: TypeAlias = npt.NDArray[np.float64]

MAX_PART_BYTES = 2 << 20
"""Content of a part before it is compressed; one layer may exceed it."""

MAX_PART_CONTENT = 16 << 20
"""What a reader must be ready to hold for one part."""

_MAGIC = b"LYP1"
_ZSTD_LEVEL = 3


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Sums over the positions at which a layer was looked at.

    Raises:
        CodecError: if a sum is negative or no number.
    """

    positions: int
    influence_sum: float
    head_norm_sums: Float64Array
    """Norms of the heads' outputs before the output projection, shape [heads]; empty: not measured."""
    head_contribution_sums: Float64Array
    """Norms of what each head adds to the residual stream, shape [heads]; empty: not measured."""
    neuron_sums: Float64Array
    """Absolute activations of the feed-forward network, shape [neurons]; empty: not measured."""

    def __post_init__(self) -> None:
        """Check every sum."""
        for name in ("head_norm_sums", "head_contribution_sums", "neuron_sums"):
            sums: Float64Array = getattr(self, name)
            if sums.ndim != 1 or sums.dtype != np.float64:
                raise CodecError(f"{name} has shape {sums.shape}, {sums.dtype}; expected [n], float64")
            # NaN compares as false.
            if not ((sums >= 0) & (sums < np.inf)).all():
                raise CodecError(f"{name} holds what is no sum of sizes")
        # A cosine may exceed 1 by its rounding.
        if self.positions < 1 or not -1e-3 * self.positions <= self.influence_sum <= 2.001 * self.positions:
            raise CodecError(
                f"influence_sum {self.influence_sum} of {self.positions} positions, expected 0 to 2 for each"
            )

    @property
    def influence(self) -> float:
        """Mean block influence: 0 where the layer changes nothing."""
        return max(self.influence_sum / self.positions, 0.0)

    @property
    def head_norms(self) -> Float64Array:
        """Mean norm of each head's output, shape [heads]."""
        return self.head_norm_sums / self.positions

    @property
    def head_contributions(self) -> Float64Array:
        """Mean norm of what each head adds to the residual stream, shape [heads]."""
        return self.head_contribution_sums / self.positions

    @property
    def neuron_activations(self) -> Float64Array:
        """Mean absolute activation of each neuron, shape [neurons]."""
        return self.neuron_sums / self.positions

    def plus(self, other: LayerStatistics) -> LayerStatistics:
        """Both together.

        Raises:
            MisalignmentError: if they are of layers of different shapes.
        """
        pairs = {
            name: (getattr(self, name), getattr(other, name))
            for name in ("head_norm_sums", "head_contribution_sums", "neuron_sums")
        }
        for name, (ours, theirs) in pairs.items():
            if ours.shape != theirs.shape:
                raise MisalignmentError(
                    f"statistics of layers of different shapes: {name} of {ours.size} and {theirs.size}"
                )
        return LayerStatistics(
            self.positions + other.positions,
            self.influence_sum + other.influence_sum,
            **{name: ours + theirs for name, (ours, theirs) in pairs.items()},
        )


@dataclass(frozen=True, slots=True)
class TeacherProfile:
    """Statistics of the layers of one teacher."""

    model: str
    revision: str
    layers: Mapping[int, LayerStatistics] = field(default_factory=dict[int, LayerStatistics])

    @property
    def positions(self) -> int:
        """Completion positions of the layer that was looked at most often."""
        return max((layer.positions for layer in self.layers.values()), default=0)

    def plus(self, other: TeacherProfile) -> TeacherProfile:
        """Both together, layer by layer.

        Raises:
            MisalignmentError: if they are of different teachers.
        """
        if (self.model, self.revision) != (other.model, other.revision):
            raise MisalignmentError(
                f"profiles of different teachers: {self.model!r} at {self.revision[:24]} and {other.model!r} "
                f"at {other.revision[:24]}"
            )
        layers = dict(self.layers)
        for number, theirs in other.layers.items():
            layers[number] = layers[number].plus(theirs) if number in layers else theirs
        return replace(self, layers=dict(sorted(layers.items())))


def encode_profile(profile: TeacherProfile) -> list[bytes]:
    """A profile as parts, each of some layers; docs/inside.md describes them.

    Raises:
        CodecError: if a layer is beyond what the format counts.
    """
    parts: list[bytes] = []
    message = _empty(profile)
    for number, layer in sorted(profile.layers.items()):
        if not 0 <= number <= MAX_LAYER:
            raise CodecError(f"statistics of layer {number}, expected 0 to {MAX_LAYER}")
        written = _write_layer(number, layer)
        if message.layers and message.ByteSize() + written.ByteSize() > MAX_PART_BYTES:
            parts.append(_pack(message))
            message = _empty(profile)
        message.layers.append(written)
    return [*parts, _pack(message)] if message.layers else parts


def decode_profile(data: bytes) -> TeacherProfile:
    """The profile in one part. Nothing in it is trusted.

    Raises:
        CorruptBlockError: if it is no part of a profile, or a value in it does not hold.
        UnsupportedFormatError: if a newer lynearm wrote it.
    """
    if data[:3] == _MAGIC[:3] and data[3:4] > _MAGIC[3:]:
        raise UnsupportedFormatError("a teacher profile of a newer format", "upgrade lynearm")
    if data[:4] != _MAGIC:
        raise CorruptBlockError("not a teacher profile: it does not begin with LYP1")
    try:
        message = profile_pb2.TeacherProfile.FromString(decompress(data[4:], limit=MAX_PART_CONTENT))
    except DecodeError as error:
        raise CorruptBlockError("not a teacher profile: it does not parse") from error
    try:
        layers = {layer.layer: _read_layer(layer) for layer in message.layers}
    except CodecError as error:
        raise CorruptBlockError(f"a teacher profile that cannot be: {error.message}") from error
    if len(layers) != len(message.layers) or any(number > MAX_LAYER for number in layers):
        raise CorruptBlockError("a teacher profile has a layer twice, or one that no model has")
    return TeacherProfile(message.model, message.revision, dict(sorted(layers.items())))


def _empty(profile: TeacherProfile) -> profile_pb2.TeacherProfile:
    return profile_pb2.TeacherProfile(model=profile.model, revision=profile.revision)


def _pack(message: profile_pb2.TeacherProfile) -> bytes:
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
    return _MAGIC + compressor.compress(message.SerializeToString(deterministic=True))


def _write_layer(number: int, layer: LayerStatistics) -> profile_pb2.LayerStatistics:
    return profile_pb2.LayerStatistics(
        layer=number,
        positions=layer.positions,
        influence_sum=layer.influence_sum,
        head_norm_sums=layer.head_norm_sums.astype("<f8").tobytes(),
        head_contribution_sums=layer.head_contribution_sums.astype("<f8").tobytes(),
        neuron_sums=layer.neuron_sums.astype("<f8").tobytes(),
    )


def _read_layer(message: profile_pb2.LayerStatistics) -> LayerStatistics:
    return LayerStatistics(
        message.positions,
        message.influence_sum,
        _read_sums(message.head_norm_sums),
        _read_sums(message.head_contribution_sums),
        _read_sums(message.neuron_sums),
    )


def _read_sums(data: bytes) -> Float64Array:
    if len(data) % 8:
        raise CorruptBlockError(f"{len(data)} bytes are no float64 numbers")
    return np.frombuffer(data, "<f8").astype(np.float64)
