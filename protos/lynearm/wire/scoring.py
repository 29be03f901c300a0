"""Completions to be scored, and what comes back, between protobuf messages and arrays.

A result travels as a block of traces, which the codec encodes, and beside it the logprobs at the ids that
the student chose: ids that the sender knows need not come back, and their values need no order. Those are
float32, or 16-bit steps of 1/1024 nat: an error of at most 0.0005 nats at every probability above 1.6e-28,
for half of the bytes.

Shape legend: P = prompt tokens, T = completion positions, K = kept entries, S = chosen ids per position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.v1 import trace_pb2
from lynearm.wire.blocks import MAX_PAYLOAD_BYTES, MODE_FROM_PROTO, MODE_TO_PROTO
from lynearm.wire.errors import (
    CorruptBlockError,
    InvalidInputError,
    LynearmError,
    UnsupportedFormatError,
    error_from_status,
)
from lynearm.wire.protobuf import (
    teacher_from_proto,
    teacher_to_proto,
    tokenizer_from_proto,
    tokenizer_to_proto,
)
from lynearm.wire.specs import (
    CODEC_MODES,
    MAX_TAIL_DRAWS,
    MAX_TOP_K,
    CodecMode,
    CodecSpec,
    TeacherSpec,
    TokenizerSpec,
    bound_position_bytes,
    check_name,
)
from lynearm.wire.status import STATUS_NUMBERS, error_name_of, reason_of, shorten
from lynearm.wire.traces import FINISH_REASONS, FinishReason, Float32Array, Int32Array, Trace

MAX_CHOSEN_IDS = 1024
"""At a position."""

MAX_REQUEST_ID_BYTES = 256

MAX_RESULT_BYTES = MAX_PAYLOAD_BYTES
"""Of one completion's result: it travels in one message."""

_FIXED16_STEPS_PER_NAT = 1024
_FIXED16_LAST = 65535


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """A served teacher, and what it takes."""

    spec: TeacherSpec
    tokenizer: TokenizerSpec
    license: str = ""
    """Empty when not said."""
    max_top_k: int = MAX_TOP_K
    max_chosen_ids: int = MAX_CHOSEN_IDS
    """0 where it scores none."""


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """What is wanted of every completion of a call.

    Raises:
        InvalidInputError: naming the field that is out of range.
    """

    session: str = ""
    """Within which requests are named; empty: one that the client makes up."""
    top_k: int = 64
    """Entries kept per position."""
    min_probability: float = 0.0
    """Of the top_k entries, keep those with at least this probability, and at least one. 0 keeps all."""
    temperature: float = 1.0
    """Divides the logits before the distribution is taken, over the whole vocabulary."""
    codec: CodecMode = "fine"
    """"fine" keeps logprobs to 0.004 nats, at a third of the bytes of "exact"."""
    tail_draws: int = 0
    """Tokens drawn from the tail of each position, as in a stream."""

    def __post_init__(self) -> None:
        """Check every field."""
        if self.session:
            check_name(self.session, what="session")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise InvalidInputError(f"top_k {self.top_k} is outside 0..{MAX_TOP_K}")
        if not 0 <= self.min_probability <= 1:
            raise InvalidInputError(f"min_probability {self.min_probability} is outside 0..1")
        if not 0 < self.temperature < float("inf"):
            raise InvalidInputError(
                f"temperature {self.temperature} is not above 0", "1 is the teacher itself"
            )
        if not 0 <= self.tail_draws <= MAX_TAIL_DRAWS:
            raise InvalidInputError(f"tail_draws {self.tail_draws} is outside 0..{MAX_TAIL_DRAWS}")
        if self.codec not in CODEC_MODES or self.codec == "sampled":
            raise InvalidInputError(
                f"codec {self.codec!r} does not carry scores", "use exact, fine, standard or compact"
            )


