"""What of a student stays as it is, named by patterns.

    embeddings          token embeddings; of a tied model the output head too, which is the same matrix
    head                output head
    norms               the weights of all norms
    layers.3            a decoder layer, counted from 0
    layers.0-9          decoder layers, the last included
    *.mlp.*             parameters by name, with the wildcards of a shell; any other pattern with * ? or [

Frozen parameters get no gradient and no optimizer state; what comes before the first one that is trained
costs no backward pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, cast

from lynearm.wire.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lynearm.student.model import StudentModel

_NAMES = ("embeddings", "head", "norms")
_LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")
_HOW = "name embeddings, head, norms, layers.3, layers.0-9, or parameters like *.mlp.*"


def parse_patterns(texts: Sequence[str]) -> tuple[str, ...]:
    """Patterns one by one; several may stand in one text with commas between.

    Raises:
        ConfigError: if one is no pattern.
    """
    patterns = tuple(part.strip() for text in texts for part in text.split(","))
    for pattern in patterns:
        layers = _LAYERS.fullmatch(pattern)
        backwards = layers is not None and layers[2] is not None and int(layers[2]) < int(layers[1])
        if backwards or not (layers or pattern in _NAMES or _is_wild(pattern)):
            raise ConfigError(f"freeze {pattern!r} is nothing that a student has", _HOW)
    return patterns


def freeze(student: StudentModel, texts: Sequence[str]) -> None:
    """Leave the parameters that the patterns name as they are.

    Raises:
        ConfigError: if a pattern names nothing that the student has, or nothing is left to train.
    """
    for pattern in parse_patterns(texts):
        parameters = _find(student, pattern)
        if not parameters:
            raise ConfigError(f"freeze {pattern!r}: the student has no such parameters", _HOW)
        for parameter in parameters:
            parameter.requires_grad_(False)
    if texts and not student.trainable_parameters():
        raise ConfigError(f"freeze {', '.join(texts)} leaves nothing to train", "freeze less")


def _find(student: StudentModel, pattern: str) -> list[nn.Parameter]:
    if pattern in ("embeddings", "head"):
        find = "get_input_embeddings" if pattern == "embeddings" else "get_output_embeddings"
        return list(getattr(student.model, find)().parameters())
    if pattern == "norms":
        modules = cast("Iterable[nn.Module]", student.model.modules())
        norms = [module for module in modules if type(module).__name__.endswith("Norm")]
        return [parameter for norm in norms for parameter in norm.parameters()]
    if (layers := _LAYERS.fullmatch(pattern)) is not None:
        first, last = int(layers[1]), int(layers[2] or layers[1])
        if last >= len(student.decoder_layers):
            raise ConfigError(
                f"freeze {pattern!r}: the student has layers 0 to {len(student.decoder_layers) - 1}", _HOW
            )
        return [
            parameter
            for layer in student.decoder_layers[first : last + 1]
            for parameter in layer.parameters()
        ]
    return [parameter for name, parameter in student.named_parameters() if fnmatchcase(name, pattern)]


def _is_wild(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")
