"""Which permission each method asks for, and on which stream. What is not in the table is denied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lynearm.traces.current_call import Target
from lynearm.traces.servicer import SERVICE_NAME
from lynearm.traces.tokens import Caller, Permission
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import AccessDeniedError, InvalidInputError
from lynearm.wire.fields import read_fields
from lynearm.wire.frames import PublishOpen, parse_publish_request

OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})
"""Services that answer anybody: a load balancer has no token."""


# Any: each function takes the request of its own method; for Publish, bytes.
_TargetOf = Callable[[Any], Target]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method asks of its caller."""

    permissions: tuple[Permission, ...]
    """Any one of them is enough."""
    target: _TargetOf | None
    """What a request, or the first message of several, is about; None for a method on no single stream, which
    the permission on any stream opens, and which must look itself at what it shows."""
    is_metered: bool = False
    """The bytes of its messages count against the caller's rate."""
    read_offset: Callable[[bytes], int] | None = None
    """Offset of the block in a response, which shows how far a subscriber is."""


def _name(request: Any) -> Target:
    return Target(request.name)


def _stream(request: Any) -> Target:
    return Target(request.stream)


def _publish_opening(message: bytes) -> Target:
    opening = parse_publish_request(message)
    if not isinstance(opening, PublishOpen):
        raise InvalidInputError("Publish must begin with an open", "send PublishRequest.open first")
    return Target(opening.stream, opening.producer_id)


def _subscribe_opening(message: pb.SubscribeRequest) -> Target:
    if message.WhichOneof("message") != "open":
        raise InvalidInputError("Subscribe must begin with an open", "send SubscribeRequest.open first")
    return Target(message.open.stream)


def _sent_offset(message: bytes) -> int:
    # Field 1 of SubscribeResponse, which comes first; absent where it is 0.
    number, value = next(iter(read_fields(message)), (0, 0))
    return value if number == 1 and isinstance(value, int) else 0


# A teacher makes, looks at, fills and seals its stream, hands out its prompts among its workers, asks which
# are finished, and sees which consumers hold it back.
_TRACE_RULES: Mapping[str, Rule] = {
    "CreateStream": Rule(("publish",), lambda request: Target(request.spec.name)),
    "GetStream": Rule(("publish", "consume"), _name),
    "ListStreams": Rule(("consume",), None),
    "DeleteStream": Rule(("admin",), _name),
    "SealStream": Rule(("publish",), _name),
    "UpdateRetention": Rule(("admin",), _name),
    "CollectGarbage": Rule(("admin",), None),
    "Publish": Rule(("publish",), _publish_opening, is_metered=True),
    "Subscribe": Rule(("consume",), _subscribe_opening, read_offset=_sent_offset),
    "FetchBlocks": Rule(("consume",), _stream),
    "ListFinishedPrompts": Rule(("publish", "consume"), _stream),
    "PutDictionary": Rule(("publish",), _stream),
    "GetDictionary": Rule(("publish", "consume"), _stream),
    "PutAttachment": Rule(("publish",), _stream),
    "GetAttachment": Rule(("publish", "consume"), _stream),
    "ListAttachments": Rule(("publish", "consume"), _stream),
    "ConfigureStream": Rule(("publish", "admin"), _name),
    "CreateJob": Rule(("publish",), _stream),
    "AddPrompts": Rule(("publish",), _stream),
    "GetJob": Rule(("publish", "consume"), _stream),
    "ListJobs": Rule(("publish", "consume"), _stream),
    "CancelJob": Rule(("publish",), _stream),
    "LeasePrompts": Rule(("publish",), _stream),
    "RenewLeases": Rule(("publish",), _stream),
    "ReleaseLeases": Rule(("publish",), _stream),
    "FailPrompts": Rule(("publish",), _stream),
    "ListFailedPrompts": Rule(("publish", "consume"), _stream),
    "LocatePrompts": Rule(("publish", "consume"), _stream),
    "CommitCursor": Rule(("consume",), _stream),
    "GetConsumer": Rule(("consume", "publish"), _stream),
    "ListConsumers": Rule(("consume", "publish"), _stream),
    "DeleteConsumer": Rule(("consume", "admin"), _stream),
}

RULES: Mapping[str, Rule] = {
    **{f"/{SERVICE_NAME}/{method}": rule for method, rule in _TRACE_RULES.items()},
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(("admin",), None),
}
"""By full name of the method."""


def is_open(method: str) -> bool:
    """Whether a method, by its full name, answers anybody."""
    return method.rpartition("/")[0].lstrip("/") in OPEN_SERVICES


def check_caller(caller: Caller, method: str) -> Rule:
    """The rule of a method that the caller may use on some stream.

    Raises:
        AccessDeniedError: if it may not, or the table does not name the method.
    """
    rule = RULES.get(method)
    if rule is None or not any(caller.may(permission) for permission in rule.permissions):
        needed = "admin" if rule is None else " or ".join(rule.permissions)
        raise AccessDeniedError(
            f"{caller.name!r} may not call {method[:140]}",
            f"ask whoever runs the service for a token with a scope of {needed}",
        )
    return rule


def check_target(caller: Caller, rule: Rule, target: Target) -> None:
    """Let a caller work on a stream. Says the same whether the stream exists or not.

    Raises:
        AccessDeniedError: if it may not.
    """
    if not any(caller.may(permission, target.stream) for permission in rule.permissions):
        wanted = " or ".join(f"{permission}:{target.stream[:140]}" for permission in rule.permissions)
        raise AccessDeniedError(
            f"{caller.name!r} has no permission to {' or '.join(rule.permissions)} "
            f"on stream {target.stream[:140]!r}",
            f"ask whoever runs the service for a token with the scope {wanted}",
        )