@dataclass(frozen=True, slots=True, eq=False)
class StudentCompletion:
    """A completion that is to be scored."""

    request_id: str
    """1 to 256 bytes; names it in its session."""
    prompt_token_ids: Int32Array
    """Shape [P], P at least 1."""
    completion_token_ids: Int32Array
    """Shape [T]."""
    chosen_ids: Int32Array | None = None
    """Ids whose logprobs are wanted at each position, shape [T, S]; None for none."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredCompletion:
    """What the teacher thinks of a completion."""

    trace: Trace
    """Its prompt_id is the request's id."""
    chosen_logprobs: Float32Array
    """The teacher's logprobs at the chosen ids, shape [T, S]; S is 0 where none were chosen."""

    @property
    def request_id(self) -> str:
        """Of the completion."""
        return self.trace.prompt_id


def settings_to_proto(settings: ScoreSettings) -> pb.ScoreOpen:
    """The message of settings."""
    return pb.ScoreOpen(
        session=settings.session,
        top_k=settings.top_k,
        min_probability=settings.min_probability,
        temperature=settings.temperature,
        codec_mode=MODE_TO_PROTO[settings.codec],
        tail_draws=settings.tail_draws,
    )


def settings_from_proto(message: pb.ScoreOpen) -> ScoreSettings:
    """The settings in a message.

    Raises:
        InvalidInputError: naming the field that is out of range.
    """
    return ScoreSettings(
        session=check_name(message.session, what="session"),
        top_k=message.top_k,
        min_probability=message.min_probability,
        temperature=message.temperature or 1.0,
        codec=codec_mode_from_proto(message.codec_mode),
        tail_draws=message.tail_draws,
    )


def codec_mode_from_proto(mode: int) -> CodecMode:
    """The codec mode behind a number.

    Raises:
        InvalidInputError: if it is not said, or not known here.
    """
    found = MODE_FROM_PROTO.get(mode)
    if found is None:
        raise InvalidInputError(
            f"codec_mode {mode} is not known here", f"use one of {', '.join(MODE_FROM_PROTO.values())}"
        )
    return found


def teacher_info_to_proto(info: TeacherInfo) -> pb.Teacher:
    """The message of a teacher."""
    return pb.Teacher(
        spec=teacher_to_proto(info.spec),
        tokenizer=tokenizer_to_proto(info.tokenizer),
        license=info.license,
        max_top_k=info.max_top_k,
        max_chosen_ids=info.max_chosen_ids,
    )


def teacher_info_from_proto(message: pb.Teacher) -> TeacherInfo:
    """The teacher in a message.

    Raises:
        InvalidInputError: as for `teacher_from_proto`; so is UnsupportedFormatError.
    """
    return TeacherInfo(
        teacher_from_proto(message.spec),
        tokenizer_from_proto(message.tokenizer),
        message.license,
        message.max_top_k,
        message.max_chosen_ids,
    )


def completion_to_proto(completion: StudentCompletion) -> pb.Completion:
    """The message of a completion.

    Raises:
        InvalidInputError: if its name is not 1 to 256 bytes, ids are negative, or the chosen ids not [T, S].
    """
    check_request_id(completion.request_id)
    message = pb.Completion(request_id=completion.request_id)
    message.prompt_token_ids.extend(_sent_ids(completion, "prompt", completion.prompt_token_ids))
    message.completion_token_ids.extend(_sent_ids(completion, "completion", completion.completion_token_ids))
    chosen = completion.chosen_ids
    if chosen is None:
        return message
    positions = completion.completion_token_ids.size
    if chosen.ndim != 2 or chosen.shape[0] != positions or chosen.shape[1] > MAX_CHOSEN_IDS:
        raise InvalidInputError(
            f"request {completion.request_id!r}: chosen ids of shape {chosen.shape}, "
            f"expected [{positions}, at most {MAX_CHOSEN_IDS}]"
        )
    _sent_ids(completion, "chosen", chosen.reshape(-1))
    width = 2 if not chosen.size or chosen.max() < 1 << 16 else 4
    message.chosen_per_position = chosen.shape[1]
    message.chosen_id_bytes = width if chosen.shape[1] else 0
    message.chosen_token_ids = np.ascontiguousarray(chosen, f"<u{width}").tobytes()
    return message


