"""Finished work, labels and passed-over blocks in hand-framed messages, against the generated code."""

from __future__ import annotations

import hashlib

import pytest
from wire.building import publish_request

from lynearm.v1 import consumer_pb2, prompt_queue_pb2, trace_pb2, trace_service_pb2
from lynearm.wire.blocks import BlockHeader, checksum, join_block
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.frames import (
    PublishBlock,
    PublishOpen,
    SkippedBlocks,
    SubscribedBlock,
    frame_publish_open,
    frame_skipped,
    frame_subscribe_response,
    parse_fetch_response,
    parse_publish_request,
    parse_subscribe_response,
)
from lynearm.wire.labels import TagSummary
from lynearm.wire.work import (
    DIGEST_OF_NOTHING,
    FinishedSamples,
    FinishedWork,
    LeaseKey,
    check_prompt_id,
    extend_digest,
)

PAYLOAD = bytes(range(256))
BLOCK = join_block(BlockHeader(1, "exact", 2, 3, 5, 256, checksum(PAYLOAD)), PAYLOAD)
WORK = (
    FinishedWork(LeaseKey(7, 2), (FinishedSamples("p0", (0, 3)), FinishedSamples("p1", (65_535,)))),
    FinishedWork(LeaseKey(2**63, 2**64 - 1), (FinishedSamples("p0", (1,)),)),
)
TAGS = TagSummary(frozenset({("a", "1"), ("a", "2")}), frozenset({"b"}))


def test_work_and_tags_are_read_as_they_were_publish_request() -> None:
    for tags in (TAGS, TagSummary(), None):
        frame = publish_request(3, BLOCK, ("q",), finished_work=WORK, tags=tags)
        parsed = parse_publish_request(frame)
        assert parsed == (PublishBlock(3, memoryview(BLOCK), ("q",), WORK, tags),)


def test_generated_code_reads_and_writes_the_same_bytes() -> None:
    frame = publish_request(3, BLOCK, ("q",), finished_work=WORK, tags=TAGS)
    message = trace_service_pb2.PublishRequest.FromString(frame)
    assert message.SerializeToString() == frame
    assert message.blocks[0].finished_work[0].prompts[0].sample_indices == [0, 3]
    assert message.blocks[0].tags.open_keys == ["b"]
    opening = PublishOpen("s", "p", 4, {"role": "teacher"}, no_wait=True)
    assert parse_publish_request(frame_publish_open(opening)) == opening


def test_a_response_says_what_was_passed_over_and_used() -> None:
    frame = frame_subscribe_response(9, BLOCK, 12, skipped=3, used_traces=1)
    message = trace_service_pb2.SubscribeResponse.FromString(frame)
    assert (message.offset, message.next_offset, message.skipped, message.used_traces) == (9, 12, 3, 1)
    assert message.SerializeToString() == frame
    parsed = parse_subscribe_response(frame)
    assert isinstance(parsed, SubscribedBlock)
    assert (parsed.skipped, parsed.used_traces, bytes(parsed.block)) == (3, 1, BLOCK)


def test_blocks_may_be_passed_over_without_a_block() -> None:
    word = SkippedBlocks(offset=9, next_offset=12, skipped=5)
    frame = frame_skipped(word)
    message = trace_service_pb2.SubscribeResponse.FromString(frame)
    assert (message.HasField("block"), message.offset, message.skipped) == (False, 9, 5)
    assert parse_subscribe_response(frame) == word
    with pytest.raises(InvalidInputError, match="no block"):
        parse_fetch_response(frame)
    with pytest.raises(InvalidInputError, match="no block"):
        parse_subscribe_response(trace_service_pb2.SubscribeResponse(offset=3).SerializeToString())


def request_with(**fields: object) -> bytes:
    block = trace_service_pb2.PublishBlock(
        sequence=1,
        block=trace_pb2.Block.FromString(BLOCK),
        **fields,  # type: ignore[arg-type]  # by name
    )
    return trace_service_pb2.PublishRequest(blocks=[block]).SerializeToString()


def work_of(prompt_id: str, *indices: int, lease_id: int = 1) -> prompt_queue_pb2.FinishedWork:
    prompts = [prompt_queue_pb2.FinishedSamples(prompt_id=prompt_id, sample_indices=indices)]
    return prompt_queue_pb2.FinishedWork(
        lease=prompt_queue_pb2.LeaseKey(lease_id=lease_id, generation=1), prompts=prompts
    )


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"finished_work": [prompt_queue_pb2.FinishedWork()]}, "names no prompt"),
        ({"finished_work": [work_of("p")]}, "are none"),
        ({"finished_work": [work_of("p", 2, 1)]}, "do not ascend"),
        ({"finished_work": [work_of("p", 1, 1)]}, "do not ascend"),
        ({"finished_work": [work_of("", 1)]}, "prompt id of 0 bytes"),
        ({"finished_work": [work_of("p\0", 1)]}, "NUL"),
        ({"finished_work": [work_of("p", 1), work_of("q", 1)]}, "names a lease twice"),
        ({"finished_work": [work_of("p", *range(65_536))], "finished_prompt_ids": ["q"]}, "at most 65536"),
        ({"tags": consumer_pb2.TagSummary(open_keys=[str(n) for n in range(65)])}, "65 open keys"),
        ({"finished_prompt_ids": ["\0"]}, "NUL"),
    ],
)
def test_work_that_cannot_be_is_refused(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        parse_publish_request(request_with(**fields))


def test_bytes_that_are_no_message_are_refused() -> None:
    good = publish_request(3, BLOCK, finished_work=WORK[:1], tags=TAGS)
    refused = 0
    for position in range(len(good) - 60, len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 0xFF
        try:
            parse_publish_request(bytes(damaged))
        except InvalidInputError:
            refused += 1
    assert refused > 20


def test_half_a_character_is_no_prompt_id() -> None:
    with pytest.raises(InvalidInputError, match="half a character"):
        check_prompt_id("\ud800")


def test_the_digest_is_the_chain_that_the_contract_describes() -> None:
    digest = bytes(32)
    expected = DIGEST_OF_NOTHING
    for prompt_id, content in (("a", b"one"), ("é", b""), ("a", b"one")):
        name = prompt_id.encode()
        digest = hashlib.sha256(digest + len(name).to_bytes(4, "little") + name + content).digest()
        expected = extend_digest(expected, prompt_id, content)
    assert digest == expected
    assert extend_digest(bytes(32), "ab", b"c") != extend_digest(bytes(32), "a", b"bc")
