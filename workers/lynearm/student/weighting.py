"""How much each completion position counts, by the kind of its span and by its trace's tags."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lynearm.wire.errors import ConfigError
from lynearm.wire.traces import SPAN_KINDS, Float32Array, Trace

OTHER = "other"
"""Positions outside any span."""

_PLACES = (*SPAN_KINDS, OTHER)


@dataclass(frozen=True, slots=True)
class PositionWeighting:
    """Weights by kind of span and by tag; what is not named counts 1.

    Raises:
        ConfigError: naming the kind, tag or weight that cannot be.
    """

    spans: Mapping[str, float] = field(default_factory=dict[str, float])
    """By kind of span, or `OTHER`."""
    tags: Mapping[str, float] = field(default_factory=dict[str, float])
    """By "KEY=VALUE"; those that a trace has are multiplied."""

    def __post_init__(self) -> None:
        """Check every entry."""
        for kind in self.spans:
            if kind not in _PLACES:
                raise ConfigError(
                    f"span_weights: {kind!r} is not known, expected one of {', '.join(_PLACES)}"
                )
        for tag in self.tags:
            if not tag.partition("=")[1]:
                raise ConfigError(
                    f"tag_weights: {tag!r} is no tag", "write KEY=VALUE, for example domain=code"
                )
        for name, weight in {**self.spans, **self.tags}.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"weight of {name} is {weight:g}, expected 0 or more")

    @property
    def is_even(self) -> bool:
        """Whether all positions count alike."""
        return not self.spans and not self.tags

    def total(self, traces: Iterable[Trace], max_sequence_tokens: int) -> float:
        """Weight of all positions of the traces that fit into the length."""
        total = 0.0
        for trace in traces:
            weights_T = self.weigh(trace)[: max(0, max_sequence_tokens - len(trace.prompt_token_ids))]
            total += float(weights_T.sum(dtype=np.float64))
        return total

    def weigh(self, trace: Trace) -> Float32Array:
        """Weight of each completion position, shape [T]."""
        weights_T = np.full(len(trace.completion_token_ids), self.spans.get(OTHER, 1.0), np.float32)
        for span in trace.spans:
            weights_T[span.start : span.end] = self.spans.get(span.kind, 1.0)
        for tag, weight in self.tags.items():
            key, _, value = tag.partition("=")
            if trace.tags.get(key) == value:
                weights_T *= np.float32(weight)
        return weights_T
