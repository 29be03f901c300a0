"""The asynchronous client: the surface of `TraceClient`, for programs that run an event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Literal, TypeVar

from lynearm.client import calls
from lynearm.client.async_attachments import AsyncAttachmentClient
from lynearm.client.async_client import AsyncClient
from lynearm.client.async_consumers import AsyncConsumerClient
from lynearm.client.async_jobs import AsyncJobClient
from lynearm.client.async_leases import AsyncPromptWorker
from lynearm.client.async_publisher import AsyncPublisher
from lynearm.client.async_subscription import AsyncSubscription, fetch_blocks
from lynearm.client.leases import DEFAULT_UNITS
from lynearm.client.producer_window import DEFAULT_IN_FLIGHT_BYTES, ProducerWindow
from lynearm.client.reading_position import (
    DEFAULT_CREDIT_BYTES,
    FetchPosition,
    ReceivedBlock,
    SubscriptionPosition,
)
from lynearm.client.selection import Selection
from lynearm.wire.errors import StreamExistsError
from lynearm.wire.labels import TraceFilter, check_producer_labels
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.retention import Collected, Retention
from lynearm.wire.specs import StreamSpec, check_name
from lynearm.wire.traces import Cursor

if TYPE_CHECKING:
    from lynearm.client.async_dictionaries import AsyncDictionaries

Result = TypeVar("Result")


class AsyncTraceClient(AsyncClient):
    """A client of one trace service for asyncio. Every method is that of `TraceClient`, awaited.

    What makes publishers, subscriptions and dictionaries connects to nothing yet, and is not awaited. The
    tasks of one event loop share a client. A call, an iteration or a `publish` that is cancelled raises
    `CancelledError` at once, and leaves what it belongs to as it was.

    Args:
        target: host:port of the service; several servers of one catalog as a sequence, or with commas.
        timeout_seconds: Deadline of each single call, tries and waits included.
        patience_seconds: How long publishers and subscriptions wait for a service that went away.
        credentials: TLS and token; None: what the environment says (`lynearm.client.credentials`).

    Raises:
        InvalidInputError: if an address is not host:port.
        ConfigError: if a token would go out in plain text.
    """

    async def create_stream(
        self, spec: StreamSpec, *, allow_existing: bool = False, timeout_seconds: float | None = None
    ) -> StreamInfo:
        """As `TraceClient.create_stream`."""
        return await self._ask(calls.create_stream(spec, allow_existing=allow_existing), timeout_seconds)

    async def open_stream(self, spec: StreamSpec, *, timeout_seconds: float | None = None) -> StreamInfo:
        """As `TraceClient.open_stream`."""
        try:
            return await self.create_stream(spec, allow_existing=True, timeout_seconds=timeout_seconds)
        except StreamExistsError as error:
            existing = await self.get_stream(spec.name, timeout_seconds=timeout_seconds)
            raise calls.another_stream(existing.spec, spec) from error

    async def get_stream(self, name: str, *, timeout_seconds: float | None = None) -> StreamInfo:
        """As `TraceClient.get_stream`."""
        return await self._ask(calls.get_stream(name), timeout_seconds)

    async def list_streams(self, *, timeout_seconds: float | None = None) -> list[StreamInfo]:
        """As `TraceClient.list_streams`."""
        return await self._ask(calls.list_streams(), timeout_seconds)

    async def delete_stream(self, name: str, *, timeout_seconds: float | None = None) -> None:
        """As `TraceClient.delete_stream`."""
        await self._ask(calls.delete_stream(name), timeout_seconds)

    async def seal_stream(self, name: str, *, timeout_seconds: float | None = None) -> StreamInfo:
        """As `TraceClient.seal_stream`."""
        return await self._ask(calls.seal_stream(name), timeout_seconds)

    async def set_retention(
        self, name: str, retention: Retention, *, timeout_seconds: float | None = None
    ) -> StreamInfo:
        """As `TraceClient.set_retention`."""
        return await self._ask(calls.set_retention(name, retention), timeout_seconds)

    async def collect_garbage(self, *, timeout_seconds: float | None = None) -> Collected:
        """As `TraceClient.collect_garbage`."""
        return await self._ask(calls.collect_garbage(), timeout_seconds)

    async def put_dictionary(
        self, stream: str, dictionary: bytes, *, timeout_seconds: float | None = None
    ) -> bytes:
        """As `TraceClient.put_dictionary`."""
        return await self._ask(calls.put_dictionary(stream, dictionary), timeout_seconds)

    async def get_dictionary(
        self, stream: str, digest: bytes, *, timeout_seconds: float | None = None
    ) -> bytes:
        """As `TraceClient.get_dictionary`."""
        return await self._ask(calls.get_dictionary(stream, digest), timeout_seconds)

    def dictionaries(self, stream: str, *, wait: bool = False) -> AsyncDictionaries:
        """As `TraceClient.dictionaries`, but fetched before a block is decoded: see what it returns."""
        # The codec is compiled code, which takes a second to load: only readers of blocks pay for it.
        from lynearm.client.async_dictionaries import AsyncDictionaries

        return AsyncDictionaries(self, check_name(stream), wait=wait)

    async def finished_prompts(self, stream: str, *, timeout_seconds: float | None = None) -> set[str]:
        """As `TraceClient.finished_prompts`."""
        return await self._ask(calls.finished_prompts(stream), timeout_seconds)

    def publisher(
        self,
        stream: str,
        producer_id: str,
        *,
        max_in_flight_bytes: int = DEFAULT_IN_FLIGHT_BYTES,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncPublisher:
        """As `TraceClient.publisher`; the epoch begins with the publisher's first use."""
        window = ProducerWindow(
            check_name(stream),
            check_name(producer_id, what="producer id"),
            max_in_flight_bytes,
            labels=check_producer_labels(labels or {}),
        )
        return AsyncPublisher(
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
    ) -> AsyncPromptWorker:
        """As `TraceClient.prompt_worker`."""
        return AsyncPromptWorker(
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
    ) -> AsyncSubscription:
        """As `TraceClient.subscribe`; "live" means from `async with`, or the first iteration, on."""

        async def find_end() -> int:
            return (await self.get_stream(stream)).next_offset

        first = 0 if start == "live" else start
        cursor = first if isinstance(first, Cursor) else Cursor(first)
        selection = Selection(
            check_name(stream), cursor, follow, credit_bytes, wanted, skip_damaged=on_corrupt == "skip"
        )
        position = SubscriptionPosition(selection)
        return AsyncSubscription(
            self._connection,
            position,
            retries=self._long_retries(f"reader of stream {stream}"),
            find_start=find_end if start == "live" else None,
        )

    def fetch(
        self, stream: str, offset: int, count: int = 1, *, timeout_seconds: float | None = None
    ) -> AsyncIterator[ReceivedBlock]:
        """As `TraceClient.fetch`."""
        return fetch_blocks(
            self._connection,
            FetchPosition(check_name(stream), offset, count),
            retries=self._short_retries(),
            timeout_seconds=self._deadline_seconds(timeout_seconds),
        )

    @property
    def jobs(self) -> AsyncJobClient:
        """Prompts that the service hands out to workers."""
        return AsyncJobClient(self.send)

    @property
    def attachments(self) -> AsyncAttachmentClient:
        """As `TraceClient.attachments`."""
        return AsyncAttachmentClient(self.send)

    @property
    def consumers(self) -> AsyncConsumerClient:
        """Named readers whose positions the service keeps."""
        return AsyncConsumerClient(self.send)