def completion_from_proto(message: pb.Completion) -> StudentCompletion:
    """The completion in a message; whether its ids are in the vocabulary is left to the teacher.

    Raises:
        InvalidInputError: if its name or the size of its chosen ids is wrong.
    """
    check_request_id(message.request_id)
    width, chosen_per_position = message.chosen_id_bytes, message.chosen_per_position
    positions = len(message.completion_token_ids)
    expected = positions * chosen_per_position * width
    if chosen_per_position > MAX_CHOSEN_IDS or (chosen_per_position and width not in (2, 4)):
        raise InvalidInputError(
            f"request {message.request_id!r}: {chosen_per_position} chosen ids of {width} bytes at a "
            f"position, expected at most {MAX_CHOSEN_IDS} of 2 or 4 bytes"
        )
    if len(message.chosen_token_ids) != expected:
        raise InvalidInputError(
            f"request {message.request_id!r}: {len(message.chosen_token_ids)} bytes of chosen ids, "
            f"expected {positions} x {chosen_per_position} x {width}"
        )
    chosen: Int32Array | None = None
    if chosen_per_position:
        raw = np.frombuffer(message.chosen_token_ids, f"<u{width}")
        chosen = _received_ids(raw).reshape(positions, chosen_per_position)
    return StudentCompletion(
        message.request_id,
        _received_ids(np.asarray(message.prompt_token_ids, np.uint32)),
        _received_ids(np.asarray(message.completion_token_ids, np.uint32)),
        chosen,
    )


def result_bytes_bound(positions: int, settings: ScoreSettings, chosen_per_position: int) -> int:
    """Upper estimate of a completion's encoded result, bytes."""
    chosen_bytes = chosen_per_position * (4 if settings.codec == "exact" else 2)
    row_bytes = bound_position_bytes(settings.codec, settings.top_k, settings.tail_draws)
    return 512 + int(positions * (row_bytes + chosen_bytes))


def results_to_proto(
    scored: Sequence[ScoredCompletion], settings: ScoreSettings, *, vocab_size: int
) -> pb.ScoreResults:
    """The message of results; their traces should come without prompts.

    Raises:
        CodecError: as for `encode_block`.
    """
    # The codec brings numba, for which clients that score nothing need not wait.
    from lynearm.wire.codec import encode_block

    codec = CodecSpec(
        settings.codec, settings.top_k, settings.min_probability, tail_draws=settings.tail_draws
    )
    results = pb.ScoreResults()
    block = encode_block([one.trace for one in scored], codec=codec, vocab_size=vocab_size)
    results.block.ParseFromString(block)
    if any(one.chosen_logprobs.shape[1] for one in scored):
        results.chosen.extend(
            _chosen_to_proto(one.chosen_logprobs, exact=settings.codec == "exact") for one in scored
        )
    return results


def results_from_proto(results: pb.ScoreResults) -> tuple[ScoredCompletion, ...]:
    """The results in a message. Their traces have no prompts.

    Raises:
        CorruptBlockError: if they contradict each other; so do others as for `decode_block`.
    """
    if not results.HasField("block"):
        return ()
    from lynearm.wire.codec import decode_block

    traces = decode_block(results.block.SerializeToString())
    if results.chosen and len(results.chosen) != len(traces):
        raise CorruptBlockError(f"{len(results.chosen)} columns of chosen ids for {len(traces)} traces")
    columns: Iterable[pb.ChosenLogprobs] = results.chosen or (pb.ChosenLogprobs() for _ in traces)
    return tuple(
        ScoredCompletion(trace, _chosen_from_proto(column, trace.completion_token_ids.size))
        for trace, column in zip(traces, columns, strict=True)
    )


def with_prompt(scored: ScoredCompletion, completion: StudentCompletion) -> ScoredCompletion:
    """A result with the prompt, which did not travel.

    Raises:
        CorruptBlockError: if it is about other tokens than those that were sent.
    """
    sent, received = completion.completion_token_ids, scored.trace.completion_token_ids
    chosen = 0 if completion.chosen_ids is None else completion.chosen_ids.shape[1]
    if not np.array_equal(sent, received) or scored.chosen_logprobs.shape[1] != chosen:
        raise CorruptBlockError(
            f"the result of request {completion.request_id!r} is about another completion"
        )
    prompt = np.ascontiguousarray(completion.prompt_token_ids, np.int32)
    return replace(scored, trace=replace(scored.trace, prompt_token_ids=prompt))


