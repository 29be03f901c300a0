"""What traces say besides their distributions, as the protobuf message that begins every payload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from lynearm.v1 import trace_pb2
from lynearm.wire.errors import CodecError, CorruptBlockError
from lynearm.wire.hidden import HiddenStatesSpec
from lynearm.wire.hidden_section import MAX_DESCRIPTION_BYTES, hidden_spec_to_proto
from lynearm.wire.jit import Scalar, compiled
from lynearm.wire.sampling import sampling_from_proto, sampling_to_proto
from lynearm.wire.specs import MAX_TOP_K, MAX_VOCAB_SIZE
from lynearm.wire.traces import (
    MAX_STOPS,
    FinishReason,
    Int32Array,
    SamplingParams,
    SpanKind,
    TokenSpan,
    Trace,
)

MAX_PROMPT_ID_BYTES = 256

MAX_BLOCK_ITEMS = 1 << 20
"""Bound on the spans of a block, and on its tags: each becomes an object in memory."""

_MAX_SINGLE_FIELDS = 64 + MAX_STOPS
"""Fields of a trace that are neither spans nor tags, those of its sampling included: more than it has, for
those to come."""

_TRACES_KEY = 1 << 3 | 2
"""Key of `BlockMetadata.traces` on the wire."""

_SAMPLING_KEY = 8 << 3 | 2
"""Key of `TraceMetadata.sampling`."""

_HIDDEN_KEY = 10 << 3 | 2
"""Key of `BlockMetadata.hidden_states`."""

_Name = TypeVar("_Name")

_FINISH_REASON_CODES: dict[FinishReason, trace_pb2.FinishReason.ValueType] = {
    "stop": trace_pb2.FINISH_REASON_STOP,
    "length": trace_pb2.FINISH_REASON_LENGTH,
    "abort": trace_pb2.FINISH_REASON_ABORT,
}
_SPAN_KIND_CODES: dict[SpanKind, trace_pb2.SpanKind.ValueType] = {
    "reasoning": trace_pb2.SPAN_KIND_REASONING,
    "answer": trace_pb2.SPAN_KIND_ANSWER,
    "truncated_reasoning": trace_pb2.SPAN_KIND_TRUNCATED_REASONING,
}
NO_ENTRIES: Final = MAX_TOP_K + 1
"""Says that rows have no entries, where the dictionary's have some."""

_USUAL_FINISH: FinishReason = "stop"
"""Takes no bytes."""

_FINISH_REASONS: dict[int, FinishReason] = {
    trace_pb2.FINISH_REASON_UNSPECIFIED: _USUAL_FINISH,
    **{int(code): name for name, code in _FINISH_REASON_CODES.items()},
}
_SPAN_KINDS: dict[int, SpanKind] = {int(code): name for name, code in _SPAN_KIND_CODES.items()}


@dataclass(frozen=True, slots=True)
class TraceMetadata:
    """What a trace says besides its positions."""

    prompt_id: str
    prompt_token_ids: Int32Array
    """All of them, or the first one where the prompt's rows name the others."""
    prompt_rows: int
    completion_length: int
    top_k: int
    """Width of the rows."""
    finish_reason: FinishReason
    sample_index: int
    sampling: SamplingParams
    spans: tuple[TokenSpan, ...]
    tags: dict[str, str]
    completion_text: str
    stop_string: str


def write_metadata(
    traces: Sequence[Trace], hidden: HiddenStatesSpec | None = None, *, usual_top_k: int = 0
) -> bytes:
    """The metadata of some traces, as a `lynearm.v1.BlockMetadata`.

    Args:
        traces: Of one block.
        hidden: Hidden states that they all have.
        usual_top_k: Width of rows that takes no bytes: the dictionary's.

    Raises:
        CodecError: if a value has no place in it; the message names the prompt.
    """
    message = trace_pb2.BlockMetadata()
    before = SamplingParams()
    for trace in traces:
        try:
            message.traces.append(_write_trace(trace, before, usual_top_k))
        except (ValueError, TypeError) as error:
            raise CodecError(f"trace of prompt {trace.prompt_id!r}: {error}") from error
        before = trace.sampling
    # The header has the sum of them all.
    message.traces[-1].ClearField("completion_length")
    for what, count in (
        ("spans", sum(len(trace.spans) for trace in traces)),
        ("tags", sum(len(trace.tags) for trace in traces)),
    ):
        if count > MAX_BLOCK_ITEMS:
            raise CodecError(
                f"{count} {what} exceed a block's limit of {MAX_BLOCK_ITEMS}",
                "put fewer traces into one block",
            )
    if hidden is not None:
        message.hidden_states.CopyFrom(hidden_spec_to_proto(hidden))
    return message.SerializeToString(deterministic=True)


