"""How streams let go of their oldest blocks, and what readers and publishers then see."""

from __future__ import annotations

import time
from collections.abc import Sequence

import grpc
import pytest
from traces.harness import (
    Producer,
    Reader,
    RunningServer,
    StartServer,
    code,
    create,
    details,
    error_name,
    fetch,
    make_block,
    publish,
    remedy,
)
from traces.storages import StoredObjects, catalog_rows

from lynearm.traces import collector, expiry
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub

BLOCK_BYTES = len(make_block(0))


def keep(stub: TraceServiceStub, **retention: object) -> pb.Stream:
    message = pb.Retention(**retention)  # type: ignore[arg-type]  # fields by name
    return stub.UpdateRetention(pb.UpdateRetentionRequest(name="s", retention=message)).stream


def collect(stub: TraceServiceStub) -> pb.CollectGarbageResponse:
    return stub.CollectGarbage(pb.CollectGarbageRequest())


def describe(stub: TraceServiceStub) -> pb.Stream:
    return stub.GetStream(pb.GetStreamRequest(name="s")).stream


def publish_apart(stub: TraceServiceStub, numbers: Sequence[int]) -> None:
    """Publish so that each block is an object of its own."""
    producer = Producer(stub)
    for sequence, number in enumerate(numbers, 1):
        producer.send(sequence, make_block(number))
        producer.acks(1)
    producer.close()


def test_the_oldest_blocks_go_while_there_are_more_bytes(
    stub: TraceServiceStub, server: RunningServer
) -> None:
    publish_apart(stub, range(6))
    before = keep(stub, max_bytes=2 * BLOCK_BYTES)
    collected = collect(stub)
    assert (collected.expired_blocks, collected.expired_bytes) == (4, 4 * BLOCK_BYTES)
    after = describe(stub)
    assert (after.first_offset, after.retained_bytes) == (4, 2 * BLOCK_BYTES)
    for counted in ("next_offset", "trace_count", "size_bytes"):
        assert getattr(after, counted) == getattr(before, counted)
    assert list(fetch(stub, 4, 9)) == [(4, make_block(4)), (5, make_block(5))]
    assert sorted(StoredObjects(server.config).read().values()) == [make_block(4), make_block(5)]
    assert publish(stub, [6], producer_id="q") == {1: 6}


def test_the_newest_block_stays_however_large_it_is(stub: TraceServiceStub) -> None:
    publish_apart(stub, range(3))
    keep(stub, max_bytes=1)
    assert collect(stub).expired_blocks == 2
    assert list(fetch(stub, 2, 9)) == [(2, make_block(2))]


def test_blocks_go_when_they_are_old(stub: TraceServiceStub, server: RunningServer) -> None:
    publish_apart(stub, range(4))
    two_hours_ago = time.time_ns() - 7200 * 10**9
    old = "UPDATE objects SET created_unix_nano = :then WHERE id IN (SELECT object_id FROM blocks WHERE {})"
    catalog_rows(server.config, old.format('blocks."offset" < 3'), then=two_hours_ago)
    keep(stub, max_age_seconds=3 * 3600)
    assert collect(stub).expired_blocks == 0
    keep(stub, max_age_seconds=3600)
    assert collect(stub).expired_blocks == 3
    assert describe(stub).first_offset == 3
    catalog_rows(server.config, old.format("1 = 1"), then=two_hours_ago)
    assert collect(stub).expired_blocks == 1
    assert (describe(stub).first_offset, describe(stub).retained_bytes) == (4, 0)
    assert publish(stub, [4], producer_id="q") == {1: 4}
    assert [offset for offset, _ in fetch(stub, 4, 9)] == [4]


def test_blocks_go_when_all_named_consumers_have_read_them(
    stub: TraceServiceStub, server: RunningServer
) -> None:
    publish_apart(stub, range(5))
    keep(stub, consumers=["a", "b"])
    assert collect(stub).expired_blocks == 0
    store_cursor(server, "a", 4)
    store_cursor(server, "c", 5)
    assert collect(stub).expired_blocks == 0
    store_cursor(server, "b", 2)
    assert collect(stub).expired_blocks == 2
    assert describe(stub).first_offset == 2
    assert list(describe(stub).retention.consumers) == ["a", "b"]


def store_cursor(server: RunningServer, consumer: str, offset: int) -> None:
    catalog_rows(
        server.config,
        'CREATE TABLE IF NOT EXISTS consumers (stream_id BIGINT, name TEXT, "offset" BIGINT, '
        "trace_index BIGINT, updated_unix_nano BIGINT, PRIMARY KEY (stream_id, name))",
    )
    catalog_rows(
        server.config,
        'INSERT INTO consumers (stream_id, name, "offset", trace_index, updated_unix_nano) '
        "SELECT id, :consumer, :offset, 0, 1 FROM streams",
        consumer=consumer,
        offset=offset,
    )