def finish_reason_to_proto(reason: FinishReason) -> trace_pb2.FinishReason.ValueType:
    """The enum value of a finish reason."""
    return trace_pb2.FinishReason.Value(f"FINISH_REASON_{reason.upper()}")


def finish_reason_from_proto(value: int) -> FinishReason:
    """The finish reason behind an enum value.

    Raises:
        UnsupportedFormatError: if it is not known here.
    """
    for reason in FINISH_REASONS:
        if finish_reason_to_proto(reason) == value:
            return reason
    raise UnsupportedFormatError(f"finish reason {value} is not known here", "upgrade lynearm")


def failure_to_proto(request_id: str, error: LynearmError) -> pb.RequestFailure:
    """The message of what is wrong with a request."""
    return pb.RequestFailure(
        request_id=request_id,
        code=STATUS_NUMBERS[error.status_code],
        message=shorten(error.message),
        remedy=shorten(error.remedy),
        reason=reason_of(type(error)),
    )


def failure_from_proto(message: pb.RequestFailure) -> LynearmError:
    """The typed error in a message."""
    code = next((name for name, number in STATUS_NUMBERS.items() if number == message.code), "UNKNOWN")
    return error_from_status(code, message.message, error_name_of(message.reason), message.remedy)


def check_request_id(request_id: str) -> str:
    """The id, unchanged.

    Raises:
        InvalidInputError: if it is not 1 to 256 bytes of UTF-8.
    """
    try:
        size = len(request_id.encode())
    except UnicodeEncodeError as error:
        raise InvalidInputError("a request id is not UTF-8") from error
    if not 0 < size <= MAX_REQUEST_ID_BYTES:
        raise InvalidInputError(f"a request id of {size} bytes, expected 1 to {MAX_REQUEST_ID_BYTES}")
    return request_id


def _chosen_to_proto(logprobs: Float32Array, *, exact: bool) -> pb.ChosenLogprobs:
    if exact:
        values, encoding = np.ascontiguousarray(logprobs, "<f4").tobytes(), pb.CHOSEN_ENCODING_FLOAT32
    else:
        # Rounding may leave the normaliser above 1, and a logprob above 0.
        steps = np.clip(np.rint(logprobs * -_FIXED16_STEPS_PER_NAT), 0, _FIXED16_LAST)
        values, encoding = steps.astype("<u2").tobytes(), pb.CHOSEN_ENCODING_FIXED16
    return pb.ChosenLogprobs(per_position=logprobs.shape[1], encoding=encoding, values=values)


def _chosen_from_proto(message: pb.ChosenLogprobs, positions: int) -> Float32Array:
    shape = (positions, message.per_position)
    is_float = message.encoding == pb.CHOSEN_ENCODING_FLOAT32
    if message.per_position > MAX_CHOSEN_IDS or len(message.values) != shape[0] * shape[1] * (
        4 if is_float else 2
    ):
        raise CorruptBlockError(f"{len(message.values)} bytes of logprobs at chosen ids of shape {shape}")
    if is_float:
        return np.frombuffer(message.values, "<f4").astype(np.float32).reshape(shape)
    steps = np.frombuffer(message.values, "<u2").astype(np.float32)
    return (steps / np.float32(-_FIXED16_STEPS_PER_NAT)).reshape(shape)


def _sent_ids(completion: StudentCompletion, name: str, ids: Int32Array) -> list[int]:
    if ids.ndim != 1 or (ids.size and (ids.min() < 0 or ids.max() >= 1 << 31)):
        raise InvalidInputError(
            f"request {completion.request_id!r}: {name} token ids of shape {ids.shape}, "
            "not all of them from 0 to 2^31"
        )
    return [int(token_id) for token_id in ids.tolist()]


def _received_ids(ids: np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]) -> Int32Array:
    # No vocabulary is that large; one below 2^31 stays what it is, for the message to name.
    bounded: Int32Array = np.minimum(ids, np.uint32((1 << 31) - 1)).astype(np.int32)
    return bounded
