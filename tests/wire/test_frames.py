"""Hand-framed messages against the generated code, in both directions."""

from __future__ import annotations

import pytest
from wire.building import publish_request

from lynearm.v1 import trace_pb2, trace_service_pb2
from lynearm.wire.blocks import BlockHeader, checksum, join_block, split_block, verify_block
from lynearm.wire.errors import CodecError, CorruptBlockError, InvalidInputError, UnsupportedFormatError
from lynearm.wire.fields import read_fields, varint
from lynearm.wire.frames import (
    PublishBlock,
    PublishOpen,
    frame_damaged_block,
    frame_fetch_response,
    frame_publish_open,
    frame_subscribe_response,
    parse_fetch_response,
    parse_publish_request,
    parse_subscribe_response,
    publish_block_parts,
)

PAYLOAD = bytes(range(256)) * 5


def make_header(**changes: object) -> BlockHeader:
    values: dict[str, object] = {
        "format_version": 1,
        "codec_mode": "exact",
        "trace_count": 2,
        "prompt_token_count": 11,
        "completion_token_count": 300,
        "uncompressed_size_bytes": 70_000,
        "payload_xxh3": checksum(PAYLOAD, format_version=1),
    } | changes
    return BlockHeader(**values)  # type: ignore[arg-type]  # fields by name


BLOCK = join_block(make_header(), PAYLOAD)


def test_a_joined_block_is_a_protobuf_block() -> None:
    message = trace_pb2.Block.FromString(BLOCK)
    assert message.payload == PAYLOAD
    assert message.header.completion_token_count == 300
    assert message.header.payload_xxh3 == checksum(PAYLOAD, format_version=1)
    assert message.SerializeToString() == BLOCK


def test_a_generated_block_verifies() -> None:
    message = trace_pb2.Block.FromString(BLOCK)
    assert verify_block(message.SerializeToString()) == make_header()
    assert bytes(split_block(memoryview(BLOCK))[1]) == PAYLOAD


def test_fields_of_a_later_version_are_skipped() -> None:
    newer = BLOCK + varint(9 << 3) + varint(1 << 40) + varint(12 << 3 | 2) + varint(3) + b"abc"
    assert verify_block(newer) == make_header()


def test_every_flipped_bit_of_the_payload_is_noticed() -> None:
    start = BLOCK.index(PAYLOAD)
    for position in range(start, len(BLOCK), 97):
        for bit in range(8):
            damaged = bytearray(BLOCK)
            damaged[position] ^= 1 << bit
            with pytest.raises(CorruptBlockError, match="XXH3"):
                verify_block(bytes(damaged))


@pytest.mark.parametrize("size", [0, 1, 5, 30, len(BLOCK) // 2, len(BLOCK) - 1])
def test_a_truncated_block_is_refused(size: int) -> None:
    with pytest.raises((InvalidInputError, CorruptBlockError)):
        verify_block(BLOCK[:size])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"trace_count": 0}, CorruptBlockError),
        ({"uncompressed_size_bytes": 0}, CorruptBlockError),
        ({"uncompressed_size_bytes": (64 << 20) + 1}, CorruptBlockError),
        ({"format_version": 0, "payload_xxh3": 0}, InvalidInputError),
        ({"format_version": 3, "payload_xxh3": 0}, UnsupportedFormatError),
    ],
)
def test_a_header_out_of_bounds_is_refused(changes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        verify_block(join_block(make_header(**changes), PAYLOAD))


def test_an_unknown_codec_mode_asks_for_an_upgrade() -> None:
    message = trace_pb2.Block.FromString(BLOCK)
    message.header.codec_mode = 77  # type: ignore[assignment]  # a later enum value
    with pytest.raises(UnsupportedFormatError, match="upgrade lynearm"):
        verify_block(message.SerializeToString())


def test_a_block_with_two_payloads_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="twice"):
        split_block(BLOCK + trace_pb2.Block(payload=b"more").SerializeToString())


