"""What those who make calls need of a client, sync or async."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol, TypeVar

from lynearm.client.calls import Call

Result = TypeVar("Result")


class SendCall(Protocol):
    """Sends calls; what `TraceClient` offers."""

    def __call__(self, call: Call[Result], /) -> Result:
        """What the answer means; raises the typed error behind a failure."""
        ...


class AsyncSendCall(Protocol):
    """Sends calls; what `AsyncTraceClient` offers."""

    def __call__(self, call: Call[Result], /) -> Awaitable[Result]:
        """What the answer means; raises the typed error behind a failure."""
        ...
