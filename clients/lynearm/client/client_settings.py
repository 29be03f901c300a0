"""What both clients are made with, and how they travel to other processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from lynearm.client.credentials import Credentials
from lynearm.client.endpoints import DEFAULT_TARGET, TRACE_SERVICE, Endpoints, ServiceWords, parse_targets
from lynearm.client.retries import Retries

SHORT_PATIENCE_SECONDS = 1.0
"""How long a single call bridges a hiccup; a person at a keyboard waits no longer for bad news."""

DEFAULT_TIMEOUT_SECONDS = 30.0
"""Deadline of a single call, tries and waits included."""


class ClientSettings:
    """A client of one service, sync or async; holds no connection.

    A copy by pickle has the same settings and connects by itself. It reads credentials that were not given
    from the environment of its own process, so that no pickle holds a token which its sender never named.
    """

    service: ClassVar[ServiceWords] = TRACE_SERVICE
    """What it is a client of."""

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        patience_seconds: float = math.inf,
        credentials: Credentials | None = None,
    ) -> None:
        self._endpoints = Endpoints(parse_targets(target), self.service)
        self._given_credentials = credentials
        self._credentials = Credentials.from_environment() if credentials is None else credentials
        for one in self._endpoints.targets:
            self._credentials.check_target(one)
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds

    @property
    def target(self) -> str:
        """Where the service is: host:port, several with commas between."""
        return ",".join(self._endpoints.targets)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r})"

    # Any: what pickle is told has no type that could be written down.
    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings alone."""
        return _make, (type(self), self._endpoints.targets, self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "timeout_seconds": self._timeout_seconds,
            "patience_seconds": self._patience_seconds,
            "credentials": self._given_credentials,
        }

    def _long_retries(self, subject: str) -> Retries:
        return Retries(self._endpoints, self._patience_seconds, subject=subject)

    def _short_retries(self, *, idempotent: bool = True) -> Retries:
        patience_seconds = min(SHORT_PATIENCE_SECONDS, self._patience_seconds)
        return Retries(self._endpoints, patience_seconds, idempotent=idempotent)

    def _ready_retries(self, timeout_seconds: float) -> Retries:
        return Retries(self._endpoints, timeout_seconds)

    def _deadline_seconds(self, timeout_seconds: float | None) -> float:
        return self._timeout_seconds if timeout_seconds is None else timeout_seconds


def _make(cls: type[ClientSettings], targets: tuple[str, ...], options: dict[str, Any]) -> ClientSettings:
    return cls(targets, **options)
