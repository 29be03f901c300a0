"""What can be asked of a cut. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.wire.errors import ConfigError

CHOICES = ("measured", "influence", "evenly")


@dataclass(frozen=True, slots=True)
class CutConfig:
    """How much of a teacher is kept. 0, and an empty tuple, keep all that it has.

    Raises:
        ConfigError: if it asks for nothing, or contradicts itself.
    """

    layers: int = 0
    """How many to keep, chosen as `choose` says."""

    keep: tuple[int, ...] = ()
    """Which to keep, counted from 0, instead of `layers`."""

    choose: str = "measured"
    """"measured" leaves out one layer after the other, always the one whose loss raises the KL to the teacher
    least; "influence" those of lowest block influence; "evenly" keeps the first, the last, and others at even
    distances."""

    kv_heads: int = 0
    """Key-value heads of each layer; each keeps its own query heads, unless `heads` says how many."""

    heads: int = 0
    """Query heads of each layer, evenly over the key-value heads that are kept."""

    neurons: int = 0
    """Of each layer's feed-forward network."""

    hidden_size: int = 0
    """Channels of the residual stream, the same for all layers."""

    def __post_init__(self) -> None:
        """Check what can be checked without the teacher."""
        for name in ("layers", "kv_heads", "heads", "neurons", "hidden_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more, or 0 for all")
        if self.choose not in CHOICES:
            raise ConfigError(f"choose is {self.choose!r}, expected one of {', '.join(CHOICES)}")
        if self.layers and self.keep:
            raise ConfigError(
                f"layers is {self.layers} and keep names {len(self.keep)}", "give the number or the layers"
            )
        if not (self.layers or self.keep or self.narrows):
            raise ConfigError(
                "a cut that keeps everything", "give layers, keep, heads, kv_heads, neurons or hidden_size"
            )

    @property
    def narrows(self) -> bool:
        """Whether it asks for less than a layer's whole width."""
        return bool(self.kv_heads or self.heads or self.neurons or self.hidden_size)
