"""Where a client looks for its service: servers of one catalog, any of which will do."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from lynearm.wire.errors import InvalidInputError

DEFAULT_TARGET = "127.0.0.1:7411"


@dataclass(frozen=True, slots=True)
class ServiceWords:
    """How messages speak of a service."""

    name: str
    remedy: str
    """What to do when none answers."""


TRACE_SERVICE = ServiceWords(
    "trace service", "start one with `lynearm serve`, or name another with --service"
)
TEACHER_SERVICE = ServiceWords("teacher", "start one with `lynearm teacher serve`, or name another")


def parse_targets(target: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses in what a user wrote.

    Args:
        target: host:port, several of them with commas between, or a sequence of them.

    Raises:
        InvalidInputError: if one is not host:port, or is there twice.
    """
    parts = target.split(",") if isinstance(target, str) else target
    targets = tuple(part.strip() for part in parts)
    for one in targets or ("",):
        host, _, port = one.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise InvalidInputError(f"service {one!r} is not host:port", f"for example {DEFAULT_TARGET}")
    if len(set(targets)) < len(targets):
        raise InvalidInputError(f"service {', '.join(targets)} names an address twice", "name each once")
    return targets


class Endpoints:
    """The addresses of a service, in order of preference, and the one in use.

    Everything that one client does uses the same one: whatever notices first that it is lost moves all.

    Args:
        targets: host:port each; at least one.
        service: What is there.
    """

    def __init__(self, targets: tuple[str, ...], service: ServiceWords = TRACE_SERVICE) -> None:
        self.targets = targets
        self.service = service
        self._index = 0
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self.targets)

    def __str__(self) -> str:
        return " or ".join(self.targets)

    @property
    def current(self) -> str:
        """The address to use."""
        return self.targets[self._index]

    def leave(self, target: str) -> None:
        """Turn to the next address, unless `target` has been left already."""
        with self._guard:
            if self.targets[self._index] == target:
                self._index = (self._index + 1) % len(self.targets)
