"""Holds publishers back while a consumer is too far behind.

Invariants:

- A block enters when, with it, what lies behind the slowest consumer and what was admitted before it stay
  within the stream's bound; or when nothing at all lies behind that consumer, so that a block larger than the
  bound passes.
- The bound is exact for the publishers of one server. Each further server may be ahead by the blocks that it
  has admitted and not yet committed.
- Nobody waits for a consumer of a stream that is sealed or deleted: the commit then says what is wrong.

What lies behind the consumer is read from the catalog; blocks admitted since are added to it. That errs on
the safe side where a block is counted twice, and before anybody waits it is read anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from lynearm.traces.consumer_records import NO_BOUND, ConsumerCatalog, Lag, LagState

_FRESH_SECONDS = 0.5
"""How long a bound or a cursor that another server changed may stay unnoticed while nobody waits."""

_POLL_SECONDS = 0.25
"""The same while somebody waits. Changes made through this server wake at once."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was read of a stream."""

    state: LagState
    settled: Lag
    """Blocks whose outcome was known before: those admitted beyond may be missing in the state."""
    read_seconds: float


class StreamGate:
    """Where the publishers of one stream wait. They hold it; then it may go. One event loop.

    Args:
        catalog: Knows the bound and the consumers.
        stream_id: The stream.
    """

    def __init__(self, catalog: ConsumerCatalog, stream_id: int) -> None:
        self._catalog = catalog
        self._stream_id = stream_id
        self._changed = asyncio.Event()
        self._admitted = Lag()
        self._settled = Lag()
        """Of the admitted blocks: those that are committed, or never will be."""
        self._seen: _Seen | None = None

    async def enter(self, trace_count: int, on_held: Callable[[LagState], Awaitable[None]]) -> None:
        """Wait until a block may be submitted, and count it; `leave` must follow when its outcome is known.

        Args:
            trace_count: Of the block.
            on_held: Called once if the block must wait, with why: blocks on their way count as behind. May
                raise.
        """
        seen = self._seen
        if seen is None or time.monotonic() - seen.read_seconds >= _FRESH_SECONDS:
            seen = await self._look()
        if not self._has_room(seen, trace_count):
            changed, seen = self._changed, await self._look()
            if not self._has_room(seen, trace_count):
                await on_held(replace(seen.state, lag=self._lag(seen)))
            while not self._has_room(seen, trace_count):
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _POLL_SECONDS)
                changed, seen = self._changed, await self._look()
        # Nothing was awaited since there was room: nobody slipped in between.
        self._admitted = _add(self._admitted, trace_count)

    def leave(self, trace_count: int) -> None:
        """Note that the outcome of a block that entered is known."""
        self._settled = _add(self._settled, trace_count)
        self._wake()

    def forget(self) -> None:
        """Note that the bound or a cursor changed."""
        self._seen = None
        self._wake()

    async def _look(self) -> _Seen:
        settled = self._settled
        state = await self._catalog.read_lag(self._stream_id)
        self._seen = seen = _Seen(state, settled, time.monotonic())
        return seen

    def _has_room(self, seen: _Seen, trace_count: int) -> bool:
        state = seen.state
        if not state.consumer or state.max_lag == NO_BOUND:
            return True
        lag = self._lag(seen)
        return not lag.blocks or (
            _is_within(lag.blocks + 1, state.max_lag.blocks)
            and _is_within(lag.traces + trace_count, state.max_lag.traces)
        )

    def _lag(self, seen: _Seen) -> Lag:
        """What was behind the consumer, and what was admitted since."""
        return Lag(
            seen.state.lag.blocks + self._admitted.blocks - seen.settled.blocks,
            seen.state.lag.traces + self._admitted.traces - seen.settled.traces,
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class LagGates:
    """The gates of the streams that somebody publishes to.

    Args:
        catalog: Knows the bounds and the consumers.
    """

    def __init__(self, catalog: ConsumerCatalog) -> None:
        self._catalog = catalog
        self._gates: WeakValueDictionary[int, StreamGate] = WeakValueDictionary()

    def register(self, stream_id: int) -> StreamGate:
        """The stream's gate."""
        gate = self._gates.get(stream_id)
        if gate is None:
            gate = self._gates[stream_id] = StreamGate(self._catalog, stream_id)
        return gate

    def changed(self, stream_id: int) -> None:
        """Pass on that a stream's bound, or a cursor of one of its consumers, changed."""
        gate = self._gates.get(stream_id)
        if gate is not None:
            gate.forget()


def _add(lag: Lag, trace_count: int) -> Lag:
    return Lag(lag.blocks + 1, lag.traces + trace_count)


def _is_within(count: int, bound: int) -> bool:
    return not bound or count <= bound
