"""How a low-rank adapter is written in a configuration. Loads no torch.

NAME=VALUE,…        r=16,alpha=32        r=8,alpha=16,dropout=0.05,targets=q_proj+v_proj
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from lynearm.wire.errors import ConfigError

ALL_LINEAR = "all-linear"
OUTSIDE = ("lm_head", "embed_tokens")
"""What the loss applies by itself, or may be tied to it: no adapter goes there."""

_HOW = "write it like r=16,alpha=32,targets=q_proj+v_proj,dropout=0.05; all have defaults"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A low-rank adapter: W + alpha/r · B A (Hu et al., LoRA, arXiv:2106.09685).

    Raises:
        ConfigError: if a value is out of range.
    """

    r: int = 16
    """Rank of the change to each matrix."""
    alpha: float = 32.0
    """The change is multiplied by alpha/r."""
    dropout: float = 0.0
    """On what goes into A; none, since one pass over fresh data does not overfit."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of the linear layers that get one; "all-linear" is every one of the decoder."""

    def __post_init__(self) -> None:
        """Check every value."""
        fits = self.r >= 1 and 0 < self.alpha < math.inf and 0 <= self.dropout < 1 and all(self.targets)
        if not fits:
            raise ConfigError(
                f"lora {format_lora(self)!r}, expected r from 1, alpha above 0, dropout from 0 to below 1",
                _HOW,
            )
        for name in self.targets:
            if name.rpartition(".")[2] in OUTSIDE:
                raise ConfigError(
                    f"lora targets {name}, which adapters leave as it is: the loss applies the output head "
                    "by itself, and the embeddings may be tied to it",
                    f"name linear layers of the decoder, or {ALL_LINEAR}",
                )
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            raise ConfigError(f"lora targets {'+'.join(self.targets)}", f"{ALL_LINEAR} has them all already")


def parse_lora(text: str) -> LoraSettings:
    """Settings as they are written in a configuration; "default" means all defaults.

    Raises:
        ConfigError: if it is not of that form.
    """
    readers: dict[str, Callable[[str], Any]] = {
        "r": int,
        "alpha": float,
        "dropout": float,
        "targets": lambda names: tuple(names.split("+")),
    }
    given: dict[str, Any] = {}
    for part in text.split(",") if text != "default" else ():
        name, separator, value = (word.strip() for word in part.partition("="))
        if not separator or name not in readers or name in given:
            raise ConfigError(f"lora {text!r}: {part!r} is none of {', '.join(readers)} with a value", _HOW)
        try:
            given[name] = readers[name](value)
        except ValueError as error:
            raise ConfigError(f"lora {text!r}: {name} is {value!r}, expected a number", _HOW) from error
    return LoraSettings(**given)


def format_lora(settings: LoraSettings) -> str:
    """As `parse_lora` reads them."""
    values = asdict(settings) | {"alpha": f"{settings.alpha:g}", "targets": "+".join(settings.targets)}
    return ",".join(f"{field.name}={values[field.name]}" for field in fields(settings))
