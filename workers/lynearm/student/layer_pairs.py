"""Which of the student's layers are compared with which of the teacher's.

    PAIRS = STUDENT=TEACHER,…        4=4,8=8        9=29,norm=norm

Layers are named as in a stream: decoder layers counted from 0, whose states are the residual stream behind
them, and `norm`, the output of the final norm. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from lynearm.wire.errors import ConfigError, MisalignmentError
from lynearm.wire.hidden import FINAL_NORM, MAX_LAYER, Layer
from lynearm.wire.specs import StreamSpec

LayerPair: TypeAlias = tuple[Layer, Layer]
"""A layer of the student, and the teacher's that it is compared with."""

_HOW = "write STUDENT_LAYER=TEACHER_LAYER with commas between, for example 4=9,8=19,norm=norm"


def parse_pairs(text: str) -> tuple[LayerPair, ...]:
    """Pairs as they are written in a configuration.

    Raises:
        ConfigError: if they are not pairs of layers.
    """
    pairs: list[LayerPair] = []
    for part in text.split(","):
        student, separator, teacher = part.partition("=")
        if not separator:
            raise ConfigError(f"layers {text!r}: {part!r} is no pair", _HOW)
        pairs.append((_parse_layer(student, text), _parse_layer(teacher, text)))
    return tuple(pairs)


def format_pairs(pairs: Sequence[LayerPair]) -> str:
    """As `parse_pairs` reads them."""
    return ",".join(f"{student}={teacher}" for student, teacher in pairs)


def pair_by_depth(carried: Sequence[Layer], student_layers: int) -> tuple[LayerPair, ...]:
    """Each carried layer beside the student's layer of the same relative depth, and the final norms.

    A stream does not say how many layers its teacher has: its deepest decoder layer counts as the last.

    Args:
        carried: The stream's layers, ascending.
        student_layers: How many decoder layers the student has, at least one.
    """
    decoders = [layer for layer in carried if layer != FINAL_NORM]
    pairs: list[LayerPair] = []
    for layer in decoders:
        depth = (layer + 1) / (decoders[-1] + 1)
        # Halves go up, where Python's rounding would go to even numbers.
        pairs.append((max(0, int(depth * student_layers + 0.5) - 1), layer))
    if FINAL_NORM in carried:
        pairs.append((FINAL_NORM, FINAL_NORM))
    return tuple(pairs)


def settle_pairs(
    term: str, pairs: Sequence[LayerPair], spec: StreamSpec, student_layers: int
) -> tuple[LayerPair, ...]:
    """The pairs that a term compares on a stream: those that were given, or by depth if none were.

    Args:
        term: Its name, for messages.
        pairs: As given.
        spec: Of the stream.
        student_layers: How many decoder layers the student has; 0 where they are not known.

    Raises:
        MisalignmentError: if the stream carries no hidden states, or not of a layer that was given.
        ConfigError: if the student has no such layer.
    """
    hidden = spec.codec.hidden
    if hidden is None:
        raise MisalignmentError(
            f"{term} compares hidden states, and stream {spec.name!r} carries none",
            f"capture it with lynearm teach --capture hidden:layers=-1, or train without {term}",
        )
    if not pairs and not student_layers and hidden.layers != (FINAL_NORM,):
        raise ConfigError(
            f"{term}: the student's architecture does not say which its decoder layers are",
            f"compare {FINAL_NORM}={FINAL_NORM} from a stream that carries {FINAL_NORM}",
        )
    settled = tuple(pairs) or pair_by_depth(hidden.layers, student_layers)
    for student, teacher in settled:
        if teacher not in hidden.layers:
            raise MisalignmentError(
                f"{term} compares with the teacher's layer {teacher}, and stream {spec.name!r} carries "
                f"{', '.join(map(str, hidden.layers))}",
                "pair one of those, or capture the stream again with that layer",
            )
        if student != FINAL_NORM and student >= student_layers:
            last = f"layers 0 to {student_layers - 1}" if student_layers else "no decoder layers by number"
            raise ConfigError(
                f"{term} compares the student's layer {student}, and the student has {last}",
                f"pair one that it has, or {FINAL_NORM}",
            )
    return settled


def _parse_layer(text: str, pairs: str) -> Layer:
    name = text.strip()
    if name == FINAL_NORM:
        return FINAL_NORM
    if not (name.isascii() and name.isdigit() and int(name) <= MAX_LAYER):
        raise ConfigError(
            f"layers {pairs!r}: {name!r} is no layer, expected 0 to {MAX_LAYER} or {FINAL_NORM!r}", _HOW
        )
    return int(name)
