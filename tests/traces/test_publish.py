"""Publish over a socket: acknowledgement, idempotence, fencing, refusals."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import pytest
from traces.harness import (
    Producer,
    Reader,
    RunningServer,
    code,
    create,
    details,
    error_name,
    fetch,
    make_block,
    publish,
    remedy,
    to_publish,
)

from lynearm.v1 import trace_pb2
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.fields import bytes_prefix
from lynearm.wire.frames import PublishOpen, frame_publish_open, publish_block_parts

OPENING = frame_publish_open(PublishOpen("s", "p"))


def next_offset(stub: TraceServiceStub) -> int:
    return int(stub.GetStream(pb.GetStreamRequest(name="s")).stream.next_offset)


def test_blocks_get_consecutive_offsets_and_come_back_byte_for_byte(stub: TraceServiceStub) -> None:
    assert publish(stub, range(50)) == {sequence: sequence - 1 for sequence in range(1, 51)}
    assert list(fetch(stub, 0, 100)) == [(number, make_block(number)) for number in range(50)]


def test_blocks_of_one_message_are_acknowledged_like_others(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    producer.send_together([to_publish(number, make_block(number)) for number in (1, 2, 3)])
    producer.send_together([to_publish(4, make_block(4))])
    assert producer.acks(4) == {1: 0, 2: 1, 3: 2, 4: 3}
    assert list(fetch(stub, 0, 9)) == [(number - 1, make_block(number)) for number in (1, 2, 3, 4)]


def test_of_a_message_what_stands_before_a_refused_block_is_kept(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    damaged = make_block(3)[:-1] + b"\xff"
    blocks = [make_block(1), make_block(2), damaged, make_block(4)]
    producer.send_together([to_publish(number, block) for number, block in enumerate(blocks, start=1)])
    assert producer.acks(2) == {1: 0, 2: 1}
    assert error_name(producer.error()) == "CorruptBlockError"
    assert next_offset(stub) == 2


def test_a_block_of_three_mebibytes_passes(stub: TraceServiceStub) -> None:
    assert publish(stub, [7], size_bytes=3 << 20) == {1: 0}
    assert list(fetch(stub, 0, 1)) == [(0, make_block(7, 3 << 20))]


def test_the_counts_of_a_stream_add_up(stub: TraceServiceStub) -> None:
    publish(stub, range(4))
    stream = stub.GetStream(pb.GetStreamRequest(name="s")).stream
    assert (stream.next_offset, stream.trace_count, stream.prompt_token_count) == (4, 8, 12)
    assert (stream.completion_token_count, stream.size_bytes) == (20, 4 * len(make_block(0)))


def test_a_resent_block_keeps_its_offset(stub: TraceServiceStub) -> None:
    first = Producer(stub)
    first.send(1, make_block(1), ["a"])
    first.send(2, make_block(2))
    assert first.acks(2) == {1: 0, 2: 1}
    first.cancel()
    again = Producer(stub, epoch=first.epoch)
    assert (again.epoch, again.next_sequence) == (first.epoch, 3)
    again.send(2, make_block(2))
    again.send(1, make_block(1), ["a"])
    again.send(3, make_block(3))
    assert again.acks(3) == {2: 1, 1: 0, 3: 2}
    again.close()
    assert next_offset(stub) == 3


def test_the_same_block_twice_in_one_group_is_stored_once(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    for _ in range(10):
        producer.send(1, make_block(1), ["a"])
    assert producer.close() == {1: 0}
    assert next_offset(stub) == 1


def test_other_bytes_under_a_used_sequence_number_are_a_conflict(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    producer.send(1, make_block(1))
    producer.acks(1)
    producer.send(1, make_block(9))
    error = producer.error()
    assert (code(error), error_name(error)) == ("ALREADY_EXISTS", "SequenceConflictError")
    assert "sequence 1" in details(error)
    assert "resend exactly the bytes" in remedy(error)


def test_another_header_over_the_same_payload_is_a_conflict_too(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    producer.send(1, make_block(1))
    changed = trace_pb2.Block.FromString(make_block(1))
    changed.header.trace_count += 1
    producer.send(1, changed.SerializeToString())
    assert error_name(producer.error()) == "SequenceConflictError"


def test_a_gap_is_refused_and_what_came_before_it_is_acknowledged(
    stub: TraceServiceStub,
) -> None:
    producer = Producer(stub)
    producer.send(1, make_block(1))
    producer.send(3, make_block(3))
    assert producer.acks(1) == {1: 0}
    error = producer.error()
    assert (code(error), error_name(error)) == ("FAILED_PRECONDITION", "SequenceGapError")
    assert Producer(stub, epoch=producer.epoch).next_sequence == 2


def test_a_new_epoch_fences_the_old_one(stub: TraceServiceStub) -> None:
    old = Producer(stub)
    new = Producer(stub)
    assert (old.epoch, new.epoch) == (1, 2)
    old.send(1, make_block(1))
    error = old.error()
    assert (code(error), error_name(error)) == ("FAILED_PRECONDITION", "ProducerFencedError")
    with pytest.raises(grpc.RpcError, match="fenced off by epoch 2"):
        Producer(stub, epoch=1)
    new.send(1, make_block(5))
    assert new.close() == {1: 0}


def test_an_epoch_that_was_never_given_is_refused(stub: TraceServiceStub) -> None:
    for epoch in (1, 2**64 - 1):
        with pytest.raises(grpc.RpcError, match=f"never had epoch {epoch}") as caught:
            Producer(stub, epoch=epoch)
        assert code(caught.value) == "FAILED_PRECONDITION"


def test_producers_side_by_side_lose_and_repeat_nothing(stub: TraceServiceStub) -> None:
    acks: dict[int, dict[int, int]] = {}

    def run(index: int) -> None:
        numbers = range(1000 * index, 1000 * index + 60)
        acks[index] = publish(stub, numbers, producer_id=f"p{index}")

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    blocks = dict(fetch(stub, 0, 1000))
    assert sorted(blocks) == list(range(180))
    for index, of_producer in acks.items():
        offsets = list(of_producer.values())
        assert offsets == sorted(offsets)
        assert [blocks[offset] for offset in offsets] == [make_block(1000 * index + n) for n in range(60)]


def test_a_finished_prompt_is_refused_a_second_time(stub: TraceServiceStub) -> None:
    first = Producer(stub, producer_id="a")
    first.send(1, make_block(1), ["p0", "p1"])
    first.close()
    second = Producer(stub, producer_id="b")
    second.send(1, make_block(2), ["p2", "p1"])
    error = second.error()
    assert (code(error), error_name(error)) == ("FAILED_PRECONDITION", "PromptFinishedError")
    responses = stub.ListFinishedPrompts(pb.ListFinishedPromptsRequest(stream="s"))
    assert [list(response.prompt_ids) for response in responses] == [["p0", "p1"]]
    assert stub.GetStream(pb.GetStreamRequest(name="s")).stream.finished_prompt_count == 2


def test_a_block_that_names_a_prompt_twice_harms_no_other_producer(stub: TraceServiceStub) -> None:
    good, bad = Producer(stub, producer_id="good"), Producer(stub, producer_id="bad")
    bad.send(1, make_block(1), ["p", "p"])
    good.send(1, make_block(2), ["q"])
    assert error_name(bad.error()) == "PromptFinishedError"
    assert good.close() == {1: 0}


def test_finished_prompts_come_in_pages_in_the_order_of_their_commit(stub: TraceServiceStub) -> None:
    ids = [f"prompt-{number}" for number in range(12_000)]
    producer = Producer(stub)
    producer.send(1, make_block(1), ids[:7000])
    producer.send(2, make_block(2), ids[7000:])
    producer.close()
    pages = list(stub.ListFinishedPrompts(pb.ListFinishedPromptsRequest(stream="s")))
    assert [len(page.prompt_ids) for page in pages] == [10_000, 2_000]
    assert [prompt_id for page in pages for prompt_id in page.prompt_ids] == ids


def test_a_sealed_stream_takes_no_block_but_acknowledges_resent_ones(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    producer.send(1, make_block(1))
    producer.acks(1)
    stub.SealStream(pb.SealStreamRequest(name="s"))
    producer.send(1, make_block(1))
    assert producer.acks(1) == {1: 0}
    producer.send(2, make_block(2))
    error = producer.error()
    assert (code(error), error_name(error)) == ("FAILED_PRECONDITION", "StreamSealedError")
    with pytest.raises(grpc.RpcError, match="sealed"):
        Producer(stub)
    assert Producer(stub, epoch=producer.epoch).next_sequence == 2


def test_a_damaged_block_is_refused_before_anything_is_kept(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    damaged = bytearray(make_block(1))
    damaged[-1] ^= 1
    producer.send(1, bytes(damaged))
    error = producer.error()
    assert (code(error), error_name(error)) == ("DATA_LOSS", "CorruptBlockError")
    assert next_offset(stub) == 0


def test_a_block_that_fits_into_no_message_to_a_reader_is_refused(stub: TraceServiceStub) -> None:
    # A field that nobody knows makes it larger than its payload may be, and its publish is just small enough.
    padding = (1 << 20) - 300
    padded = make_block(1, 3 << 20) + bytes_prefix(99, padding) + bytes(padding)
    producer = Producer(stub)
    producer.send(1, padded)
    with pytest.raises(grpc.RpcError, match="expected at most") as caught:
        producer.close()
    assert (error_name(caught.value), next_offset(stub)) == ("InvalidInputError", 0)


def test_a_block_in_another_codec_mode_than_the_stream_is_refused(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    producer.send(1, make_block(1, codec_mode="standard"))
    error = producer.error()
    assert error_name(error) == "InvalidInputError"
    assert "'standard'" in details(error)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "must begin with an open"),
        ([b""], "neither an open nor blocks"),
        ([b"\xff\xff"], "not a protobuf message"),
        ([b"".join(publish_block_parts(1, make_block(1)))], "must begin with an open"),
        ([OPENING + b"".join(publish_block_parts(1, make_block(1)))], "or both"),
        ([OPENING, OPENING + OPENING], "or both"),
        ([pb.PublishRequest(open=pb.PublishOpen(stream="s", producer_id="P"))], "producer id 'P'"),
        ([pb.PublishRequest(open=pb.PublishOpen(stream="s", producer_id="p"))] * 2, "opened twice"),
    ],
)
def test_a_malformed_publish_is_refused_with_the_reason(
    stub: TraceServiceStub, server: RunningServer, messages: list[bytes | pb.PublishRequest], problem: str
) -> None:
    method: Any = server.channel.stream_stream("/lynearm.v1.TraceService/Publish", None, None)
    encoded = [message if isinstance(message, bytes) else message.SerializeToString() for message in messages]
    with pytest.raises(grpc.RpcError, match=problem) as caught:
        list(method(iter(encoded)))
    assert (code(caught.value), error_name(caught.value)) == ("INVALID_ARGUMENT", "InvalidInputError")


def test_a_publisher_that_vanishes_leaves_the_service_well(stub: TraceServiceStub) -> None:
    for number in range(5):
        producer = Producer(stub, producer_id=f"p{number}")
        for sequence in range(1, 20):
            producer.send(sequence, make_block(sequence, 100_000))
        producer.cancel()
    assert publish(stub, [1], producer_id="last")[1] == next_offset(stub) - 1


def test_deleting_a_stream_ends_its_publishers(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    producer.send(1, make_block(1))
    producer.acks(1)
    stub.DeleteStream(pb.DeleteStreamRequest(name="s"))
    error = producer.error()
    assert (code(error), error_name(error)) == ("NOT_FOUND", "StreamNotFoundError")
    create(stub)
    assert publish(stub, [2]) == {1: 0}
    assert Reader(stub, follow=False).rest() == [make_block(2)]
