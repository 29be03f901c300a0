"""What one caller may take, and what it hears when it wants more."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from pathlib import Path
from typing import cast

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces.certificates import TokenFile
from traces.harness import (
    LoopThread,
    Producer,
    Reader,
    StartServer,
    code,
    create,
    error_name,
    make_block,
    make_spec,
    publish,
)

from lynearm.client import Credentials, TraceClient
from lynearm.client.credentials import open_channel
from lynearm.traces.config import ServeConfig
from lynearm.traces.limits import MAX_HOLD_SECONDS, CallerLimits, CallerQuota, TokenBucket
from lynearm.traces.server import MAX_MESSAGE_BYTES
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.errors import ConfigError, LimitError, RateLimitedError, StreamLimitError
from lynearm.wire.status import STATUS_METADATA_KEY, StatusDetails, parse_status


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def status_details(error: grpc.RpcError) -> StatusDetails:
    metadata = dict(cast("grpc.Call", error).trailing_metadata() or ())
    value = metadata[STATUS_METADATA_KEY]
    assert isinstance(value, bytes)
    return parse_status(value)


@given(
    st.floats(0.01, 1e6),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 100)), max_size=30),
)
def test_a_bucket_never_gives_more_than_its_rate_and_a_second_of_slack(
    per_second: float, steps: list[tuple[float, float]]
) -> None:
    clock = Clock()
    bucket, taken, start = TokenBucket(per_second, clock), 0.0, clock.seconds
    for pause, amount in steps:
        clock.seconds += pause
        if bucket.wait_seconds() > 0:
            clock.seconds += bucket.wait_seconds()
        allowed = max(1.0, per_second) + (clock.seconds - start) * per_second
        # What was taken before this step; a single amount may be larger than a second's worth.
        assert taken <= allowed * (1 + 1e-6) + 1e-6
        bucket.take(amount)
        taken += amount


@pytest.mark.parametrize(
    "field",
    [
        *("max_connections", "max_calls_per_caller", "requests_per_second", "publish_bytes_per_second"),
        *("max_streams", "metrics_port", "drain_seconds"),
    ],
)
def test_a_limit_out_of_range_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is -1"):
        ServeConfig(**{field: -1})  # type: ignore[arg-type]  # field by name


def test_without_a_rate_nothing_waits() -> None:
    bucket = TokenBucket(math.inf)
    bucket.take(1e18)
    assert bucket.wait_seconds() == 0


def test_calls_at_a_time_are_counted_to_their_end() -> None:
    limits = CallerLimits(CallerQuota(2))
    with limits.call("a"):
        with limits.call("a"), pytest.raises(LimitError, match="a has 2 calls"), limits.call("a"):
            pass
        with limits.call("a"):
            pass
    assert limits.is_idle


def test_requests_beyond_the_rate_are_told_when_to_come_back() -> None:
    clock = Clock()
    limits = CallerLimits(CallerQuota(10, requests_per_second=2), clock)

    def call() -> None:
        with limits.call("a"):
            pass

    for _ in range(3):
        call()
    with pytest.raises(RateLimitedError, match="2 requests a second") as caught:
        call()
    assert caught.value.retry_seconds == 0.5
    clock.seconds += 0.5
    call()


def test_a_publisher_is_held_back_a_little_and_refused_when_it_is_far_ahead(loop: LoopThread) -> None:
    clock = Clock()
    limits = CallerLimits(CallerQuota(10, publish_bytes_per_second=1000), clock)

    async def pay(size_bytes: int) -> None:
        await limits.pay_for_publish("a", size_bytes)

    async def work() -> None:
        # A second's worth, and a message of any size, go at once.
        await pay(1000)
        await pay(20)
        started = time.monotonic()
        await pay(int(1000 * MAX_HOLD_SECONDS))
        assert time.monotonic() - started >= 0.019
        with pytest.raises(RateLimitedError) as caught:
            await pay(1)
        assert caught.value.retry_seconds == pytest.approx(MAX_HOLD_SECONDS + 0.02)

    loop.run(asyncio.wait_for(work(), 30))


def test_too_many_calls_of_one_caller_are_refused_and_others_go_on(
    start_server: StartServer, tmp_path: Path
) -> None:
    tokens = TokenFile(tmp_path / "tokens.toml")
    first, second = tokens.add("first", "admin:*"), tokens.add("second", "admin:*")
    server = start_server(tokens=tokens.path, max_calls_per_caller=2)
    with (
        open_channel(server.server.address, Credentials(token=first)) as channel,
        open_channel(server.server.address, Credentials(token=second)) as other_channel,
    ):
        stub, other = TraceServiceStub(channel), TraceServiceStub(other_channel)
        create(stub)
        readers = [Reader(stub), Reader(stub)]
        for reader in readers:
            assert reader.is_quiet()
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListStreams(pb.ListStreamsRequest())
        assert (code(caught.value), error_name(caught.value)) == ("RESOURCE_EXHAUSTED", "LimitError")
        assert status_details(caught.value) == StatusDetails("LimitError", 1.0)
        publish(other, [1])
        for reader in readers:
            assert reader.next().offset == 0
            reader.cancel()


def test_a_quota_of_one_token_takes_the_place_of_the_usual_one(
    start_server: StartServer, tmp_path: Path
) -> None:
    tokens = TokenFile(tmp_path / "tokens.toml")
    usual = tokens.add("usual", "admin:*")
    slow = tokens.add("slow", "admin:*", more="requests_per_second = 0.01\n")
    server = start_server(tokens=tokens.path, requests_per_second=1000.0)
    with TraceClient(server.server.address, credentials=Credentials(token=usual)) as client:
        for _ in range(5):
            client.list_streams()
    with open_channel(server.server.address, Credentials(token=slow)) as channel:
        stub = TraceServiceStub(channel)
        stub.ListStreams(pb.ListStreamsRequest())
        stub.ListStreams(pb.ListStreamsRequest())
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListStreams(pb.ListStreamsRequest())
    details = status_details(caught.value)
    assert (code(caught.value), details.reason) == ("RESOURCE_EXHAUSTED", "RateLimitedError")
    assert 60 < (details.retry_seconds or 0) <= 100


def test_a_publisher_that_is_too_fast_loses_nothing(start_server: StartServer) -> None:
    server = start_server(publish_bytes_per_second=2e5)
    with TraceClient(server.server.address, timeout_seconds=60) as client:
        client.create_stream(make_spec())
        with client.publisher("s", "p") as publisher:
            for number in range(20):
                publisher.publish(make_block(number, 20_000))
        blocks = [bytes(one.block) for one in client.subscribe("s", follow=False)]
    assert blocks == [make_block(number, 20_000) for number in range(20)]


def test_blocks_far_beyond_the_rate_are_refused_after_the_acks(start_server: StartServer) -> None:
    stub = start_server(publish_bytes_per_second=1000.0).stub
    create(stub)
    producer = Producer(stub)
    for sequence in (1, 2):
        producer.send(sequence, make_block(sequence, 500_000))
    acks, error = producer.fail()
    details = status_details(error)
    assert acks == {1: 0}
    assert (code(error), details.reason) == ("RESOURCE_EXHAUSTED", "RateLimitedError")
    assert (details.retry_seconds or 0) > 100


def test_streams_beyond_the_bound_are_not_made(start_server: StartServer) -> None:
    server = start_server(max_streams=2)
    with TraceClient(server.server.address) as client:
        for name in ("a", "b"):
            client.create_stream(make_spec(name))
        with pytest.raises(StreamLimitError, match="max_streams"):
            client.create_stream(make_spec("c"))
        client.create_stream(make_spec("a"), allow_existing=True)
        client.delete_stream("a")
        client.create_stream(make_spec("c"))
        assert [one.spec.name for one in client.list_streams()] == ["b", "c"]


def test_a_message_that_is_too_large_is_refused_before_it_is_read(start_server: StartServer) -> None:
    stub = start_server().stub
    create(stub)
    producer = Producer(stub)
    producer.send(1, make_block(1), ["x" * MAX_MESSAGE_BYTES])
    assert code(producer.error()) == "RESOURCE_EXHAUSTED"
    publish(stub, [1], producer_id="q")


def test_connections_beyond_the_bound_are_dropped(start_server: StartServer) -> None:
    server = start_server(max_connections=2)

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", server.server.port), timeout=30)

    kept = [connect(), connect()]
    for peer in kept:
        assert peer.recv(1), "a server speaks first in HTTP/2"
    with connect() as dropped:
        assert dropped.recv(1) == b""
    for peer in kept:
        peer.close()
    with TraceClient(server.server.address, timeout_seconds=30) as client:
        client.wait_until_ready(30)
        assert client.list_streams() == []
