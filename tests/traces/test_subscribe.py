"""Subscribe and FetchBlocks over a socket: replay, follow, credit, ranges, refusals."""

from __future__ import annotations

import time
from typing import Any

import grpc
import pytest
from traces.harness import (
    Producer,
    Reader,
    StartServer,
    code,
    create,
    details,
    error_name,
    fetch,
    make_block,
    publish,
)

from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub


def seal(stub: TraceServiceStub) -> None:
    stub.SealStream(pb.SealStreamRequest(name="s"))


@pytest.mark.parametrize("cache_bytes", [0, 50_000, 1 << 20])
def test_a_replay_gives_every_block_from_memory_or_disk(start_server: StartServer, cache_bytes: int) -> None:
    stub = start_server(cache_bytes=cache_bytes).stub
    create(stub)
    publish(stub, range(100))
    assert Reader(stub, follow=False).rest() == [make_block(number) for number in range(100)]
    assert Reader(stub, follow=False, start_offset=97).rest() == [make_block(n) for n in (97, 98, 99)]
    assert Reader(stub, follow=False, start_offset=100).rest() == []


def test_a_follower_gets_what_is_there_and_what_comes_until_the_seal(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    producer.send(1, make_block(1))
    producer.acks(1)
    reader = Reader(stub)
    first = reader.next()
    assert (first.offset, first.next_offset) == (0, 1)
    producer.send(2, make_block(2))
    assert reader.next().block.SerializeToString() == make_block(2)
    assert reader.is_quiet()
    seal(stub)
    assert reader.rest() == []
    producer.cancel()


def test_a_follower_of_a_sealed_stream_ends_at_its_end(stub: TraceServiceStub) -> None:
    publish(stub, range(5))
    seal(stub)
    assert len(Reader(stub).rest()) == 5
    assert Reader(stub, live=True).rest() == []


def test_many_followers_see_the_same_blocks_in_the_same_order(stub: TraceServiceStub) -> None:
    readers = [Reader(stub, credit_bytes=10_000_000) for _ in range(5)]
    publish(stub, range(40), producer_id="a")
    publish(stub, range(40, 80), producer_id="b")
    seal(stub)
    for reader in readers:
        assert reader.rest() == [make_block(number) for number in range(80)]


def test_a_live_subscription_gets_only_later_blocks(stub: TraceServiceStub) -> None:
    publish(stub, range(3))
    reader = Reader(stub, live=True)
    assert reader.is_quiet()
    publish(stub, [7])
    assert reader.next().offset == 3
    reader.cancel()


def test_without_follow_blocks_that_come_later_are_not_delivered(stub: TraceServiceStub) -> None:
    publish(stub, range(3))
    size = len(make_block(0))
    reader = Reader(stub, follow=False, credit_bytes=size)
    assert reader.next().offset == 0
    assert reader.is_quiet()
    publish(stub, [8, 9])
    reader.grant(100 * size)
    assert reader.rest() == [make_block(1), make_block(2)]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_credit_bounds_what_is_sent_to_the_block(start_server: StartServer, cache_bytes: int) -> None:
    stub = start_server(cache_bytes=cache_bytes).stub
    create(stub)
    publish(stub, range(20))
    size = len(make_block(0))
    reader = Reader(stub, credit_bytes=3 * size)
    assert [reader.next().offset for _ in range(3)] == [0, 1, 2]
    assert reader.is_quiet()
    reader.grant(size + 1)
    assert [reader.next().offset for _ in range(2)] == [3, 4]
    assert reader.is_quiet()
    reader.grant(size - 1)  # pays the debt of the block that went out for one byte
    assert reader.is_quiet()
    reader.grant(1)
    assert reader.next().offset == 5
    reader.cancel()


def test_a_reader_that_does_not_read_does_not_fill_the_server(stub: TraceServiceStub) -> None:
    publish(stub, range(40), size_bytes=1 << 20)
    call = stub.Subscribe(
        iter([pb.SubscribeRequest(open=pb.SubscribeOpen(stream="s", credit_bytes=2**63, follow=False))])
    )
    time.sleep(0.5)
    assert publish(stub, [1], producer_id="other") == {1: 40}
    assert sum(1 for _ in call) == 40


def test_a_subscriber_that_closes_its_side_gets_what_its_credit_pays(stub: TraceServiceStub) -> None:
    publish(stub, range(5))
    reader = Reader(stub, credit_bytes=3 * len(make_block(0)))
    reader.half_close()
    assert [reader.next().offset for _ in range(3)] == [0, 1, 2]
    assert error_name(reader.error()) == "PreconditionError"


@pytest.mark.parametrize(
    ("opening", "status", "problem"),
    [
        ({"stream": "nope"}, "NOT_FOUND", "no stream 'nope'"),
        ({"start_offset": 4}, "OUT_OF_RANGE", "no block 4, its next offset is 3"),
        ({"start_offset": 2**64 - 1}, "OUT_OF_RANGE", "next offset is 3"),
        ({"credit_bytes": 0}, "INVALID_ARGUMENT", "credit_bytes 0"),
    ],
)
def test_a_subscription_that_cannot_be_is_refused(
    stub: TraceServiceStub, opening: dict[str, Any], status: str, problem: str
) -> None:
    publish(stub, range(3))
    error = Reader(stub, **opening).error()
    assert code(error) == status
    assert problem in details(error)


def test_requests_out_of_order_are_refused(stub: TraceServiceStub) -> None:
    publish(stub, range(3))
    with pytest.raises(grpc.RpcError, match="must begin with an open"):
        list(stub.Subscribe(iter([pb.SubscribeRequest(credit_bytes=1)])))
    opening = pb.SubscribeRequest(open=pb.SubscribeOpen(stream="s", credit_bytes=1, follow=True))
    with pytest.raises(grpc.RpcError, match="takes nothing but credit"):
        list(stub.Subscribe(iter([opening, opening])))


def test_deleting_a_stream_ends_its_readers(stub: TraceServiceStub) -> None:
    publish(stub, range(3))
    waiting, starved = Reader(stub, start_offset=3), Reader(stub, credit_bytes=1)
    starved.next()
    assert waiting.is_quiet()
    stub.DeleteStream(pb.DeleteStreamRequest(name="s"))
    for reader in (waiting, starved):
        assert error_name(reader.error()) == "StreamNotFoundError"


def test_readers_that_vanish_leave_the_service_well(stub: TraceServiceStub) -> None:
    publish(stub, range(50), size_bytes=100_000)
    for start in range(10):
        reader = Reader(stub, start_offset=start)
        reader.next()
        reader.cancel()
    assert len(Reader(stub, follow=False).rest()) == 50


def test_fetch_gives_ranges(stub: TraceServiceStub) -> None:
    publish(stub, range(10))
    assert list(fetch(stub, 3, 2)) == [(3, make_block(3)), (4, make_block(4))]
    assert [offset for offset, _ in fetch(stub, 8, 4_000_000_000)] == [8, 9]


@pytest.mark.parametrize(
    ("stream", "offset", "count", "status", "name"),
    [
        ("nope", 0, 1, "NOT_FOUND", "StreamNotFoundError"),
        ("s", 3, 1, "OUT_OF_RANGE", "OffsetNotFoundError"),
        ("s", 2**64 - 1, 1, "OUT_OF_RANGE", "OffsetNotFoundError"),
        ("s", 0, 0, "INVALID_ARGUMENT", "InvalidInputError"),
    ],
)
def test_fetch_refuses_what_is_not_there(
    stub: TraceServiceStub, stream: str, offset: int, count: int, status: str, name: str
) -> None:
    publish(stub, range(3))
    with pytest.raises(grpc.RpcError) as caught:
        list(fetch(stub, offset, count, stream))
    assert (code(caught.value), error_name(caught.value)) == (status, name)