def test_an_object_goes_with_the_last_of_its_blocks(stub: TraceServiceStub, server: RunningServer) -> None:
    create(stub, "other")
    for stream in ("s", "other"):
        publish(stub, range(4), stream=stream)
    # One group, as if the blocks of both streams had come together.
    catalog_rows(server.config, "UPDATE blocks SET object_id = (SELECT max(id) FROM objects)")
    keep(stub, max_bytes=1)
    collect(stub)
    shared = "SELECT count(*) FROM objects WHERE id IN (SELECT object_id FROM blocks)"
    assert catalog_rows(server.config, shared) == [(1,)]
    assert len(list(fetch(stub, 0, 9, "other"))) == 4
    stub.DeleteStream(pb.DeleteStreamRequest(name="other"))
    assert [offset for offset, _ in fetch(stub, 3, 9)] == [3]
    stub.DeleteStream(pb.DeleteStreamRequest(name="s"))
    assert catalog_rows(server.config, shared) == [(0,)]


def test_an_offset_that_expired_names_the_first_that_is_there(stub: TraceServiceStub) -> None:
    publish_apart(stub, range(5))
    keep(stub, max_bytes=2 * BLOCK_BYTES)
    collect(stub)
    with pytest.raises(grpc.RpcError) as caught:
        list(fetch(stub, 1, 2))
    for error in (caught.value, Reader(stub, start_offset=2).error()):
        assert (code(error), error_name(error)) == ("OUT_OF_RANGE", "OffsetExpiredError")
        assert "first offset is 3" in details(error)
        assert "continue from offset 3" in remedy(error)
    assert Reader(stub).next().offset == 3


def test_a_reader_that_is_overtaken_is_told(start_server: StartServer) -> None:
    stub = start_server(cache_bytes=0).stub
    create(stub)
    publish_apart(stub, range(5))
    reader = Reader(stub, credit_bytes=1)
    assert reader.next().offset == 0
    keep(stub, max_bytes=BLOCK_BYTES)
    collect(stub)
    reader.grant(1 << 20)
    error = reader.error()
    assert error_name(error) == "OffsetExpiredError"
    assert "keeps block 1 no more, its first offset is 4" in details(error)


def test_a_publish_that_is_repeated_gets_its_offset_after_the_block_has_expired(
    stub: TraceServiceStub,
) -> None:
    publish_apart(stub, range(5))
    keep(stub, max_bytes=1)
    assert collect(stub).expired_blocks == 4
    again = Producer(stub, epoch=1)
    assert again.next_sequence == 6
    again.send(2, make_block(1))
    again.send(6, make_block(5))
    assert again.close() == {2: 1, 6: 5}
    changed = Producer(stub, epoch=1)
    changed.send(3, make_block(77))
    assert error_name(changed.error()) == "SequenceConflictError"


def test_no_more_is_remembered_of_expired_blocks_than_can_be_sent_again(
    stub: TraceServiceStub, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "REMEMBERED_BLOCKS", 3)
    remembered = "SELECT sequence FROM expired_blocks ORDER BY sequence"
    publish_apart(stub, range(6))
    keep(stub, max_bytes=1)
    collect(stub)
    assert catalog_rows(server.config, remembered) == [(4,), (5,)]
    publish_apart(stub, range(6, 9))  # in a new epoch: nothing of the one before can come again
    collect(stub)
    assert catalog_rows(server.config, remembered) == [(1,), (2,)]


def test_many_blocks_expire_in_several_transactions(
    stub: TraceServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "EXPIRE_COUNT", 3)
    publish(stub, range(11))
    keep(stub, max_bytes=1)
    assert collect(stub).expired_blocks == 10
    assert [offset for offset, _ in fetch(stub, 10, 9)] == [10]


def test_blocks_expire_without_being_asked(start_server: StartServer) -> None:
    stub = start_server(collect_seconds=0.05).stub
    create(stub)
    keep(stub, max_bytes=1)
    publish(stub, range(5))
    deadline = time.monotonic() + 60
    while describe(stub).first_offset < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_retention_can_be_taken_back(stub: TraceServiceStub) -> None:
    publish_apart(stub, range(3))
    keep(stub, max_bytes=1)
    stub.UpdateRetention(pb.UpdateRetentionRequest(name="s"))
    assert collect(stub).expired_blocks == 0
    assert not describe(stub).retention.max_bytes


@pytest.mark.parametrize("retention", [{"max_bytes": 1 << 60}, {"consumers": ["no good"]}])
def test_a_retention_that_makes_no_sense_is_refused(
    stub: TraceServiceStub, retention: dict[str, object]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        keep(stub, **retention)
    assert (code(caught.value), error_name(caught.value)) == ("INVALID_ARGUMENT", "InvalidInputError")
