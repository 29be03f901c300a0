"""Consumers and lag bounds as catalogs know them.

Invariants of every catalog: a stored cursor lies in its stream, and never moves backwards unless somebody
asks for that in so many words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lynearm.wire.errors import ConsumerNotFoundError
from lynearm.wire.traces import Cursor

MAX_CONSUMERS = 1000
"""Of one stream. Each is a reader that somebody named, not a connection."""


@dataclass(frozen=True, slots=True)
class MaxLag:
    """How far publishers may run ahead of the slowest consumer."""

    blocks: int = 0
    """0: no bound."""
    traces: int = 0
    """0: no bound."""


NO_BOUND = MaxLag()


@dataclass(frozen=True, slots=True)
class Lag:
    """What lies between a cursor and the end of its stream."""

    blocks: int = 0
    """One that is used in part counts."""
    traces: int = 0
    size_bytes: int = 0
    """Of those blocks; one that is used in part counts whole."""


@dataclass(frozen=True, slots=True)
class ConsumerRecord:
    """A consumer and how far it is."""

    stream_name: str
    name: str
    cursor: Cursor
    lag: Lag
    updated_unix_nano: int


@dataclass(frozen=True, slots=True)
class LagState:
    """What a stream's publishers must know of its consumers."""

    max_lag: MaxLag
    consumer: str
    """The slowest; empty where there is none."""
    lag: Lag
    """Of that consumer; nothing without a bound, since counting costs."""


class ConsumerCatalog(Protocol):
    """Stored cursors and lag bounds. A part of every `Catalog`."""

    async def set_max_lag(self, stream_name: str, max_lag: MaxLag) -> None:
        """Bound the lag of a stream, or with zeros let it grow.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        ...

    async def read_lag(self, stream_id: int) -> LagState:
        """The bound of a stream and its slowest consumer; no bound where it was sealed or deleted."""
        ...

    async def commit_cursor(
        self, stream_name: str, consumer: str, cursor: Cursor, *, allow_backwards: bool
    ) -> ConsumerRecord:
        """Store a cursor; durable on return. The first one makes the consumer.

        Raises:
            StreamNotFoundError: there is no such stream.
            OffsetNotFoundError: the cursor lies beyond the stream.
            CursorBackwardsError: the stored one is further, and `allow_backwards` is False.
            PreconditionError: the stream has as many consumers as it may.
        """
        ...

    async def get_consumer(self, stream_name: str, consumer: str) -> ConsumerRecord:
        """Describe a consumer.

        Raises:
            StreamNotFoundError, ConsumerNotFoundError: there is no such stream or consumer.
        """
        ...

    async def list_consumers(self, stream_name: str) -> list[ConsumerRecord]:
        """The consumers of a stream, ascending by name.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        ...

    async def delete_consumer(self, stream_name: str, consumer: str) -> None:
        """Forget a consumer.

        Raises:
            StreamNotFoundError, ConsumerNotFoundError: there is no such stream or consumer.
        """
        ...


def consumer_not_found(stream_name: str, consumer: str) -> ConsumerNotFoundError:
    """The error of every catalog for a consumer that it does not know."""
    return ConsumerNotFoundError(
        f"stream {stream_name!r} has no consumer {consumer[:140]!r}", "store a cursor under that name first"
    )
