"""Streams and blocks that hold just enough for the service, and real ones for what decodes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lynearm.client import TraceClient
from lynearm.wire.blocks import BlockHeader, checksum, join_block
from lynearm.wire.codec import encode_block
from lynearm.wire.specs import CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec
from lynearm.wire.traces import TopK, Trace

VOCAB_SIZE = 128

PACKINGS = {"even": [10] * 5, "single": [1] * 50, "uneven": [1, 17, 3, 20, 9]}
"""Streams of the traces 0 to 49, by the sizes of their blocks."""


def make_spec(name: str = "s", license: str = "Apache-2.0") -> StreamSpec:
    return StreamSpec(
        name=name,
        teacher=TeacherSpec("teacher", "sha256:00", "test", "float32", VOCAB_SIZE, 512),
        tokenizer=TokenizerSpec("tok", bytes(32), b"", VOCAB_SIZE, (2,)),
        codec=CodecSpec("exact", 4),
        license=license,
    )


def make_block(number: int, size_bytes: int = 2000) -> bytes:
    """A block of one trace whose payload nobody can decode."""
    payload = number.to_bytes(4, "little") * (size_bytes // 4)
    return join_block(BlockHeader(2, "exact", 1, 3, 5, size_bytes, checksum(payload)), payload)


def make_trace(number: int) -> Trace:
    """A trace that is told from others by its `prompt_id`."""
    positions = 2 + number % 3
    logprobs = np.log(np.full((positions, 2), [0.6, 0.3], np.float32))
    return Trace(
        prompt_id=f"p{number}",
        prompt_token_ids=np.array([1, number % VOCAB_SIZE], np.int32),
        completion_token_ids=np.full(positions, 7, np.int32),
        sampled_logprobs=logprobs[:, 0].copy(),
        top_k=TopK(
            np.tile(np.array([7, 9], np.int32), (positions, 1)), logprobs, np.full(positions, 0.1, np.float32)
        ),
        finish_reason="length",
    )


def encode_traces(numbers: Sequence[int]) -> bytes:
    """A block of such traces."""
    return encode_block(
        [make_trace(number) for number in numbers], codec=CodecSpec("exact", 2), vocab_size=VOCAB_SIZE
    )


def publish_traces(client: TraceClient, stream: str, sizes: Sequence[int]) -> None:
    """A new stream of blocks of so many traces, numbered throughout."""
    client.create_stream(make_spec(stream))
    first = 0
    with client.publisher(stream, "teacher") as publisher:
        for size in sizes:
            publisher.publish(encode_traces(range(first, first + size)))
            first += size
