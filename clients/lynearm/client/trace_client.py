"""The synchronous client: what trainers, teachers, notebooks and the command line use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, TypeVar

from lynearm.client import calls
from lynearm.client.attachments import AttachmentClient
from lynearm.client.consumers import ConsumerClient
from lynearm.client.jobs import JobClient
from lynearm.client.leases import DEFAULT_UNITS, PromptWorker
from lynearm.client.producer_window import DEFAULT_IN_FLIGHT_BYTES, ProducerWindow
from lynearm.client.publisher import Publisher
from lynearm.client.reading_position import (
    DEFAULT_CREDIT_BYTES,
    FetchPosition,
    ReceivedBlock,
    SubscriptionPosition,
)
from lynearm.client.selection import Selection
from lynearm.client.subscription import Subscription, fetch_blocks
from lynearm.client.sync_client import SyncClient
from lynearm.wire.errors import StreamExistsError
from lynearm.wire.labels import TraceFilter, check_producer_labels
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.retention import Collected, Retention
from lynearm.wire.specs import StreamSpec, check_name
from lynearm.wire.traces import Cursor

if TYPE_CHECKING:
    from lynearm.wire.dictionaries import DictionaryReader

Result = TypeVar("Result")


class TraceClient(SyncClient):
    """A client of one trace service. Threads may share it; a channel opens at the first call.

    Single calls raise `ServiceUnavailableError` after about a second without a service, once every address
    was tried. Publishers and subscriptions wait for it, and go on where they were, at whichever address
    answers. Pickled or forked, a client opens channels of its own. `AsyncTraceClient` is its twin.

    Args:
        target: host:port of the service; several servers of one catalog as a sequence, or with commas.
        timeout_seconds: Deadline of each single call, tries and waits included.
        patience_seconds: How long publishers and subscriptions wait for a service that went away.
        credentials: TLS and token; None: what the environment says (`lynearm.client.credentials`).

    Raises:
        InvalidInputError: if an address is not host:port.
        ConfigError: if a token would go out in plain text.
    """

    def create_stream(
        self, spec: StreamSpec, *, allow_existing: bool = False, timeout_seconds: float | None = None
    ) -> StreamInfo:
        """Create a stream.

        Args:
            spec: What the stream is.
            allow_existing: Return the stream of that name if its spec equals `spec`.
            timeout_seconds: Deadline of this call; None: the client's.

        Raises:
            StreamExistsError: if the name is taken (by another spec, with `allow_existing`).
        """
        return self._ask(calls.create_stream(spec, allow_existing=allow_existing), timeout_seconds)

    def open_stream(self, spec: StreamSpec, *, timeout_seconds: float | None = None) -> StreamInfo:
        """Create a stream, or open the one that exists with the same spec.

        Raises:
            StreamExistsError: if one of that name has another spec; the message names what differs.
        """
        try:
            return self.create_stream(spec, allow_existing=True, timeout_seconds=timeout_seconds)
        except StreamExistsError as error:
            existing = self.get_stream(spec.name, timeout_seconds=timeout_seconds).spec
            raise calls.another_stream(existing, spec) from error

    def get_stream(self, name: str, *, timeout_seconds: float | None = None) -> StreamInfo:
        """The stream as it is now.

        Raises:
            StreamNotFoundError: if there is none of that name.
        """
        return self._ask(calls.get_stream(name), timeout_seconds)

    def list_streams(self, *, timeout_seconds: float | None = None) -> list[StreamInfo]:
        """Every stream, by name."""
        return self._ask(calls.list_streams(), timeout_seconds)

    def delete_stream(self, name: str, *, timeout_seconds: float | None = None) -> None:
        """Delete a stream with all its blocks and dictionaries.

        Raises:
            StreamNotFoundError: if there is none of that name.
        """
        self._ask(calls.delete_stream(name), timeout_seconds)

    def seal_stream(self, name: str, *, timeout_seconds: float | None = None) -> StreamInfo:
        """End a stream: it takes no more blocks, and subscriptions that follow it finish.

        Raises:
            StreamNotFoundError: if there is none of that name.
        """
        return self._ask(calls.seal_stream(name), timeout_seconds)

    def set_retention(
        self, name: str, retention: Retention, *, timeout_seconds: float | None = None
    ) -> StreamInfo:
        """Say how long a stream keeps its blocks; `Retention()` stands for ever.

        They go some time after they may, never before. Readers that come for one of them get
        `OffsetExpiredError`.

        Args:
            name: Name of the stream.
            retention: Replaces what was said before.
            timeout_seconds: How long to wait; None: the client's.

        Raises:
            StreamNotFoundError: if there is none of that name.
        """
        return self._ask(calls.set_retention(name, retention), timeout_seconds)

    def collect_garbage(self, *, timeout_seconds: float | None = None) -> Collected:
        """Let the service let go now of what it need not keep, which it else does by itself in time."""
        return self._ask(calls.collect_garbage(), timeout_seconds)

    def put_dictionary(
        self, stream: str, dictionary: bytes, *, timeout_seconds: float | None = None
    ) -> bytes:
        """Give a stream a codec dictionary, so that published blocks may name it; idempotent.

        Args:
            stream: Name of the stream.
            dictionary: At most 3 MiB; durable on return.
            timeout_seconds: Deadline of this call; None: the client's.

        Returns:
            Its digest, 8 bytes.

        Raises:
            StreamNotFoundError: if there is no such stream.
            StreamSealedError: if the stream is sealed and does not hold the dictionary.
            DictionaryLimitError: if the stream holds 64 others.
            CorruptBlockError: if the service received other bytes.
            InvalidInputError: if it is empty or too large.
        """
        return self._ask(calls.put_dictionary(stream, dictionary), timeout_seconds)

    def get_dictionary(self, stream: str, digest: bytes, *, timeout_seconds: float | None = None) -> bytes:
        """A codec dictionary of a stream, by the digest in the header of a block.

        Args:
            stream: Name of the stream.
            digest: 8 bytes.
            timeout_seconds: Deadline of this call; None: the client's.

        Raises:
            StreamNotFoundError: if there is no such stream.
            DictionaryNotFoundError: if the stream does not hold it.
            CorruptBlockError: if what came has another digest.
            InvalidInputError: if `digest` is not 8 bytes.
        """
        return self._ask(calls.get_dictionary(stream, digest), timeout_seconds)

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

    def finished_prompts(self, stream: str, *, timeout_seconds: float | None = None) -> set[str]:
        """Ids of the prompts that committed blocks have finished.

        Raises:
            StreamNotFoundError: if there is no such stream.
        """
        return self._ask(calls.finished_prompts(stream), timeout_seconds)

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
        window = ProducerWindow(
            check_name(stream),
            check_name(producer_id, what="producer id"),
            max_in_flight_bytes,
            labels=check_producer_labels(labels or {}),
        )
        return Publisher(
            self._connection, window, retries=self._long_retries(f"publisher of stream {stream}")
        )

    def prompt_worker(
        self,
        stream: str,
        job: str,
        *,
        worker: str,
        max_units: int = DEFAULT_UNITS,
        predecessor: str = "",
    ) -> PromptWorker:
        """Work of a job, lease by lease.

        Args:
            stream: Of the job.
            job: Name of the job.
            worker: Stable name of whoever asks: after a crash, its leases come back to it at once.
            max_units: Most units (samples of prompts) of one lease.
            predecessor: A worker that has ended: `take` takes over what it held, and nothing else.
        """
        return PromptWorker(
            self.send,
            stream,
            job,
            worker=worker,
            max_units=max_units,
            patience_seconds=self._patience_seconds,
            predecessor=predecessor,
        )

    def subscribe(
        self,
        stream: str,
        *,
        start: int | Cursor | Literal["live"] = 0,
        follow: bool = True,
        credit_bytes: int = DEFAULT_CREDIT_BYTES,
        wanted: TraceFilter | None = None,
        on_corrupt: Literal["raise", "skip"] = "raise",
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
            on_corrupt: At a block that is damaged in the service's store, "raise" CorruptBlockError, or
                "skip" it: the iteration goes on behind it, and `Subscription.damaged_offsets` names it.

        Raises:
            StreamNotFoundError: if `start` is "live" and there is no such stream. With a number, the
                first iteration raises it.
        """
        first = self.get_stream(stream).next_offset if start == "live" else start
        cursor = first if isinstance(first, Cursor) else Cursor(first)
        selection = Selection(
            check_name(stream), cursor, follow, credit_bytes, wanted, skip_damaged=on_corrupt == "skip"
        )
        position = SubscriptionPosition(selection)
        return Subscription(
            self._connection, position, retries=self._long_retries(f"reader of stream {stream}")
        )

    def fetch(
        self, stream: str, offset: int, count: int = 1, *, timeout_seconds: float | None = None
    ) -> Iterator[ReceivedBlock]:
        """A range of blocks; fewer than `count` where the stream ends before.

        Args:
            stream: Name of the stream.
            offset: Of the first block.
            count: Of blocks.
            timeout_seconds: How long a block may take; None: the client's.

        Raises:
            StreamNotFoundError: if there is no such stream.
            OffsetNotFoundError: if there is no block at `offset`.
        """
        return fetch_blocks(
            self._connection,
            FetchPosition(check_name(stream), offset, count),
            retries=self._short_retries(),
            timeout_seconds=self._deadline_seconds(timeout_seconds),
        )

    @property
    def jobs(self) -> JobClient:
        """Prompts that the service hands out to workers."""
        return JobClient(self.send)

    @property
    def attachments(self) -> AttachmentClient:
        """What the service keeps about streams besides traces."""
        return AttachmentClient(self.send)

    @property
    def consumers(self) -> ConsumerClient:
        """Named readers whose positions the service keeps."""
        return ConsumerClient(self.send)
