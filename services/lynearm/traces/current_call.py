"""The call on whose behalf code runs: who makes it, and what it is about."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from lynearm.traces.tokens import Caller


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is about."""

    stream: str
    producer_id: str = ""
    """Empty for those who do not publish."""


@dataclass(slots=True)
class Call:
    """A call that is being served."""

    method: str
    """Full name: /package.Service/Method."""
    caller: Caller
    target: Target | None = None
    """None until the request is there, and for methods on no single stream."""


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
    return call is not None and call.caller.may("consume", stream)
