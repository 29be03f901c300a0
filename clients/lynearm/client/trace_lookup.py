"""Random access to traces: by position in the stream, or by the prompt that they answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from lynearm.client.calls import Call
from lynearm.client.sending import SendCall
from lynearm.v1 import prompt_queue_pb2 as pb
from lynearm.wire.errors import OffsetNotFoundError
from lynearm.wire.specs import check_name
from lynearm.wire.traces import Cursor, Trace
from lynearm.wire.work import check_prompt_id

if TYPE_CHECKING:
    from lynearm.client.trace_client import TraceClient

_PROMPTS_PER_CALL = 1000


@dataclass(frozen=True, slots=True, order=True)
class TraceId:
    """Names a trace of a stream."""

    prompt_id: str
    sample_index: int = 0


@dataclass(frozen=True, slots=True)
class PromptLocation:
    """A block that holds traces of a prompt."""

    prompt_id: str
    offset: int
    sample_indices: tuple[int, ...]
    """Ascending. Empty: every sample that the prompt has."""

    def holds(self, sample_index: int) -> bool:
        """Whether the block may hold a sample of the prompt."""
        return not self.sample_indices or sample_index in self.sample_indices


@dataclass(frozen=True, slots=True)
class FoundTrace:
    """A trace, and where it lies."""

    cursor: Cursor
    trace: Trace


def locate_prompts(send: SendCall, stream: str, prompt_ids: Iterable[str]) -> list[PromptLocation]:
    """The blocks that hold the finished traces of prompts, ascending by offset.

    Raises:
        StreamNotFoundError: there is no such stream.
    """
    wanted = iter(sorted({check_prompt_id(prompt_id) for prompt_id in prompt_ids}))
    found: list[PromptLocation] = []
    while chunk := list(islice(wanted, _PROMPTS_PER_CALL)):
        request = pb.LocatePromptsRequest(stream=check_name(stream), prompt_ids=chunk)
        found += send(Call("LocatePrompts", request, pb.LocatePromptsResponse, _read_locations))
    return sorted(found, key=lambda location: (location.offset, location.prompt_id))


def fetch_traces(client: TraceClient, stream: str, wanted: Iterable[TraceId | str]) -> Iterator[FoundTrace]:
    """Traces by name, in the order of the stream; each block is fetched once. What is not there is left out.

    Args:
        client: Of the service.
        stream: Name of the stream.
        wanted: Traces, or ids of prompts of which every trace is wanted.

    Raises:
        StreamNotFoundError: there is no such stream.
        LynearmError: a block cannot be read.
    """
    names = list(wanted)
    whole = {name for name in names if isinstance(name, str)}
    traces = {name for name in names if isinstance(name, TraceId)}
    samples: dict[str, list[int]] = {}
    for trace in traces:
        samples.setdefault(trace.prompt_id, []).append(trace.sample_index)
    offsets = {
        location.offset: None  # ordered, unlike a set
        for location in locate_prompts(client.send, stream, {*whole, *samples})
        if location.prompt_id in whole or any(map(location.holds, samples[location.prompt_id]))
    }
    read = _BlockReader(client, stream)
    for offset in offsets:
        for found in read(offset):
            name = TraceId(found.trace.prompt_id, found.trace.sample_index)
            if name.prompt_id in whole or name in traces:
                yield found


def fetch_trace(client: TraceClient, stream: str, cursor: Cursor) -> Trace:
    """The trace at a position.

    Raises:
        StreamNotFoundError, OffsetNotFoundError: there is no such stream or trace.
        CodecError: its block cannot be decoded.
    """
    found = _BlockReader(client, stream)(cursor.offset)
    if cursor.trace_index >= len(found):
        raise OffsetNotFoundError(
            f"block {cursor.offset} of stream {stream!r} has {len(found)} traces, wanted is number "
            f"{cursor.trace_index} from 0"
        )
    return found[cursor.trace_index].trace


class _BlockReader:
    """Fetches and decodes blocks of one stream."""

    def __init__(self, client: TraceClient, stream: str) -> None:
        self._client = client
        self._stream = stream
        self._dictionaries = client.dictionaries(stream)

    def __call__(self, offset: int) -> Sequence[FoundTrace]:
        # The codec is compiled code, which takes a second to load: only readers of blocks pay for it.
        from lynearm.wire.codec import decode_block

        return [
            FoundTrace(Cursor(offset, index), trace)
            for received in self._client.fetch(self._stream, offset)
            for index, trace in enumerate(decode_block(received.block, dictionaries=self._dictionaries))
        ]


def _read_locations(answer: pb.LocatePromptsResponse) -> list[PromptLocation]:
    return [
        PromptLocation(location.prompt_id, location.offset, tuple(location.sample_indices))
        for location in answer.locations
    ]