def parse_metadata(data: bytes | memoryview, *, trace_count: int) -> trace_pb2.BlockMetadata:
    """The message that `write_metadata` wrote, with the sizes of everything in it checked.

    Args:
        data: A serialised `lynearm.v1.BlockMetadata`.
        trace_count: How many traces it describes.

    Raises:
        CorruptBlockError: if it is not that, or a size is out of bounds.
    """
    # First, since an empty message of two bytes becomes an object of a hundred.
    traces, fields, hidden = _count_messages(np.frombuffer(data, np.uint8))
    if traces < 0:
        raise CorruptBlockError("the metadata is no lynearm.v1.BlockMetadata")
    if traces != trace_count:
        raise CorruptBlockError(f"metadata of {traces} traces, the header says {trace_count}")
    if fields > 2 * MAX_BLOCK_ITEMS + _MAX_SINGLE_FIELDS * trace_count:
        raise CorruptBlockError(f"{fields} fields of metadata are beyond any block")
    if hidden > MAX_DESCRIPTION_BYTES:
        raise CorruptBlockError(f"{hidden} bytes to describe hidden states are beyond any block")
    try:
        message = trace_pb2.BlockMetadata.FromString(bytes(data))
    except DecodeError as error:
        raise CorruptBlockError("the metadata is no lynearm.v1.BlockMetadata") from error
    if fields > MAX_BLOCK_ITEMS:
        for what, count in (
            ("spans", sum(len(trace.spans) for trace in message.traces)),
            ("tags", sum(len(trace.tags) for trace in message.traces)),
        ):
            if count > MAX_BLOCK_ITEMS:
                raise CorruptBlockError(f"{count} {what} exceed a block's limit of {MAX_BLOCK_ITEMS}")
    return message


@dataclass(frozen=True, slots=True)
class TraceShapes:
    """Rows of every trace of a block."""

    row_counts: list[int]
    """Those of its prompt, where it has any, and those of its completion."""
    prompt_row_counts: list[int]
    widths: list[int]
    """Most entries of a row."""
    before: list[int]
    """Last token before its rows; −1 for none."""
    prompt_tokens: int
    """Of all traces."""
    highest_prompt_token: int
    """Of those that are not sampled tokens of rows; 0 where there are none."""


def read_shapes(message: trace_pb2.BlockMetadata, *, completion_tokens: int, usual_top_k: int) -> TraceShapes:
    """How many rows traces have, and what is needed to read them.

    Args:
        message: From `parse_metadata`.
        completion_tokens: Of all traces, as the block's header has it.
        usual_top_k: Width of rows where a trace does not say it.

    Raises:
        CorruptBlockError: if a trace's rows are too wide, or the completions longer than the header says.
    """
    row_counts: list[int] = []
    prompt_row_counts: list[int] = []
    widths: list[int] = []
    before: list[int] = []
    prompt_tokens = highest = length = 0
    # One pass: every look at a message's field makes an object.
    for trace in message.traces:
        rows, length, prompt, width = (
            trace.prompt_rows,
            trace.completion_length,
            trace.prompt_token_ids,
            trace.top_k,
        )
        row_counts.append(rows + length)
        prompt_row_counts.append(rows)
        widths.append(width or usual_top_k)
        completion_tokens -= length
        prompt_tokens += rows
        last = -1
        if prompt:
            prompt_tokens += len(prompt)
            largest = max(prompt)
            highest = max(highest, largest)
            last = prompt[-1]
        if rows and len(prompt) != 1:
            raise CorruptBlockError("a prompt with distributions names more than its first token")
        # What is no token id is refused later; until then it is none.
        before.append(last if last < MAX_VOCAB_SIZE else -1)
    if completion_tokens < 0 or (completion_tokens and length):
        raise CorruptBlockError(
            f"completions that differ by {completion_tokens} tokens from what the header says"
        )
    row_counts[-1] += completion_tokens
    if max(widths) > MAX_TOP_K:
        if max(widths) > NO_ENTRIES:
            raise CorruptBlockError(f"rows of {max(widths)} entries, at most {MAX_TOP_K} are kept")
        widths = [0 if width == NO_ENTRIES else width for width in widths]
    return TraceShapes(row_counts, prompt_row_counts, widths, before, prompt_tokens, highest)


def read_metadata(message: trace_pb2.BlockMetadata, shapes: TraceShapes) -> list[TraceMetadata]:
    """The metadata of every trace, in order.

    Args:
        message: From `parse_metadata`.
        shapes: From `read_shapes`.

    Raises:
        CorruptBlockError: if a value is out of bounds.
    """
    sampling = SamplingParams()
    found: list[TraceMetadata] = []
    for index, trace in enumerate(message.traces):
        if trace.HasField("sampling"):
            sampling = sampling_from_proto(trace.sampling)
        found.append(_read_trace(trace, sampling, shapes, index))
    return found


