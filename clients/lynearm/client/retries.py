"""What a failed call means, and whether, when and where to try again: the one place that decides it.

A call is tried again when its service went away, is full for now, or is about to stop, and only if that
cannot do its work twice: it is idempotent, or it certainly never began. The waits double, with full jitter,
so that a fleet does not come back all at once; another address is tried before the waits grow.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable
from typing import Protocol, cast

import grpc

from lynearm.client.endpoints import TRACE_SERVICE, Endpoints, ServiceWords
from lynearm.wire.errors import (
    ERROR_NAME_METADATA_KEY,
    REMEDY_METADATA_KEY,
    DeadlineError,
    LynearmError,
    ServiceUnavailableError,
    error_from_status,
)
from lynearm.wire.status import STATUS_METADATA_KEY, StatusDetails, parse_status

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.1
LAST_PAUSE_SECONDS = 5.0
"""Bounds of the waits: what a restart takes at least, and how late a service that is back may be noticed."""


_WORDS_OF_A_BROKEN_CALL = ("RST_STREAM", "Internal error from Core")
"""The second is what grpc.aio makes up when a write fails before it has learnt why the call is over."""


class _Status(Protocol):
    """What sync and aio failures have in common; grpc names no type for it."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


class Retries:
    """The failures of one call, publisher or subscription since its last success.

    Args:
        endpoints: Of the client; one that fails is left for the next.
        patience_seconds: Time without success after which a failure is final, once every address was tried.
        idempotent: Whether doing the call twice does no more than doing it once.
        subject: What waits, for the log; empty logs nothing.
    """

    def __init__(
        self, endpoints: Endpoints, patience_seconds: float, *, idempotent: bool = True, subject: str = ""
    ) -> None:
        self.waiting_reason = ""
        self._endpoints = endpoints
        self._patience_seconds = patience_seconds
        self._idempotent = idempotent
        self._subject = subject
        self._failures = 0
        self._since = 0.0

    def failed(self, failure: grpc.RpcError | ServiceUnavailableError, target: str) -> float:
        """Count a failure, and turn to another address if there is one.

        Args:
            failure: What grpc raised, or what came of a call that just ended.
            target: The address that was tried.

        Returns:
            Seconds to wait before the next try.

        Raises:
            LynearmError: what the failure means, when another try is of no use, or patience is at its end.
        """
        if isinstance(failure, ServiceUnavailableError):
            return self.lost(failure, target)
        if not is_transient(failure):
            raise error_of(failure, target, self._endpoints.service) from failure
        if self._idempotent and _is_own_doing(failure):
            return 0.0
        if not self._idempotent and not _never_began(failure):
            raise _maybe_done(error_of(failure, target, self._endpoints.service)) from failure
        error = error_of(failure, str(self._endpoints), self._endpoints.service)
        return self.lost(error, target, failure)

    def final(self, failure: grpc.RpcError | ServiceUnavailableError, target: str) -> LynearmError:
        """What a failure means that is not to be tried again."""
        if isinstance(failure, ServiceUnavailableError):
            return failure
        return error_of(failure, target, self._endpoints.service)

    def lost(self, error: LynearmError, target: str = "", cause: BaseException | None = None) -> float:
        """As `failed`, of something that is known to be worth another try, with its error."""
        told_seconds = _told_to_wait_seconds(error)
        pause_seconds = told_seconds + self._count(target)
        if self.is_spent or told_seconds > self._patience_seconds:
            raise error from cause
        if self._subject and not self.waiting_reason:
            logger.warning("%s: waiting: %s", self._subject, error.message)
        self.waiting_reason = error.message
        return pause_seconds

    def succeeded(self) -> None:
        """Forget the failures."""
        self._failures = 0
        self.waiting_reason = ""

    @property
    def is_spent(self) -> bool:
        """Whether patience is at its end."""
        every_address_tried = self._failures >= len(self._endpoints)
        return every_address_tried and time.monotonic() - self._since >= self._patience_seconds

    def _count(self, target: str) -> float:
        if not self._failures:
            self._since = time.monotonic()
        doublings = min(self._failures // len(self._endpoints), 16)
        self._failures += 1
        self._endpoints.leave(target)
        return random.uniform(0.0, min(LAST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0**doublings))


def error_of(failure: grpc.RpcError, target: str, service: ServiceWords = TRACE_SERVICE) -> LynearmError:
    """The typed error behind a failed call.

    Args:
        failure: What grpc raised.
        target: Where it was sent, for the message.
        service: What should be there, for the message.
    """
    call = cast("_Status", failure)
    name, details = _error_name(call), call.details() or ""
    if call.code() is grpc.StatusCode.UNAVAILABLE and not name:
        return ServiceUnavailableError(f"no {service.name} answers at {target} ({details})", service.remedy)
    if call.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not name:
        return DeadlineError(
            f"the {service.name} at {target} did not answer in time",
            "give a longer timeout_seconds, or look at the service's log",
        )
    metadata = dict(call.trailing_metadata() or ())
    error = error_from_status(call.code().name, details, name, _text(metadata.get(REMEDY_METADATA_KEY, "")))
    retry_seconds = _status_details(call).retry_seconds
    if retry_seconds is not None:
        error.retry_seconds = retry_seconds
    return error


def is_transient(failure: grpc.RpcError) -> bool:
    """Whether the same call may succeed once the service is back, or has room again."""
    call = cast("_Status", failure)
    if call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return True
    if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # The service says so where waiting helps: a full disk, a rate, too many calls at a time.
        return _status_details(call).retry_seconds is not None
    # A server that is stopped or killed may also reset the stream, which gRPC reports in these two.
    is_vague = call.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    has_broken_off = any(words in (call.details() or "") for words in _WORDS_OF_A_BROKEN_CALL)
    return is_vague and has_broken_off and not _error_name(call)


def is_deadline(failure: grpc.RpcError) -> bool:
    """Whether the call ran out of time."""
    return cast("_Status", failure).code() is grpc.StatusCode.DEADLINE_EXCEEDED


def not_ready(endpoints: Endpoints, timeout_seconds: float) -> ServiceUnavailableError:
    """What waiting for a service ends with."""
    return ServiceUnavailableError(
        f"no {endpoints.service.name} answers at {endpoints} after {timeout_seconds:g} s",
        endpoints.service.remedy,
    )


def client_closed(what: str) -> ServiceUnavailableError:
    """What ends that belonged to a client that was closed."""
    return ServiceUnavailableError(f"{what}: its client was closed", "close what a client made before it")


def service_hung_up(target: str, service: ServiceWords = TRACE_SERVICE) -> ServiceUnavailableError:
    """What a call means that the service ended without a reason, or never opened."""
    return ServiceUnavailableError(
        f"the {service.name} at {target} did not go on with the call", f"look at the {service.name}'s log"
    )


def _is_own_doing(failure: grpc.RpcError) -> bool:
    # Channels are closed before a fork; grpc has no other sign of it than these words.
    call = cast("_Status", failure)
    return call.code() is grpc.StatusCode.CANCELLED and "Channel closed!" in (call.details() or "")


def _told_to_wait_seconds(error: LynearmError) -> float:
    # In place of a server that is away or stopping, another may take the call at once.
    return 0.0 if isinstance(error, ServiceUnavailableError) else error.retry_seconds or 0.0


def _never_began(failure: grpc.RpcError) -> bool:
    call = cast("_Status", failure)
    # The server said so itself, or there was no connection. gRPC has no code for the latter: if its words
    # change, a call is not tried again that could have been.
    return bool(_error_name(call)) or "failed to connect" in (call.details() or "").lower()


def _maybe_done(error: LynearmError) -> LynearmError:
    return ServiceUnavailableError(
        f"the call broke off, and may or may not have been carried out: {error.message}",
        "look at what is there before you call again",
    )


def _error_name(call: _Status) -> str:
    named = next((_text(v) for k, v in call.trailing_metadata() or () if k == ERROR_NAME_METADATA_KEY), "")
    return named or _status_details(call).reason


def _status_details(call: _Status) -> StatusDetails:
    encoded = next(
        (value for key, value in call.trailing_metadata() or () if key == STATUS_METADATA_KEY), b""
    )
    try:
        return parse_status(encoded if isinstance(encoded, bytes) else b"")
    except LynearmError:
        return StatusDetails()  # written by something on the way, such as a proxy


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
