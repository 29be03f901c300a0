"""A call with one answer, as data: what it sends, and what its answer means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import Message

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class UnaryCall(Generic[Result]):
    """A call with one answer. Each may be sent again without knowing what became of the first."""

    method: str
    """Of the service, as its proto names it."""
    request: Message
    answer: type[Message]
    """Class of its response."""
    # Any: a class of messages and what reads them cannot be tied together without naming each in the clients.
    read: Callable[[Any], Result]
    """What the answer means."""


class SendCall(Protocol):
    """Sends calls; what a client offers to those who make them."""

    def __call__(self, call: UnaryCall[Result], /) -> Result:
        """What the answer means; raises the typed error behind a failure."""
        ...
