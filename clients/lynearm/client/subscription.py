"""Follows a stream block by block, across restarts of the service.

Invariants: blocks come in offset order without gaps but for those that hold nothing wanted, each once. The
service sends no further ahead of the reader than the credit, which is renewed as the reader takes blocks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import grpc

from lynearm.client.connection import Backoff, Connection, ResponseStream, is_transient
from lynearm.client.selection import Selection, advance
from lynearm.v1 import trace_service_pb2
from lynearm.wire.frames import SubscribedBlock, parse_subscribe_response

logger = logging.getLogger(__name__)

DEFAULT_CREDIT_BYTES = 8 << 20
"""Thirty blocks of 256 KB."""


@dataclass(frozen=True, slots=True)
class ReceivedBlock:
    """A block as it came from the service."""

    offset: int
    block: memoryview
    """A serialised block; `lynearm.wire.codec.decode_block` reads it."""
    next_offset: int
    """The stream's next offset when this was sent; 0 for a fetched block."""
    used_traces: int = 0
    """Traces of this block that the cursor at which the subscription began has used."""


class Subscription:
    """An iterator of `ReceivedBlock`. Made by `TraceClient.subscribe`; use it as a context manager.

    One thread iterates; any thread may call `close`, which ends the iteration.
    """

    def __init__(
        self,
        connection: Connection,
        selection: Selection,
        *,
        patience_seconds: float,
    ) -> None:
        self.stream = selection.stream
        self._connection = connection
        self._selection = selection
        self._next_offset = selection.start.offset
        self._credit_bytes = selection.credit_bytes
        self._consumed_bytes = 0
        self._backoff = Backoff(patience_seconds)
        self._waiting_reason = ""
        self._closed = threading.Event()
        self._call: ResponseStream[bytes] | None = None
        self._requests: SimpleQueue[trace_service_pb2.SubscribeRequest | None] = SimpleQueue()

    def __enter__(self) -> Self:
        """The subscription itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __iter__(self) -> Self:
        """The subscription itself."""
        return self

    def __next__(self) -> ReceivedBlock:
        """The next block; waits for it.

        Raises:
            StreamNotFoundError, OffsetNotFoundError, …: what the service said.
            ServiceUnavailableError: if it stayed away longer than the client's patience.
        """
        while not self._closed.is_set():
            try:
                data = next(self._connected())
            except StopIteration:
                self._hang_up()
                raise
            except grpc.RpcError as failure:
                self._hang_up()
                if self._closed.is_set():
                    break
                self._wait_after(failure)
                continue
            block = self._receive(data)
            if block is not None:
                return block
        raise StopIteration

    @property
    def next_offset(self) -> int:
        """Every block before it was given, or held nothing wanted."""
        return self._next_offset

    @property
    def waiting_reason(self) -> str:
        """Why nothing can be received right now; empty while connected."""
        return self._waiting_reason

    def close(self) -> None:
        """End the subscription; a thread that waits in it sees the iteration end."""
        self._closed.set()
        self._hang_up()

    def _connected(self) -> ResponseStream[bytes]:
        call = self._call
        if call is None:
            requests: SimpleQueue[trace_service_pb2.SubscribeRequest | None] = SimpleQueue()
            requests.put(self._selection.open(self._next_offset))
            self._requests = requests
            self._consumed_bytes = 0
            self._call = call = self._connection.subscribe(_until_none(requests))
            if self._closed.is_set():  # by another thread, which may not have seen this call
                call.cancel()
        return call

    def _receive(self, data: bytes) -> ReceivedBlock | None:
        received = parse_subscribe_response(data)
        self._next_offset = advance(self.stream, self._next_offset, received)
        self._waiting_reason = ""
        self._backoff.succeeded()
        if not isinstance(received, SubscribedBlock):
            return None
        self._grant(len(received.block))
        return ReceivedBlock(received.offset, received.block, received.next_offset, received.used_traces)

    def _grant(self, size_bytes: int) -> None:
        # A message for each block would cost as much as the block: renew a quarter at a time.
        self._consumed_bytes += size_bytes
        if self._consumed_bytes * 4 >= self._credit_bytes:
            self._requests.put(trace_service_pb2.SubscribeRequest(credit_bytes=self._consumed_bytes))
            self._consumed_bytes = 0

    def _wait_after(self, failure: grpc.RpcError) -> None:
        error = self._connection.error(failure)
        pause_seconds = self._backoff.failed()
        if not is_transient(failure) or self._backoff.spent:
            raise error from failure
        if not self._waiting_reason:
            logger.warning(
                "stream %s: waiting at offset %d: %s", self.stream, self._next_offset, error.message
            )
        self._waiting_reason = error.message
        self._closed.wait(pause_seconds)

    def _hang_up(self) -> None:
        call, self._call = self._call, None
        self._requests.put(None)
        if call is not None:
            call.cancel()


def _until_none(
    requests: SimpleQueue[trace_service_pb2.SubscribeRequest | None],
) -> Iterator[trace_service_pb2.SubscribeRequest]:
    while (request := requests.get()) is not None:
        yield request
