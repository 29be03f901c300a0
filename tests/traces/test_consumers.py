"""Stored cursors over a socket, and how far publishers may run ahead of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import psycopg
import pytest
from traces.harness import (
    Producer,
    RunningServer,
    StartServer,
    code,
    create,
    details,
    error_name,
    make_block,
    make_spec,
)
from traces.harness import publish as publish_blocks
from traces.storages import on_cluster, wait_until_blocked

from lynearm.v1 import consumer_pb2 as pb
from lynearm.v1 import trace_service_pb2
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.protobuf import spec_to_proto

TRACES = 2
"""In each of `make_block`'s."""


def commit(
    stub: TraceServiceStub, offset: int, trace_index: int = 0, name: str = "c", **more: Any
) -> pb.Consumer:
    cursor = pb.Cursor(offset=offset, trace_index=trace_index)
    request = pb.CommitCursorRequest(stream="s", consumer=name, cursor=cursor, **more)
    return stub.CommitCursor(request).consumer


def bound(stub: TraceServiceStub, *, blocks: int = 0, traces: int = 0) -> trace_service_pb2.Stream:
    max_lag = pb.MaxLag(blocks=blocks, traces=traces)
    request = trace_service_pb2.ConfigureStreamRequest(name="s", max_lag=max_lag)
    return stub.ConfigureStream(request).stream


_Heard = trace_service_pb2.PublishResponse | grpc.RpcError


