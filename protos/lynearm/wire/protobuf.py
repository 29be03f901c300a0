"""Stream specs and stream states between protobuf messages and dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from lynearm.v1 import consumer_pb2, trace_pb2, trace_service_pb2
from lynearm.wire.blocks import MODE_FROM_PROTO, MODE_TO_PROTO
from lynearm.wire.errors import InvalidInputError, UnsupportedFormatError
from lynearm.wire.hidden_section import hidden_spec_from_proto, hidden_spec_to_proto
from lynearm.wire.retention import Retention
from lynearm.wire.specs import CodecSpec, LogprobsMode, StreamSpec, TeacherSpec, TokenizerSpec

_Name = TypeVar("_Name")


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """A stream and how far it is."""

    spec: StreamSpec
    sealed: bool
    """Takes no more blocks."""
    created_unix_nano: int
    next_offset: int
    """Offset that the next block will get; equals the number of blocks that were ever published."""
    trace_count: int = 0
    prompt_token_count: int = 0
    completion_token_count: int = 0
    size_bytes: int = 0
    """Encoded blocks."""
    finished_prompt_count: int = 0
    dictionary_count: int = 0
    dictionary_bytes: int = 0
    """Codec dictionaries; `size_bytes` does not include them."""
    first_offset: int = 0
    """Offset of the first block that the stream still keeps."""
    retained_bytes: int = 0
    """Encoded blocks that the stream still keeps; `size_bytes` counts all that it ever had."""
    retention: Retention = field(default_factory=Retention)
    max_lag_blocks: int = 0
    """Blocks that publishers may run ahead of the slowest consumer; 0: no bound."""
    max_lag_traces: int = 0
    """The same in traces."""


def teacher_to_proto(teacher: TeacherSpec) -> trace_pb2.TeacherSpec:
    """The message of a teacher."""
    return trace_pb2.TeacherSpec(
        model=teacher.model,
        revision=teacher.revision,
        engine=teacher.engine,
        dtype=teacher.dtype,
        vocab_size=teacher.vocab_size,
        max_model_len=teacher.max_model_len,
        logprobs_mode=_LOGPROBS_TO_PROTO[teacher.logprobs_mode],
        logprobs_temperature=teacher.logprobs_temperature,
    )


def teacher_from_proto(teacher: trace_pb2.TeacherSpec) -> TeacherSpec:
    """The teacher in a message.

    Raises:
        InvalidInputError: if the logprobs' mode is missing.
        UnsupportedFormatError: if it is newer than this package.
    """
    return TeacherSpec(
        model=teacher.model,
        revision=teacher.revision,
        engine=teacher.engine,
        dtype=teacher.dtype,
        vocab_size=teacher.vocab_size,
        max_model_len=teacher.max_model_len,
        logprobs_mode=_known(_LOGPROBS_FROM_PROTO, teacher.logprobs_mode, "teacher.logprobs_mode"),
        logprobs_temperature=teacher.logprobs_temperature,
    )


def tokenizer_to_proto(tokenizer: TokenizerSpec) -> trace_pb2.TokenizerSpec:
    """The message of a tokenizer."""
    return trace_pb2.TokenizerSpec(
        name=tokenizer.name,
        vocab_sha256=tokenizer.vocab_sha256,
        chat_template_sha256=tokenizer.chat_template_sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=tokenizer.eos_token_ids,
    )


def tokenizer_from_proto(tokenizer: trace_pb2.TokenizerSpec) -> TokenizerSpec:
    """The tokenizer in a message."""
    return TokenizerSpec(
        name=tokenizer.name,
        vocab_sha256=tokenizer.vocab_sha256,
        chat_template_sha256=tokenizer.chat_template_sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
    )


def spec_to_proto(spec: StreamSpec) -> trace_pb2.StreamSpec:
    """The message of a spec."""
    return trace_pb2.StreamSpec(
        name=spec.name,
        teacher=teacher_to_proto(spec.teacher),
        tokenizer=tokenizer_to_proto(spec.tokenizer),
        codec=trace_pb2.CodecSpec(
            mode=MODE_TO_PROTO[spec.codec.mode],
            top_k=spec.codec.top_k,
            min_probability=spec.codec.min_probability,
            draws=spec.codec.draws,
            tail_draws=spec.codec.tail_draws,
            hidden_states=None if spec.codec.hidden is None else hidden_spec_to_proto(spec.codec.hidden),
        ),
        license=spec.license,
        labels=dict(spec.labels),
    )


def spec_from_proto(message: trace_pb2.StreamSpec) -> StreamSpec:
    """The spec in a message.

    Raises:
        InvalidInputError: naming the field that is missing or out of range.
        UnsupportedFormatError: if a mode is newer than this package.
    """
    return StreamSpec(
        name=message.name,
        teacher=teacher_from_proto(message.teacher),
        tokenizer=tokenizer_from_proto(message.tokenizer),
        codec=CodecSpec(
            mode=_known(MODE_FROM_PROTO, message.codec.mode, "codec.mode"),
            top_k=message.codec.top_k,
            min_probability=message.codec.min_probability,
            draws=message.codec.draws,
            tail_draws=message.codec.tail_draws,
            hidden=(
                hidden_spec_from_proto(message.codec.hidden_states)
                if message.codec.HasField("hidden_states")
                else None
            ),
        ),
        license=message.license,
        labels=dict(message.labels),
    )


def stream_to_proto(info: StreamInfo) -> trace_service_pb2.Stream:
    """The message of a stream."""
    max_lag = consumer_pb2.MaxLag(blocks=info.max_lag_blocks, traces=info.max_lag_traces)
    return trace_service_pb2.Stream(
        spec=spec_to_proto(info.spec),
        state=trace_service_pb2.STREAM_STATE_SEALED if info.sealed else trace_service_pb2.STREAM_STATE_OPEN,
        created_unix_nano=info.created_unix_nano,
        next_offset=info.next_offset,
        trace_count=info.trace_count,
        prompt_token_count=info.prompt_token_count,
        completion_token_count=info.completion_token_count,
        size_bytes=info.size_bytes,
        finished_prompt_count=info.finished_prompt_count,
        dictionary_count=info.dictionary_count,
        dictionary_bytes=info.dictionary_bytes,
        first_offset=info.first_offset,
        retained_bytes=info.retained_bytes,
        retention=retention_to_proto(info.retention),
        max_lag=max_lag if max_lag.ByteSize() else None,
    )


def stream_from_proto(message: trace_service_pb2.Stream) -> StreamInfo:
    """The stream in a message.

    Raises:
        InvalidInputError: as for `spec_from_proto`.
        UnsupportedFormatError: as for `spec_from_proto`.
    """
    return StreamInfo(
        spec=spec_from_proto(message.spec),
        sealed=message.state == trace_service_pb2.STREAM_STATE_SEALED,
        created_unix_nano=message.created_unix_nano,
        next_offset=message.next_offset,
        trace_count=message.trace_count,
        prompt_token_count=message.prompt_token_count,
        completion_token_count=message.completion_token_count,
        size_bytes=message.size_bytes,
        finished_prompt_count=message.finished_prompt_count,
        dictionary_count=message.dictionary_count,
        dictionary_bytes=message.dictionary_bytes,
        first_offset=message.first_offset,
        retained_bytes=message.retained_bytes,
        retention=retention_from_proto(message.retention),
        max_lag_blocks=message.max_lag.blocks,
        max_lag_traces=message.max_lag.traces,
    )


def retention_to_proto(retention: Retention) -> trace_service_pb2.Retention:
    """The message of a retention."""
    return trace_service_pb2.Retention(
        max_age_seconds=retention.max_age_seconds,
        max_bytes=retention.max_bytes,
        consumers=retention.consumers,
    )


def retention_from_proto(message: trace_service_pb2.Retention) -> Retention:
    """The retention in a message.

    Raises:
        InvalidInputError: if a bound is absurdly large, or a name cannot be a consumer's.
    """
    return Retention(message.max_age_seconds, message.max_bytes, tuple(message.consumers))


_LOGPROBS_TO_PROTO = {
    "raw": trace_pb2.LOGPROBS_MODE_RAW,
    "processed": trace_pb2.LOGPROBS_MODE_PROCESSED,
}
_LOGPROBS_FROM_PROTO: dict[int, LogprobsMode] = {
    int(trace_pb2.LOGPROBS_MODE_RAW): "raw",
    int(trace_pb2.LOGPROBS_MODE_PROCESSED): "processed",
}


def _known(names: dict[int, _Name], value: int, field: str) -> _Name:
    if value == 0:
        raise InvalidInputError(f"stream spec: {field} is not said")
    if value not in names:
        raise UnsupportedFormatError(f"stream spec: {field} {value} is not known here", "upgrade lynearm")
    return names[value]
