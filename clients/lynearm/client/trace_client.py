"""The synchronous client: what trainers, teachers, notebooks and the command line use."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import grpc

from lynearm.client.connection import Backoff, Connection, is_transient
from lynearm.client.consumers import ConsumerClient
from lynearm.client.jobs import JobClient
from lynearm.client.leases import DEFAULT_UNITS, PromptWorker
from lynearm.client.publisher import DEFAULT_IN_FLIGHT_BYTES, Publisher
from lynearm.client.selection import Selection
from lynearm.client.subscription import DEFAULT_CREDIT_BYTES, ReceivedBlock, Subscription
from lynearm.client.unary_calls import Result, UnaryCall
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.blocks import MAX_DICTIONARY_BYTES, dictionary_digest
from lynearm.wire.errors import (
    CorruptBlockError,
    InvalidInputError,
    ServiceUnavailableError,
    StreamExistsError,
)
from lynearm.wire.frames import parse_fetch_response
from lynearm.wire.labels import TraceFilter, check_producer_labels
from lynearm.wire.protobuf import StreamInfo, spec_to_proto, stream_from_proto
from lynearm.wire.specs import StreamSpec, check_name, spec_differences
from lynearm.wire.traces import Cursor

if TYPE_CHECKING:
    from lynearm.wire.dictionaries import DictionaryReader

DEFAULT_TARGET = "127.0.0.1:7411"

_SHORT_PATIENCE_SECONDS = 1.0
"""How long a single call bridges a hiccup; a person at a keyboard waits no longer for bad news."""

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class TraceClient:
    """A client of one trace service. Threads may share it; the channel opens at the first call.

    Single calls raise `ServiceUnavailableError` after about a second without a service. Publishers
    and subscriptions wait for it, and go on where they were.

    Args:
        target: host:port of the service.
        timeout_seconds: Deadline of each single call.
        patience_seconds: How long publishers and subscriptions wait for a service that went away.

    Raises:
        InvalidInputError: if the target is not host:port.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_seconds: float = 30.0,
        patience_seconds: float = math.inf,
    ) -> None:
        host, _, port = target.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise InvalidInputError(f"service {target!r} is not host:port", f"for example {DEFAULT_TARGET}")
        self.target = target
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds
        self._connection = Connection(target)

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channel."""
        self.close()

    @property
    def jobs(self) -> JobClient:
        """Prompts that the service hands out to workers."""
        return JobClient(self.send)

    @property
    def consumers(self) -> ConsumerClient:
        """Named readers whose positions the service keeps."""
        return ConsumerClient(self.send)

    def close(self) -> None:
        """Close the channel; publishers and subscriptions on it end. The next call opens another."""
        self._connection.close()

    def wait_until_ready(
        self, timeout_seconds: float = math.inf, on_wait: Callable[[], None] | None = None
    ) -> None:
        """Return once the service says that it is serving.

        Args:
            timeout_seconds: How long to wait.
            on_wait: Called once, when the first try found no service.

        Raises:
            ServiceUnavailableError: if it did not come up in time.
        """
        backoff = Backoff(timeout_seconds)
        while not self._connection.is_serving(min(5.0, self._timeout_seconds)):
            pause_seconds = backoff.failed()
            if backoff.spent:
                raise ServiceUnavailableError(
                    f"no trace service answers at {self.target} after {timeout_seconds:g} s",
                    "start one with `lynearm serve`, or name another with --service",
                )
            if on_wait is not None:
                on_wait()
                on_wait = None
            time.sleep(min(pause_seconds, 1.0))

    def create_stream(self, spec: StreamSpec, *, allow_existing: bool = False) -> StreamInfo:
        """Create a stream.

        Args:
            spec: What the stream is.
            allow_existing: Return the stream of that name if its spec equals `spec`.

        Raises:
            StreamExistsError: if the name is taken (by another spec, with `allow_existing`).
        """
        request = pb.CreateStreamRequest(spec=spec_to_proto(spec), allow_existing=allow_existing)
        return stream_from_proto(self._call(self._connection.stub.CreateStream, request).stream)

    def open_stream(self, spec: StreamSpec) -> StreamInfo:
        """Create a stream, or open the one that exists with the same spec.

        Raises:
            StreamExistsError: if one of that name has another spec; the message names what differs.
        """
        try:
            return self.create_stream(spec, allow_existing=True)
        except StreamExistsError as error:
            existing = self.get_stream(spec.name).spec
            raise StreamExistsError(
                f"stream {spec.name!r} exists and is another: {'; '.join(spec_differences(existing, spec))}",
                "choose another stream name, or the settings that the stream was made with",
            ) from error

    def get_stream(self, name: str) -> StreamInfo:
        """The stream as it is now.

        Raises:
            StreamNotFoundError: if there is none of that name.
        """
        request = pb.GetStreamRequest(name=check_name(name))
        return stream_from_proto(self._call(self._connection.stub.GetStream, request).stream)

    def list_streams(self) -> list[StreamInfo]:
        """Every stream, by name."""
        response = self._call(self._connection.stub.ListStreams, pb.ListStreamsRequest())
        return [stream_from_proto(stream) for stream in response.streams]

    def delete_stream(self, name: str) -> None:
        """Delete a stream with all its blocks and dictionaries.

        Raises:
            StreamNotFoundError: if there is none of that name.
        """
        self._call(self._connection.stub.DeleteStream, pb.DeleteStreamRequest(name=check_name(name)))

    def seal_stream(self, name: str) -> StreamInfo:
        """End a stream: it takes no more blocks, and subscriptions that follow it finish.

        Raises:
            StreamNotFoundError: if there is none of that name.
        """
        request = pb.SealStreamRequest(name=check_name(name))
        return stream_from_proto(self._call(self._connection.stub.SealStream, request).stream)

    def put_dictionary(self, stream: str, dictionary: bytes) -> bytes:
        """Give a stream a codec dictionary, so that published blocks may name it; idempotent.

        Args:
            stream: Name of the stream.
            dictionary: At most 3 MiB; durable on return.

        Returns:
            Its digest, 8 bytes.

        Raises:
            StreamNotFoundError: if there is no such stream.
            StreamSealedError: if the stream is sealed and does not hold the dictionary.
            DictionaryLimitError: if the stream holds 64 others.
            CorruptBlockError: if the service received other bytes.
            InvalidInputError: if it is empty or too large.
        """
        # Checked here too: above 4 MiB gRPC would speak of a limit of its own.
        if not 1 <= len(dictionary) <= MAX_DICTIONARY_BYTES:
            raise InvalidInputError(
                f"dictionary of {len(dictionary)} bytes, expected 1 to {MAX_DICTIONARY_BYTES}"
            )
        request = pb.PutDictionaryRequest(stream=check_name(stream), dictionary=dictionary)
        found = self._call(self._connection.stub.PutDictionary, request).digest
        digest = dictionary_digest(dictionary)
        if found != digest:
            raise CorruptBlockError(
                f"the service at {self.target} received a dictionary of digest {found.hex()}, "
                f"sent was {digest.hex()}",
                "put it again",
            )
        return digest

    def get_dictionary(self, stream: str, digest: bytes) -> bytes:
        """A codec dictionary of a stream, by the digest in the header of a block.

        Args:
            stream: Name of the stream.
            digest: 8 bytes.

        Raises:
            StreamNotFoundError: if there is no such stream.
            DictionaryNotFoundError: if the stream does not hold it.
            CorruptBlockError: if what came has another digest.
            InvalidInputError: if `digest` is not 8 bytes.
        """
        request = pb.GetDictionaryRequest(stream=check_name(stream), digest=digest)
        dictionary = self._call(self._connection.stub.GetDictionary, request).dictionary
        found = dictionary_digest(dictionary)
        if found != digest:
            raise CorruptBlockError(
                f"dictionary {digest.hex()} of stream {stream!r} came with digest {found.hex()}",
                "fetch it again; if that does not help, it is damaged on the server's disk",
            )
        return dictionary

    def dictionaries(self, stream: str, *, wait: bool = False) -> DictionaryReader:
        """What `decode_block` needs to read a stream's blocks: its dictionaries, each fetched once.

        Args:
            stream: Name of the stream.
            wait: For a service that is away, as long as it takes; otherwise the decoding fails.
        """
        # The codec is compiled code, which takes a second to load: only readers of blocks pay for it.
        from lynearm.client.dictionaries import DictionaryCache
        from lynearm.wire.dictionaries import DictionaryReader

        return DictionaryReader(DictionaryCache(self, check_name(stream), wait=wait))

    def finished_prompts(self, stream: str) -> set[str]:
        """Ids of the prompts that committed blocks have finished.

        Raises:
            StreamNotFoundError: if there is no such stream.
        """
        request = pb.ListFinishedPromptsRequest(stream=check_name(stream))
        try:
            responses = self._connection.stub.ListFinishedPrompts(request, timeout=self._timeout_seconds)
            return {prompt_id for response in responses for prompt_id in response.prompt_ids}
        except grpc.RpcError as failure:
            raise self._connection.error(failure) from failure

    def publisher(
        self,
        stream: str,
        producer_id: str,
        *,
        max_in_flight_bytes: int = DEFAULT_IN_FLIGHT_BYTES,
        labels: Mapping[str, str] | None = None,
    ) -> Publisher:
        """A publisher of blocks to a stream, under a new epoch that fences all earlier ones.

        Args:
            stream: Name of the stream.
            producer_id: Stable name of whoever publishes.
            max_in_flight_bytes: Blocks sent but not yet durable, after which `publish` waits.
            labels: What its blocks are, for filters.
        """
        return Publisher(
            self._connection,
            check_name(stream),
            check_name(producer_id, what="producer id"),
            max_in_flight_bytes=max_in_flight_bytes,
            patience_seconds=self._patience_seconds,
            labels=check_producer_labels(labels or {}),
        )

    def prompt_worker(
        self, stream: str, job: str, *, worker: str, max_units: int = DEFAULT_UNITS
    ) -> PromptWorker:
        """Work of a job, lease by lease.

        Args:
            stream: Of the job.
            job: Name of the job.
            worker: Stable name of whoever asks: after a crash, its leases come back to it at once.
            max_units: Most units (samples of prompts) of one lease.
        """
        return PromptWorker(
            self.send,
            stream,
            job,
            worker=worker,
            max_units=max_units,
            patience_seconds=self._patience_seconds,
        )

    def subscribe(
        self,
        stream: str,
        *,
        start: int | Cursor | Literal["live"] = 0,
        follow: bool = True,
        credit_bytes: int = DEFAULT_CREDIT_BYTES,
        wanted: TraceFilter | None = None,
    ) -> Subscription:
        """The blocks of a stream in offset order.

        Args:
            stream: Name of the stream.
            start: Offset of the first block, or a cursor in it, of which `ReceivedBlock.used_traces` then
                tells; "live" for those committed from now on.
            follow: Wait for more until the stream is sealed; otherwise end where it ends now.
            credit_bytes: Blocks that the service may send ahead of the reader.
            wanted: Pass over blocks in which no trace can match. Traces that do not may still come in a block
                with others: `TraceFilter.matches` tells them apart.

        Raises:
            StreamNotFoundError: if `start` is "live" and there is no such stream. With a number, the
                first iteration raises it.
        """
        first = self.get_stream(stream).next_offset if start == "live" else start
        cursor = first if isinstance(first, Cursor) else Cursor(first)
        selection = Selection(check_name(stream), cursor, follow, credit_bytes, wanted)
        return Subscription(self._connection, selection, patience_seconds=self._patience_seconds)

    def fetch(self, stream: str, offset: int, count: int = 1) -> Iterator[ReceivedBlock]:
        """A range of blocks; fewer than `count` where the stream ends before.

        Raises:
            StreamNotFoundError: if there is no such stream.
            OffsetNotFoundError: if there is no block at `offset`.
        """
        request = pb.FetchBlocksRequest(stream=check_name(stream), offset=offset, count=count)
        try:
            for data in self._connection.fetch(request, self._timeout_seconds):
                fetched = parse_fetch_response(data)
                yield ReceivedBlock(fetched.offset, fetched.block, fetched.next_offset)
        except grpc.RpcError as failure:
            raise self._connection.error(failure) from failure

    def send(self, call: UnaryCall[Result]) -> Result:
        """Send a call; what its answer means.

        Raises:
            LynearmError: what the service said.
        """
        return call.read(self._call(getattr(self._connection.stub, call.method), call.request))

    def _call(self, method: Callable[..., _Response], request: object) -> _Response:
        backoff = Backoff(min(_SHORT_PATIENCE_SECONDS, self._patience_seconds))
        while True:
            try:
                return method(request, timeout=self._timeout_seconds)
            except grpc.RpcError as failure:
                pause_seconds = backoff.failed()
                if not is_transient(failure) or backoff.spent:
                    raise self._connection.error(failure) from failure
            time.sleep(pause_seconds)
