"""What others spend on the same rows: their formats, written here from what they document."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from codec_corpus import count_tokens
from codec_measure import Blocks, Distances, Rows
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from lynearm.wire.traces import Trace

QUOTED_BITS = {
    16: [("vLLM chat JSON, words (quoted)", 9_925, "0")],
    64: [
        ("vLLM chat JSON, words (quoted)", 38_854, "0"),
        ("DistillKit, k = 50 (quoted)", 912, "7.4e-02"),
        ("DistillKit (quoted)", 1_472, "2.2e-02"),
    ],
    128: [
        ("vLLM chat JSON, words (quoted)", 78_307, "0"),
        ("DistillKit (quoted)", 2_496, "2.2e-02"),
    ],
}
"""By k: name, bits and added KL of what was measured elsewhere, on the rows of SmolLM2."""


def json_responses(traces: Iterable[Trace]) -> list[bytes]:
    """A chat response of vLLM for each completion, with `return_tokens_as_token_ids`."""
    return [_chat_response(trace) for trace in traces]


def measure_baselines(blocks: Blocks, vocab_size: int) -> list[tuple[str, float, Distances | None]]:
    """Name, bits per token and, for formats that round, distances."""
    traces = [trace for block in blocks for trace in block]
    tokens = count_tokens(traces)
    responses = json_responses(traces)
    k = traces[0].top_k.k
    rounded = _float16_distances(traces)
    sizes: list[tuple[str, int, Distances | None]] = [
        ("vLLM chat JSON", _total(responses), None),
        ("the same, gzip", _total(gzip.compress(response, 6) for response in responses), None),
        ("verl recipe, 8 B an entry", (8 * k + 4) * tokens, None),
        ("protobuf, varint + float32", _total(map(_protobuf, traces)), None),
        ("int32 + float16, zstd-3", _total_zstd(blocks, _plain_rows), rounded),
    ]
    if vocab_size <= 1 << 16:
        size = _total_zstd(blocks, _shuffled_columns)
        sizes.append(("16-bit ids + float16, planes", size, rounded))
    return [(name, size * 8 / tokens, distances) for name, size, distances in sizes]


def _chat_response(trace: Trace) -> bytes:
    rows = zip(
        trace.completion_token_ids.tolist(),
        trace.sampled_logprobs.tolist(),
        trace.top_k.token_ids.tolist(),
        trace.top_k.logprobs.tolist(),
        strict=True,
    )
    content = [
        _entry(sampled, logprob)
        | {"top_logprobs": [_entry(*pair) for pair in zip(ids, logprobs, strict=True)]}
        for sampled, logprob, ids, logprobs in rows
    ]
    response = {"choices": [{"index": 0, "logprobs": {"content": content}}]}
    return json.dumps(response, separators=(",", ":")).encode()


def _entry(token_id: int, logprob: float) -> dict[str, Any]:
    token = f"token_id:{token_id}"
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _position_message() -> Any:
    kinds = descriptor_pb2.FieldDescriptorProto
    message = descriptor_pb2.DescriptorProto(name="Position")
    fields = [
        ("sampled_id", kinds.TYPE_UINT32, kinds.LABEL_OPTIONAL),
        ("sampled_logprob", kinds.TYPE_FLOAT, kinds.LABEL_OPTIONAL),
        ("token_ids", kinds.TYPE_UINT32, kinds.LABEL_REPEATED),
        ("logprobs", kinds.TYPE_FLOAT, kinds.LABEL_REPEATED),
        ("tail_mass", kinds.TYPE_FLOAT, kinds.LABEL_OPTIONAL),
    ]
    for number, (name, kind, label) in enumerate(fields, 1):
        message.field.add(name=name, number=number, type=kind, label=label)
    file = descriptor_pb2.FileDescriptorProto(name="baseline.proto", syntax="proto3", message_type=[message])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Position"))


_POSITION = _position_message()


def _protobuf(trace: Trace) -> bytes:
    """A message for each position, with the tag and size that it has as an element of a repeated field."""
    top_k = trace.top_k
    parts: list[bytes] = []
    for t, sampled in enumerate(trace.completion_token_ids.tolist()):
        message = _POSITION(
            sampled_id=sampled,
            sampled_logprob=trace.sampled_logprobs[t],
            token_ids=top_k.token_ids[t].tolist(),
            logprobs=top_k.logprobs[t].tolist(),
            tail_mass=top_k.tail_mass[t],
        ).SerializeToString()
        parts.append(bytes(1 + (1 if len(message) < 128 else 2)) + message)
    return b"".join(parts)


def _plain_rows(block: Sequence[Trace]) -> bytes:
    parts: list[bytes] = []
    for trace in block:
        for t in range(trace.completion_token_ids.size):
            parts += [
                trace.completion_token_ids[t].tobytes(),
                trace.sampled_logprobs[t].astype(np.float16).tobytes(),
                trace.top_k.tail_mass[t].tobytes(),
                trace.top_k.token_ids[t].tobytes(),
                trace.top_k.logprobs[t].astype(np.float16).tobytes(),
            ]
    return b"".join(parts)


def _shuffled_columns(block: Sequence[Trace]) -> bytes:
    """All low bytes side by side, then all high bytes, of ids and of numbers; vocabularies up to 2^16."""
    ids = [np.c_[trace.completion_token_ids, trace.top_k.token_ids] for trace in block]
    values = [np.c_[trace.sampled_logprobs, trace.top_k.tail_mass, trace.top_k.logprobs] for trace in block]
    columns = [np.concatenate(ids).T.astype("<u2"), np.concatenate(values).T.astype("<f2")]
    return b"".join(_shuffle(column) for column in columns)


def _shuffle(array: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def _float16_distances(traces: Sequence[Trace]) -> Distances:
    rows = Rows.of(traces)
    rounded = Rows(
        rows.token_ids_NK,
        rows.logprobs_NK.astype(np.float16).astype(np.float32),
        rows.tail_mass_N.astype(np.float16).astype(np.float32),
    )
    return Distances.between(rows, rounded)


def _total(parts: Iterable[bytes]) -> int:
    return sum(map(len, parts))


def _total_zstd(blocks: Blocks, write: Callable[[Sequence[Trace]], bytes]) -> int:
    compressor = zstandard.ZstdCompressor(level=3)
    return _total(compressor.compress(write(block)) for block in blocks)
