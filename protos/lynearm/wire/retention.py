"""How long a stream keeps its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.wire.errors import InvalidInputError

_LIMIT = 1 << 53
"""Far beyond any stream, and exact in every database and language."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What lets the oldest blocks of a stream go; a block goes as soon as one bound says so.

    Raises:
        InvalidInputError: if a bound is negative or absurdly large.
    """

    max_age_seconds: int = 0
    """Blocks committed longer ago go; 0: no bound."""

    max_bytes: int = 0
    """The oldest blocks go while all together are larger, but never the newest one; 0: no bound."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name, value in (("max_age_seconds", self.max_age_seconds), ("max_bytes", self.max_bytes)):
            if not 0 <= value <= _LIMIT:
                raise InvalidInputError(
                    f"retention: {name} is {value}, expected 0 to {_LIMIT}", "0 stands for no bound"
                )

    @property
    def is_bounded(self) -> bool:
        """Whether any block may ever go."""
        return bool(self.max_age_seconds or self.max_bytes)
