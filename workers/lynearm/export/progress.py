"""What an export says while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ExportProgress:
    """A stage of an export that begins."""

    stage: str
    """For people, for example "quantising"."""
    fraction: float
    """Of the whole export, done before this stage; 0 to 1."""


OnProgress: TypeAlias = Callable[[ExportProgress], None]


def ignore_progress(_: ExportProgress) -> None:
    """For exports that nobody watches."""