def test_a_payload_beyond_the_bound_is_not_joined() -> None:
    with pytest.raises(CodecError, match="fewer traces"):
        join_block(make_header(), bytes((3 << 20) + 1))


@pytest.mark.parametrize("finished", [(), ("a",), ("p-1", "Größe ✓", "x" * 256)])
@pytest.mark.parametrize("sequence", [1, 127, 128, 2**63])
def test_publish_blocks_match_the_generated_code(sequence: int, finished: tuple[str, ...]) -> None:
    data = publish_request(sequence, BLOCK, finished)
    message = trace_service_pb2.PublishRequest.FromString(data)
    (block,) = message.blocks
    assert block.sequence == sequence
    assert tuple(block.finished_prompt_ids) == finished
    assert block.block == trace_pb2.Block.FromString(BLOCK)
    parsed = parse_publish_request(message.SerializeToString())
    assert parsed == (PublishBlock(sequence, memoryview(BLOCK), finished),)


def test_blocks_that_are_joined_are_one_request() -> None:
    data = b"".join(part for sequence in (1, 2, 3) for part in publish_block_parts(sequence, BLOCK))
    message = trace_service_pb2.PublishRequest.FromString(data)
    assert [block.sequence for block in message.blocks] == [1, 2, 3]
    assert message.SerializeToString() == data
    parsed = parse_publish_request(data)
    assert parsed == tuple(PublishBlock(sequence, memoryview(BLOCK)) for sequence in (1, 2, 3))


def test_publish_open_matches_the_generated_code() -> None:
    opening = PublishOpen("stream", "teacher-0", 7)
    message = trace_service_pb2.PublishRequest.FromString(frame_publish_open(opening))
    assert (message.open.stream, message.open.producer_id, message.open.epoch) == ("stream", "teacher-0", 7)
    assert parse_publish_request(message.SerializeToString()) == opening


@pytest.mark.parametrize("offset", [0, 1, 300, 2**40])
def test_subscribe_responses_match_the_generated_code(offset: int) -> None:
    data = frame_subscribe_response(offset, BLOCK, offset + 4)
    message = trace_service_pb2.SubscribeResponse.FromString(data)
    assert (message.offset, message.next_offset) == (offset, offset + 4)
    assert message.SerializeToString() == data
    parsed = parse_subscribe_response(data)
    assert (parsed.offset, bytes(parsed.block), parsed.next_offset) == (offset, BLOCK, offset + 4)


def test_named_damage_matches_the_generated_code() -> None:
    data = frame_damaged_block(7, "block 7 is beschädigt", 9)
    message = trace_service_pb2.SubscribeResponse.FromString(data)
    assert (message.offset, message.damage, message.next_offset) == (7, "block 7 is beschädigt", 9)
    assert not message.HasField("block")
    parsed = parse_subscribe_response(message.SerializeToString())
    assert (parsed.offset, parsed.damage, parsed.next_offset) == (7, "block 7 is beschädigt", 9)
    assert not parsed.block
    assert parse_subscribe_response(frame_subscribe_response(7, BLOCK, 9)).damage == ""


def test_fetch_responses_match_the_generated_code() -> None:
    data = frame_fetch_response(12, BLOCK)
    message = trace_service_pb2.FetchBlocksResponse.FromString(data)
    assert message.SerializeToString() == data
    assert parse_fetch_response(data).offset == 12


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x12",
        b"\x12\x05ab",
        b"\x0b\x0c",
        b"\xff" * 11,
        b"\x08\x01",
        frame_publish_open(PublishOpen("s", "p")) * 2,
        frame_publish_open(PublishOpen("s", "p")) + publish_request(1, BLOCK),
        publish_request(0, BLOCK),
        publish_request(1, BLOCK) + publish_request(0, BLOCK),
        publish_request(1, BLOCK, ("",)),
        publish_request(1, BLOCK, ("x" * 257,)),
    ],
)
def test_what_is_no_publish_request_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInputError):
        parse_publish_request(data)


def test_a_number_of_more_than_64_bits_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="64 bits"):
        list(read_fields(b"\x08" + b"\xff" * 9 + b"\x7f"))