def _write_trace(trace: Trace, before: SamplingParams, usual_top_k: int) -> trace_pb2.TraceMetadata:
    if len(trace.prompt_id.encode()) > MAX_PROMPT_ID_BYTES:
        raise ValueError(
            f"its id is longer than {MAX_PROMPT_ID_BYTES} bytes: name the prompt by a shorter one"
        )
    prompt_rows = 0 if trace.prompt_top_k is None else trace.prompt_top_k.positions
    width = trace.top_k.k if trace.prompt_top_k is None else max(trace.top_k.k, trace.prompt_top_k.k)
    prompt = trace.prompt_token_ids[:1] if prompt_rows else trace.prompt_token_ids
    message = trace_pb2.TraceMetadata(
        prompt_id=trace.prompt_id,
        prompt_token_ids=prompt.tolist(),
        prompt_rows=prompt_rows,
        completion_length=trace.completion_token_ids.size,
        top_k=0 if width == usual_top_k else width or NO_ENTRIES,
        finish_reason=_FINISH_REASON_CODES[trace.finish_reason],
        sample_index=trace.sample_index,
        spans=[
            trace_pb2.TokenSpan(
                kind=_SPAN_KIND_CODES[span.kind], start=span.start, length=span.end - span.start
            )
            for span in trace.spans
        ],
        tags=[trace_pb2.Tag(key=key, value=value) for key, value in trace.tags.items()],
        completion_text=trace.completion_text,
    )
    if trace.finish_reason == _USUAL_FINISH:
        message.ClearField("finish_reason")
    if trace.stop_string:
        message.stop_number = 1 + trace.sampling.stop.index(trace.stop_string)
    if trace.sampling != before:
        message.sampling.CopyFrom(sampling_to_proto(trace.sampling))
    return message


def _read_trace(
    message: trace_pb2.TraceMetadata, sampling: SamplingParams, shapes: TraceShapes, index: int
) -> TraceMetadata:
    prompt_rows = shapes.prompt_row_counts[index]
    prompt_token_ids = np.array(message.prompt_token_ids, np.uint32)
    if prompt_token_ids.size and prompt_token_ids.max() >= 1 << 31:
        raise CorruptBlockError(f"prompt token {prompt_token_ids.max()} is no token id")
    tags = {tag.key: tag.value for tag in message.tags}
    if len(tags) != len(message.tags):
        raise CorruptBlockError("a trace has the same tag twice")
    return TraceMetadata(
        prompt_id=message.prompt_id,
        prompt_token_ids=prompt_token_ids.astype(np.int32),
        prompt_rows=prompt_rows,
        completion_length=shapes.row_counts[index] - prompt_rows,
        top_k=shapes.widths[index],
        finish_reason=_look_up(_FINISH_REASONS, message.finish_reason, "finish reason"),
        sample_index=message.sample_index,
        sampling=sampling,
        spans=tuple(
            TokenSpan(_look_up(_SPAN_KINDS, span.kind, "span kind"), span.start, span.start + span.length)
            for span in message.spans
        ),
        tags=tags,
        completion_text=message.completion_text,
        stop_string=_stop_string(message.stop_number, sampling),
    )


def _stop_string(number: int, sampling: SamplingParams) -> str:
    if number > len(sampling.stop):
        raise CorruptBlockError(f"stop string {number} of {len(sampling.stop)}")
    return sampling.stop[number - 1] if number else ""


def _look_up(names: dict[int, _Name], code: int, what: str) -> _Name:
    if code not in names:
        raise CorruptBlockError(f"{what} {code} is none of {sorted(names)}")
    return names[code]


@compiled
def _count_messages(data: npt.NDArray[np.uint8]) -> tuple[int, int, int]:
    """Traces of a `BlockMetadata`, −1 where it is not one; fields of all; bytes of `hidden_states`."""
    traces = 0
    fields = 0
    hidden = 0
    at = 0
    while at < data.size:
        key, inner, end = _field_at(data, at, data.size)
        if end < 0:
            return -1, 0, 0
        at = end
        if key != _TRACES_KEY:
            hidden += end - inner if key == _HIDDEN_KEY else 0
            continue
        traces += 1
        while inner < end:
            key, begin, inner = _field_at(data, inner, end)
            if inner < 0:
                return -1, 0, 0
            fields += 1
            # A stop string of no bytes takes two on the wire, and sixteen in memory.
            while key == _SAMPLING_KEY and begin < inner:
                _, _, begin = _field_at(data, begin, inner)
                if begin < 0:
                    return -1, 0, 0
                fields += 1
    return traces, fields, hidden


@compiled
def _field_at(data: npt.NDArray[np.uint8], at: int, end: int) -> tuple[int, int, int]:
    """A field's key, where its content begins, and its end; the latter is −1 where there is no field."""
    key, at = _varint_at(data, at, end)
    wire_type = key & 7
    if at < 0:
        return 0, 0, -1
    size = 0
    if wire_type == 0:
        _, begin = _varint_at(data, at, end)
        return key, at, begin
    if wire_type == 1:
        size = 8
    elif wire_type == 2:
        size, at = _varint_at(data, at, end)
    elif wire_type == 5:
        size = 4
    else:
        return 0, 0, -1
    if at < 0 or not 0 <= size <= end - at:
        return 0, 0, -1
    return key, at, at + size


@compiled
def _varint_at(data: npt.NDArray[np.uint8], at: int, end: int) -> tuple[int, int]:
    """A varint, and what follows it: −1 where there is none. Values from 2^63 on wrap, to below 0."""
    value = 0
    for index in range(10):
        if at + index >= end:
            return 0, -1
        byte: Scalar = np.int64(data[at + index])
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    return 0, -1