class Messages:
    """What a publisher hears, as it comes."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._heard: queue.SimpleQueue[_Heard] = queue.SimpleQueue()
        self._acked: list[int] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def next(self, timeout_seconds: float = 30) -> trace_service_pb2.PublishResponse:
        heard = self._heard.get(timeout=timeout_seconds)
        assert not isinstance(heard, grpc.RpcError), heard
        return heard

    def error(self) -> grpc.RpcError:
        while not isinstance(heard := self._heard.get(timeout=30), grpc.RpcError):
            pass
        return heard

    def acked(self, count: int) -> list[int]:
        """Offsets of the next acknowledgements; words that something is held are passed over."""
        while len(self._acked) < count:
            self._acked += self.next().ack.offsets
        offsets, self._acked = self._acked, []
        return offsets

    def held(self) -> trace_service_pb2.PublishHeld:
        """The next word that something is held; acknowledgements before it are kept for `acked`."""
        while not (heard := self.next()).HasField("held"):
            self._acked += heard.ack.offsets
        return heard.held

    def is_quiet(self, seconds: float = 0.4) -> bool:
        try:
            self._heard.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    def _listen(self) -> None:
        try:
            while True:
                self._heard.put(self._producer.next())
        except StopIteration:
            return
        except grpc.RpcError as error:
            self._heard.put(error)


@pytest.fixture
def producer(stub: TraceServiceStub) -> Iterator[Producer]:
    one = Producer(stub)
    yield one
    one.cancel()


@on_cluster
def test_a_cursor_of_a_stream_that_is_deleted_meanwhile_is_refused(
    storage: dict[str, Any], start_server: StartServer
) -> None:
    stub = start_server().stub
    create(stub)
    request = pb.CommitCursorRequest(stream="s", consumer="c", cursor=pb.Cursor())
    with psycopg.connect(storage["catalog"]) as deleting:
        deleting.execute("DELETE FROM streams")
        call = stub.CommitCursor.future(request)
        wait_until_blocked(storage["catalog"])
    with pytest.raises(grpc.RpcError) as caught:
        call.result(60)
    assert error_name(caught.value) == "StreamNotFoundError"


def test_a_cursor_is_kept_and_its_lag_is_counted(start_server: StartServer, server: RunningServer) -> None:
    create(server.stub)
    publish_blocks(server.stub, range(10))
    first = commit(server.stub, 3, 1)
    size = len(make_block(0))
    assert (first.stream, first.name, first.cursor) == ("s", "c", pb.Cursor(offset=3, trace_index=1))
    assert (first.lag_blocks, first.lag_traces, first.lag_bytes) == (7, 13, 7 * size)
    commit(server.stub, 10, name="b")
    server.stop()
    stub = start_server().stub
    found = stub.ListConsumers(pb.ListConsumersRequest(stream="s")).consumers
    assert [(one.name, one.cursor.offset, one.lag_blocks, one.lag_traces) for one in found] == [
        ("b", 10, 0, 0),
        ("c", 3, 7, 13),
    ]
    publish_blocks(stub, range(2), producer_id="q")
    one = stub.GetConsumer(pb.GetConsumerRequest(stream="s", name="b")).consumer
    assert (one.lag_blocks, one.lag_traces, one.lag_bytes) == (2, 4, 2 * size)


def test_cursors_move_forwards_unless_asked(stub: TraceServiceStub) -> None:
    publish_blocks(stub, range(5))
    commit(stub, 2, 1)
    assert commit(stub, 2, 1).cursor == pb.Cursor(offset=2, trace_index=1)
    for offset, index in ((2, 0), (1, 1), (0, 0)):
        with pytest.raises(grpc.RpcError) as caught:
            commit(stub, offset, index)
        assert (code(caught.value), error_name(caught.value)) == (
            "FAILED_PRECONDITION",
            "CursorBackwardsError",
        )
    assert commit(stub, 1, allow_backwards=True).cursor.offset == 1
    assert commit(stub, 4).cursor.offset == 4


def test_the_end_of_a_block_is_the_beginning_of_the_next(stub: TraceServiceStub) -> None:
    publish_blocks(stub, range(3))
    assert commit(stub, 1, TRACES).cursor == pb.Cursor(offset=2)
    assert commit(stub, 2, TRACES).cursor == pb.Cursor(offset=3)


@pytest.mark.parametrize(("offset", "index"), [(3, 1), (4, 0), (2, 3), (2**64 - 1, 0)])
def test_a_cursor_beyond_the_stream_is_refused(stub: TraceServiceStub, offset: int, index: int) -> None:
    publish_blocks(stub, range(3))
    with pytest.raises(grpc.RpcError) as caught:
        commit(stub, offset, index)
    assert (code(caught.value), error_name(caught.value)) == ("OUT_OF_RANGE", "OffsetNotFoundError")
    assert not stub.ListConsumers(pb.ListConsumersRequest(stream="s")).consumers


def test_a_deleted_consumer_is_forgotten(stub: TraceServiceStub) -> None:
    publish_blocks(stub, range(3))
    commit(stub, 2)
    stub.DeleteConsumer(pb.DeleteConsumerRequest(stream="s", name="c"))
    for call in (stub.DeleteConsumer, stub.GetConsumer):
        kind = pb.DeleteConsumerRequest if call == stub.DeleteConsumer else pb.GetConsumerRequest
        with pytest.raises(grpc.RpcError) as caught:
            call(kind(stream="s", name="c"))
        assert (code(caught.value), error_name(caught.value)) == ("NOT_FOUND", "ConsumerNotFoundError")
    assert commit(stub, 1).cursor.offset == 1


def test_consumers_go_with_their_stream(stub: TraceServiceStub) -> None:
    publish_blocks(stub, range(3))
    commit(stub, 2)
    stub.DeleteStream(trace_service_pb2.DeleteStreamRequest(name="s"))
    with pytest.raises(grpc.RpcError) as caught:
        commit(stub, 0)
    assert error_name(caught.value) == "StreamNotFoundError"
    create(stub)
    assert not stub.ListConsumers(pb.ListConsumersRequest(stream="s")).consumers


def test_a_publisher_waits_for_the_slowest_consumer(stub: TraceServiceStub, producer: Producer) -> None:
    assert bound(stub, blocks=3).max_lag == pb.MaxLag(blocks=3)
    commit(stub, 0)
    commit(stub, 0, name="b")
    heard = Messages(producer)
    for sequence in range(1, 8):
        producer.send(sequence, make_block(sequence))
    assert heard.acked(3) == [0, 1, 2]
    held = heard.held()
    assert (held.sequence, held.consumer, held.lag_blocks) == (4, "b", 3)
    assert heard.is_quiet()
    commit(stub, 2)
    assert heard.is_quiet()  # the other one is as far behind as before
    commit(stub, 1, 1, name="b")
    assert heard.acked(1) == [3]
    held = heard.held()
    assert (held.sequence, held.consumer, held.lag_blocks, held.lag_traces) == (5, "b", 3, 5)
    commit(stub, 4)
    stub.DeleteConsumer(pb.DeleteConsumerRequest(stream="s", name="b"))
    assert heard.acked(3) == [4, 5, 6]


def test_the_bound_may_be_in_traces(stub: TraceServiceStub, producer: Producer) -> None:
    bound(stub, traces=2 * TRACES + 1)
    commit(stub, 0)
    heard = Messages(producer)
    for sequence in range(1, 5):
        producer.send(sequence, make_block(sequence))
    assert heard.acked(2) == [0, 1]
    assert heard.held().lag_traces == 2 * TRACES
    commit(stub, 0, 1)
    assert heard.acked(1) == [2]
    commit(stub, 3)
    assert heard.acked(1) == [3]


def test_a_block_larger_than_the_bound_passes_when_nothing_is_behind(
    stub: TraceServiceStub, producer: Producer
) -> None:
    bound(stub, traces=1)
    commit(stub, 0)
    heard = Messages(producer)
    producer.send(1, make_block(1))
    producer.send(2, make_block(2))
    assert heard.acked(1) == [0]
    assert heard.held().sequence == 2
    commit(stub, 1)
    assert heard.acked(1) == [1]


def test_many_publishers_together_stay_within_the_bound(stub: TraceServiceStub) -> None:
    bound(stub, blocks=7)
    commit(stub, 0)
    producers = [Producer(stub, producer_id=f"p{number}") for number in range(5)]
    heard = [Messages(producer) for producer in producers]
    for producer in producers:
        for sequence in range(1, 9):
            producer.send(sequence, make_block(sequence))

    def length() -> int:
        return stub.GetStream(trace_service_pb2.GetStreamRequest(name="s")).stream.next_offset

    for messages in heard:
        messages.held()
    assert length() == 7
    committed = 0
    while committed < 40:
        committed = commit(stub, length()).cursor.offset
        assert length() <= committed + 7
    assert sorted(offset for messages in heard for offset in messages.acked(8)) == list(range(40))
    for producer in producers:
        producer.cancel()


@pytest.mark.parametrize("change", ["lifted", "sealed", "deleted"])
def test_a_publisher_does_not_wait_for_what_is_gone(
    stub: TraceServiceStub, producer: Producer, change: str
) -> None:
    bound(stub, blocks=1)
    commit(stub, 0)
    heard = Messages(producer)
    producer.send(1, make_block(1))
    producer.send(2, make_block(2))
    heard.held()
    if change == "lifted":
        assert not bound(stub).HasField("max_lag")
        assert heard.acked(2) == [0, 1]
    elif change == "sealed":
        stub.SealStream(trace_service_pb2.SealStreamRequest(name="s"))
        assert error_name(heard.error()) == "StreamSealedError"
    else:
        stub.DeleteStream(trace_service_pb2.DeleteStreamRequest(name="s"))
        assert error_name(heard.error()) == "StreamNotFoundError"


def test_a_publisher_that_does_not_want_to_wait_is_told(stub: TraceServiceStub) -> None:
    bound(stub, blocks=1)
    commit(stub, 0)
    producer = Producer(stub, no_wait=True)
    producer.send(1, make_block(1))
    assert producer.acks(1) == {1: 0}
    producer.send(2, make_block(2))
    error = producer.error()
    assert (code(error), error_name(error)) == ("RESOURCE_EXHAUSTED", "LagLimitError")
    assert "consumer 'c' of stream 's' is 1 blocks and 2 traces behind" in details(error)
    commit(stub, 1)
    again = Producer(stub, epoch=producer.epoch, no_wait=True)
    assert again.next_sequence == 2
    again.send(2, make_block(2))
    assert again.close() == {2: 1}


def test_a_held_publisher_that_vanishes_takes_nothing_with_it(stub: TraceServiceStub) -> None:
    bound(stub, blocks=1)
    commit(stub, 0)
    for number in range(3):
        producer = Producer(stub, producer_id=f"p{number}")
        producer.send(1, make_block(1))
        producer.send(2, make_block(2))
        Messages(producer).held()
        producer.cancel()
    commit(stub, 1)
    assert publish_blocks(stub, [7], producer_id="q") == {1: 1}


def test_blocks_that_are_sent_again_do_not_wait(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    producer.send(1, make_block(1))
    producer.send(2, make_block(2))
    producer.close()
    bound(stub, blocks=1)
    commit(stub, 0)
    again = Producer(stub, epoch=producer.epoch)
    again.send(1, make_block(1))
    again.send(2, make_block(2))
    assert again.close() == {1: 0, 2: 1}


def test_a_stream_may_be_created_with_a_bound(stub: TraceServiceStub) -> None:
    request = trace_service_pb2.CreateStreamRequest(
        spec=spec_to_proto(make_spec("b")), allow_existing=True, max_lag=pb.MaxLag(blocks=4, traces=9)
    )
    assert stub.CreateStream(request).stream.max_lag == pb.MaxLag(blocks=4, traces=9)
    request.max_lag.blocks = 5
    assert stub.CreateStream(request).stream.max_lag == pb.MaxLag(blocks=4, traces=9)
