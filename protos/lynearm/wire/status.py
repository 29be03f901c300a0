"""Errors as `google.rpc.Status`, the form that gRPC tools of every language read.

A server sends it in trailing metadata, beside the keys of `errors`: an ErrorInfo whose reason is the class
of the error (DRAINING for DrainingError), and a RetryInfo where trying again makes sense. Written and read
by hand: three small messages do not pay for a dependency.
Messages: https://github.com/googleapis/googleapis/blob/master/google/rpc/error_details.proto
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lynearm.wire.errors import ERROR_NAME_METADATA_KEY, REMEDY_METADATA_KEY, LynearmError
from lynearm.wire.fields import bytes_prefix, expect_bytes, expect_int, int_field, read_fields

STATUS_METADATA_KEY = "grpc-status-details-bin"
"""Trailing metadata key that gRPC reserves for an encoded `google.rpc.Status`."""

ERROR_DOMAIN = "lynearm.dev"
"""Says whose reasons they are."""

MAX_TEXT_BYTES = 1000
"""Of a status message and of a remedy. They are sent as up to three times as many bytes, the message twice,
and all must fit into the 8 KiB of a peer's metadata."""

_TYPE_URL = "type.googleapis.com/google.rpc."
_NANOS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class StatusDetails:
    """What a Status says that the gRPC status itself does not."""

    reason: str = ""
    """Name of the error's class; empty when another domain's server sent it."""
    retry_seconds: float | None = None
    """When to try again; None when that is not said."""


def reason_of(error_class: type[LynearmError]) -> str:
    """The reason under which an error travels: STREAM_NOT_FOUND for StreamNotFoundError."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", error_class.__name__.removesuffix("Error")).upper()


def error_name_of(reason: str) -> str:
    """The name of the class behind a reason; the inverse of `reason_of`."""
    return "".join(part.capitalize() for part in reason.split("_")) + "Error" if reason else ""


STATUS_NUMBERS: Mapping[str, int] = {
    "OK": 0,
    "CANCELLED": 1,
    "UNKNOWN": 2,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "OUT_OF_RANGE": 11,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
    "UNAUTHENTICATED": 16,
}
"""The gRPC status codes: https://github.com/grpc/grpc/blob/master/doc/statuscodes.md"""


def shorten(text: str) -> str:
    """A text that fits into a status; lone surrogates, which file names may hold, have no UTF-8."""
    return text.encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def trailing_metadata(error: LynearmError) -> tuple[tuple[str, str | bytes], ...]:
    """What a client needs to raise an error again, beside its status.

    Args:
        error: What a server answers.
    """
    code = STATUS_NUMBERS[error.status_code]
    return (
        (ERROR_NAME_METADATA_KEY, type(error).__name__),
        (REMEDY_METADATA_KEY, shorten(error.remedy).encode()),
        (STATUS_METADATA_KEY, encode_status(code, shorten(error.message), error)),
    )


def encode_status(code: int, message: str, error: LynearmError) -> bytes:
    """A `google.rpc.Status`.

    Args:
        code: Number of the gRPC status code.
        message: The status message, which must be what the gRPC status says too.
        error: Names the reason, and when to try again.
    """
    info = _text(1, reason_of(type(error))) + _text(2, ERROR_DOMAIN)
    details = _any("ErrorInfo", info)
    if error.retry_seconds is not None:
        seconds, nanos = divmod(round(error.retry_seconds * _NANOS), _NANOS)
        details += _any("RetryInfo", _message(1, int_field(1, seconds) + int_field(2, nanos)))
    return int_field(1, code) + _text(2, message) + details


def parse_status(data: bytes) -> StatusDetails:
    """The details of a `google.rpc.Status`; what is of another kind is passed over.

    Raises:
        InvalidInputError: if the bytes are no such message.
    """
    reason, retry_seconds = "", None
    for number, value in read_fields(data):
        if number != 3:
            continue
        kind, body = _parse_any(expect_bytes(number, value))
        if kind == _TYPE_URL + "ErrorInfo":
            reason = _parse_reason(body)
        elif kind == _TYPE_URL + "RetryInfo":
            retry_seconds = _parse_delay(body)
    return StatusDetails(reason, retry_seconds)


def _parse_any(data: memoryview) -> tuple[str, memoryview]:
    fields = dict(read_fields(data))
    kind, body = fields.get(1, memoryview(b"")), fields.get(2, memoryview(b""))
    return str(expect_bytes(1, kind), "utf-8", "replace"), expect_bytes(2, body)


def _parse_reason(data: memoryview) -> str:
    texts = {
        number: str(expect_bytes(number, value), "utf-8", "replace")
        for number, value in read_fields(data)
        if number in (1, 2)
    }
    return error_name_of(texts.get(1, "")) if texts.get(2) == ERROR_DOMAIN else ""


def _parse_delay(data: memoryview) -> float | None:
    for number, value in read_fields(data):
        if number == 1:
            duration = dict(read_fields(expect_bytes(number, value)))
            seconds, nanos = (expect_int(field, duration.get(field, 0)) for field in (1, 2))
            # A negative one is a number of almost 2^64 here, and as good as none.
            return seconds + nanos / _NANOS if max(seconds, nanos) < 1 << 31 else None
    return None


def _any(kind: str, body: bytes) -> bytes:
    return _message(3, _text(1, _TYPE_URL + kind) + _message(2, body))


def _text(number: int, text: str) -> bytes:
    return _message(number, text.encode()) if text else b""


def _message(number: int, body: bytes) -> bytes:
    return bytes_prefix(number, len(body)) + body
