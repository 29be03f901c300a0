"""How long a stream keeps its blocks, and what is let go of."""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.wire.errors import InvalidInputError
from lynearm.wire.specs import check_name

MAX_CONSUMERS = 16
"""Names in one retention."""

_LIMIT = 1 << 53
"""Far beyond any stream, and exact in every database and language."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What lets the oldest blocks of a stream go; a block goes as soon as one bound says so.

    Raises:
        InvalidInputError: if a bound is negative or absurdly large, or a name cannot be a consumer's.
    """

    max_age_seconds: int = 0
    """Blocks committed longer ago go; 0: no bound."""

    max_bytes: int = 0
    """The oldest blocks go while all together are larger, but never the newest one; 0: no bound."""

    consumers: tuple[str, ...] = ()
    """Blocks go that all of these have read, as far as their stored cursors say; empty: no bound. One that
    has stored no cursor holds every block."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name, value in (("max_age_seconds", self.max_age_seconds), ("max_bytes", self.max_bytes)):
            if not 0 <= value <= _LIMIT:
                raise InvalidInputError(
                    f"retention: {name} is {value}, expected 0 to {_LIMIT}", "0 stands for no bound"
                )

        for name in self.consumers:
            check_name(name, what="consumer name")
        if len(self.consumers) > MAX_CONSUMERS:
            raise InvalidInputError(
                f"retention names {len(self.consumers)} consumers, expected at most {MAX_CONSUMERS}",
                "name those that are behind the others",
            )

    @property
    def is_bounded(self) -> bool:
        """Whether any block may ever go."""
        return bool(self.max_age_seconds or self.max_bytes or self.consumers)


@dataclass(frozen=True, slots=True)
class Collected:
    """What one pass of a service's collector let go of."""

    expired_blocks: int = 0
    """Blocks that streams need not keep any more."""
    expired_bytes: int = 0
    orphan_objects: int = 0
    """Objects of which nothing was ever committed: what servers that died had begun."""
