"""What a trainer and its rollout process tell each other: one JSON object a line, over pipes.

A line that ends early, since its writer was killed, is no message. The trainer's end of the pipe closes with
the trainer, however it ends, and the rollout process ends then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, cast

from lynearm.wire.errors import InternalError


@dataclass(frozen=True, slots=True)
class Weights:
    """To the process: newer weights lie ready."""

    directory: str
    step: int
    """Steps that made them."""


@dataclass(frozen=True, slots=True)
class Taken:
    """To the process: how far the trainer is."""

    step: int
    """Steps done."""
    traces: int
    """Traces of the rollout stream that were trained on or passed over since the process was started."""
    stale: int = 0
    """Of these, passed over."""


@dataclass(frozen=True, slots=True)
class Stop:
    """To the process: end, once what is scored is published."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """From the process: it writes with these weights."""

    step: int
    error: float
    """Largest difference between its logprobs and the trainer's, nats."""


@dataclass(frozen=True, slots=True)
class Status:
    """From the process: how it goes. Counts are since it was started."""

    activity: str = "loading"
    """For people: what it does, or what it waits for."""
    rollouts: int = 0
    """Scored and in the stream."""
    tokens: int = 0
    """Written by the student."""
    tokens_per_second: float = 0.0
    """Written, over the time in which the engine had work."""
    scored_tokens: int = 0
    """Answered by the teacher: what is paid for."""
    divergence: float | None = None
    """Mean of log q − log p over the tokens of the last rollouts, nats: an estimate of the reverse KL on the
    student's own text, unbiased where it was drawn at temperature 1. None before the first."""
    waiting_teacher_seconds: float = 0.0
    """With a wave that the teacher has no time for yet."""
    waiting_trainer_seconds: float = 0.0
    """Without room, or with weights too old to write with."""


@dataclass(frozen=True, slots=True)
class Failed:
    """From the process: why it ends."""

    error: str
    """Name of the class."""
    message: str
    remedy: str
    is_lasting: bool
    """Whether another process would come to the same."""


Message: TypeAlias = Weights | Taken | Stop | Loaded | Status | Failed
_KINDS: Mapping[str, type[Message]] = {
    kind.__name__: kind for kind in (Weights, Taken, Stop, Loaded, Status, Failed)
}


def encode_message(message: Message) -> bytes:
    """A line."""
    return (json.dumps({"kind": type(message).__name__, **asdict(message)}) + "\n").encode()


def decode_message(line: bytes) -> Message | None:
    """The message in a line; None for a line that was not written to its end.

    Raises:
        InternalError: if it is a whole line, and no message.
    """
    if not line.endswith(b"\n"):
        return None
    try:
        values = cast("dict[str, Any]", json.loads(line))
        return _KINDS[values.pop("kind")](**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InternalError(f"between trainer and rollout process: {line[:200]!r} is no message") from error
