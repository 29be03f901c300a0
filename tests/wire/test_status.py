"""google.rpc.Status, written and read by hand, against Google's own generated code."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynearm.wire.errors import InvalidInputError, RateLimitedError, StreamNotFoundError
from lynearm.wire.status import StatusDetails, encode_status, parse_status

status_pb2 = pytest.importorskip("google.rpc.status_pb2", reason="comes with googleapis-common-protos")
details_pb2 = pytest.importorskip("google.rpc.error_details_pb2", reason="comes with the same package")


def test_google_reads_what_is_written() -> None:
    error = RateLimitedError("too fast", "slow down")
    error.retry_seconds = 2.25
    status = status_pb2.Status.FromString(encode_status(8, "too fast: ü", error))
    assert (status.code, status.message) == (8, "too fast: ü")
    info, retry = details_pb2.ErrorInfo(), details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain) == ("RATE_LIMITED", "lynearm.dev")
    assert retry.retry_delay.ToTimedelta().total_seconds() == 2.25


def test_no_retry_is_promised_where_none_helps() -> None:
    encoded = encode_status(5, "no such stream", StreamNotFoundError("no such stream"))
    assert len(status_pb2.Status.FromString(encoded).details) == 1
    assert parse_status(encoded) == StatusDetails("StreamNotFoundError", None)


def test_what_google_writes_is_read() -> None:
    status = status_pb2.Status(code=8, message="x")
    # A detail of a kind that nobody here knows comes first.
    status.details.add().Pack(details_pb2.DebugInfo(detail="y"))
    status.details.add().Pack(
        details_pb2.ErrorInfo(reason="RATE_LIMITED", domain="lynearm.dev", metadata={"a": "b"})
    )
    retry = details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    status.details.add().Pack(retry)
    assert parse_status(status.SerializeToString()) == StatusDetails("RateLimitedError", 1.5)


def test_a_reason_of_another_domain_is_not_ours() -> None:
    status = status_pb2.Status(code=8)
    status.details.add().Pack(details_pb2.ErrorInfo(reason="RATE_LIMITED", domain="example.org"))
    assert parse_status(status.SerializeToString()) == StatusDetails()


def test_a_negative_delay_is_none() -> None:
    status, retry = status_pb2.Status(), details_pb2.RetryInfo()
    retry.retry_delay.seconds = -1
    status.details.add().Pack(retry)
    assert parse_status(status.SerializeToString()).retry_seconds is None


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(InvalidInputError):
        assert isinstance(parse_status(data), StatusDetails)
