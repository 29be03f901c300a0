"""The calls that have one answer: what each sends, and what its answer means; no I/O.

The clients send these, each in its own way; a new method is a function here and a line in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from lynearm.v1 import teacher_service_pb2 as teacher_pb
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.blocks import MAX_DICTIONARY_BYTES, dictionary_digest
from lynearm.wire.errors import CorruptBlockError, InvalidInputError, StreamExistsError
from lynearm.wire.protobuf import StreamInfo, retention_to_proto, spec_to_proto, stream_from_proto
from lynearm.wire.retention import Collected, Retention
from lynearm.wire.scoring import TeacherInfo, teacher_info_from_proto
from lynearm.wire.specs import StreamSpec, check_name, spec_differences

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Call(Generic[Result]):
    """A call with one answer."""

    method: str
    """Of the service, as its proto names it."""
    request: Message
    answer: type[Message]
    """Class of its response."""
    # Any: a class of messages and what reads them cannot be tied together without naming each in the clients.
    read: Callable[[Any], Result]
    """What the answer means; of a `streamed` one, all its responses."""
    idempotent: bool = True
    """Whether it may be sent again without knowing what became of the first."""
    streamed: bool = False
    """Whether the answer comes in several responses."""
    service: str = "lynearm.v1.TraceService"
    """Full name."""


def create_stream(spec: StreamSpec, *, allow_existing: bool) -> Call[StreamInfo]:
    """CreateStream."""
    request = pb.CreateStreamRequest(spec=spec_to_proto(spec), allow_existing=allow_existing)
    return Call(
        "CreateStream", request, pb.CreateStreamResponse, _stream_of_answer, idempotent=allow_existing
    )


def get_stream(name: str) -> Call[StreamInfo]:
    """GetStream."""
    request = pb.GetStreamRequest(name=check_name(name))
    return Call("GetStream", request, pb.GetStreamResponse, _stream_of_answer)


def list_streams() -> Call[list[StreamInfo]]:
    """ListStreams."""

    def read(answer: pb.ListStreamsResponse) -> list[StreamInfo]:
        return [stream_from_proto(stream) for stream in answer.streams]

    return Call("ListStreams", pb.ListStreamsRequest(), pb.ListStreamsResponse, read)


def delete_stream(name: str) -> Call[None]:
    """DeleteStream."""
    request = pb.DeleteStreamRequest(name=check_name(name))
    return Call("DeleteStream", request, pb.DeleteStreamResponse, _nothing, idempotent=False)


def seal_stream(name: str) -> Call[StreamInfo]:
    """SealStream."""
    request = pb.SealStreamRequest(name=check_name(name))
    return Call("SealStream", request, pb.SealStreamResponse, _stream_of_answer)


def set_retention(name: str, retention: Retention) -> Call[StreamInfo]:
    """UpdateRetention."""
    request = pb.UpdateRetentionRequest(name=check_name(name), retention=retention_to_proto(retention))
    return Call("UpdateRetention", request, pb.UpdateRetentionResponse, _stream_of_answer)


def collect_garbage() -> Call[Collected]:
    """CollectGarbage."""

    def read(answer: pb.CollectGarbageResponse) -> Collected:
        return Collected(answer.expired_blocks, answer.expired_bytes, answer.orphan_objects)

    return Call("CollectGarbage", pb.CollectGarbageRequest(), pb.CollectGarbageResponse, read)


def put_dictionary(stream: str, dictionary: bytes) -> Call[bytes]:
    """PutDictionary; the result is the digest."""
    # Checked here too: above 4 MiB gRPC would speak of a limit of its own.
    if not 1 <= len(dictionary) <= MAX_DICTIONARY_BYTES:
        raise InvalidInputError(
            f"dictionary of {len(dictionary)} bytes, expected 1 to {MAX_DICTIONARY_BYTES}"
        )
    digest = dictionary_digest(dictionary)

    def read(answer: pb.PutDictionaryResponse) -> bytes:
        if answer.digest != digest:
            raise CorruptBlockError(
                f"the service received a dictionary of digest {answer.digest.hex()}, sent was {digest.hex()}",
                "put it again",
            )
        return digest

    request = pb.PutDictionaryRequest(stream=check_name(stream), dictionary=dictionary)
    return Call("PutDictionary", request, pb.PutDictionaryResponse, read)


def get_dictionary(stream: str, digest: bytes) -> Call[bytes]:
    """GetDictionary; the result is the dictionary."""

    def read(answer: pb.GetDictionaryResponse) -> bytes:
        found = dictionary_digest(answer.dictionary)
        if found != digest:
            raise CorruptBlockError(
                f"dictionary {digest.hex()} of stream {stream!r} came with digest {found.hex()}",
                "fetch it again; if that does not help, it is damaged on the server's disk",
            )
        return answer.dictionary

    request = pb.GetDictionaryRequest(stream=check_name(stream), digest=digest)
    return Call("GetDictionary", request, pb.GetDictionaryResponse, read)


def finished_prompts(stream: str) -> Call[set[str]]:
    """ListFinishedPrompts."""

    def read(answers: Sequence[pb.ListFinishedPromptsResponse]) -> set[str]:
        return {prompt_id for answer in answers for prompt_id in answer.prompt_ids}

    request = pb.ListFinishedPromptsRequest(stream=check_name(stream))
    return Call("ListFinishedPrompts", request, pb.ListFinishedPromptsResponse, read, streamed=True)


def get_teacher() -> Call[TeacherInfo]:
    """GetTeacher, of a teacher."""

    def read(answer: teacher_pb.GetTeacherResponse) -> TeacherInfo:
        return teacher_info_from_proto(answer.teacher)

    request = teacher_pb.GetTeacherRequest()
    return Call(
        "GetTeacher", request, teacher_pb.GetTeacherResponse, read, service="lynearm.v1.TeacherService"
    )


def another_stream(existing: StreamSpec, wanted: StreamSpec) -> StreamExistsError:
    """Why a stream cannot be opened: the one of that name has another spec."""
    return StreamExistsError(
        f"stream {wanted.name!r} exists and is another: {'; '.join(spec_differences(existing, wanted))}",
        "choose another stream name, or the settings that the stream was made with",
    )


def _stream_of_answer(
    answer: pb.CreateStreamResponse
    | pb.GetStreamResponse
    | pb.SealStreamResponse
    | pb.UpdateRetentionResponse,
) -> StreamInfo:
    return stream_from_proto(answer.stream)


def _nothing(_answer: pb.DeleteStreamResponse) -> None:
    return None
