"""The call on whose behalf code runs: who makes it, what it is about, and how it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeAlias

from lynearm.traces.tail import StreamTail
from lynearm.traces.tokens import Caller

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is about."""

    stream: str
    producer_id: str = ""
    """Empty for those who do not publish."""


@dataclass(slots=True, eq=False)
class Call:
    """A call that is being served."""

    method: str
    """Full name: /package.Service/Method."""
    is_long: bool = False
    """Whether requests or responses are many."""
    metadata: Metadata = field(default=(), repr=False)
    """That came with it; may hold a token."""
    caller: Caller | None = None
    """None until it is known, and where it stays unknown."""
    target: Target | None = None
    """None until the request is there, and for methods on no single stream."""
    tail: StreamTail | None = None
    """End of the stream that it reads."""
    sent_offset: int | None = None
    """Offset of the block that a subscriber got last."""
    received_bytes: int = 0
    sent_bytes: int = 0
    status: str = "OK"
    """Name of the gRPC status code with which it ends."""
    reason: str = ""
    """Why it ends, as `wire.status.reason_of` names an error."""
    trace_id: str = ""
    """Of its OpenTelemetry trace, hexadecimal; empty without tracing."""
    begun_seconds: float = field(default_factory=time.monotonic)

    @property
    def elapsed_seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.begun_seconds

    @property
    def stream(self) -> str:
        """Name of the stream that it is about; empty where there is none."""
        return "" if self.target is None else self.target.stream


_CURRENT: ContextVar[Call] = ContextVar("call")


def begin_call(call: Call) -> None:
    """Make a call the current one of this task, and of those that it starts."""
    _CURRENT.set(call)


def current_call() -> Call | None:
    """The call on whose behalf this code runs; None outside of any."""
    return _CURRENT.get(None)


def may_consume(stream: str) -> bool:
    """Whether the current call's caller may read a stream; False outside of any call."""
    call = current_call()
    return call is not None and call.caller is not None and call.caller.may("consume", stream)


def note_end(status: str, reason: str) -> None:
    """Note with what the current call ends."""
    call = current_call()
    if call is not None:
        call.status, call.reason = status, reason


def note_tail(tail: StreamTail) -> None:
    """Note the end of the stream that the current call reads."""
    call = current_call()
    if call is not None:
        call.tail = tail
