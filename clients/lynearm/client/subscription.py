"""Follows a stream block by block, across restarts of the service and from one of its servers to another.

`SubscriptionPosition` says which block is due and when credit is renewed; here is who waits for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

import grpc

from lynearm.client.connection import Connection
from lynearm.client.forks import leave_to_parent
from lynearm.client.interrupts import Interruptible
from lynearm.client.methods import ResponseStream
from lynearm.client.reading_position import FetchPosition, ReceivedBlock, SubscriptionPosition
from lynearm.client.retries import Retries
from lynearm.v1 import trace_service_pb2 as pb


class Subscription:
    """An iterator of `ReceivedBlock`. Made by `TraceClient.subscribe`; use it as a context manager.

    One thread iterates; any thread may call `close`, which ends the iteration. In a forked process, a copy
    goes on by itself from where it was.
    """

    def __init__(self, connection: Connection, position: SubscriptionPosition, *, retries: Retries) -> None:
        self.stream = position.stream
        self._connection = connection
        self._generation = connection.generation
        self._position = position
        self._retries = retries
        self._pid = os.getpid()
        self._closed = False
        self._woken: SimpleQueue[None] = SimpleQueue()
        self._call: ResponseStream[bytes] | None = None
        self._target = ""
        self._requests: SimpleQueue[pb.SubscribeRequest | None] = SimpleQueue()

    def __repr__(self) -> str:
        return f"<Subscription to {self.stream!r}: next offset {self.next_offset}>"

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
        """The next block; waits for it. After a `KeyboardInterrupt`, the next call gives it.

        Raises:
            StreamNotFoundError, OffsetNotFoundError, …: what the service said.
            ServiceUnavailableError: if it stayed away longer than the client's patience.
        """
        while not self._has_ended():
            try:
                data = self._read()
            except StopIteration:
                self._hang_up()
                raise
            except grpc.RpcError as failure:
                self._hang_up()
                if self._has_ended():
                    break
                self._pause(self._retries.failed(failure, self._target))
                continue
            received = self._take(data)
            if received is not None:
                return received
        raise StopIteration

    @property
    def next_offset(self) -> int:
        """Every block before it was given, or held nothing wanted."""
        return self._position.next_offset

    @property
    def damaged_offsets(self) -> tuple[int, ...]:
        """Offsets of the blocks that were skipped, being damaged; none unless that was asked for."""
        return tuple(self._position.damaged_offsets)

    @property
    def waiting_reason(self) -> str:
        """Why nothing can be received right now; empty while connected."""
        return self._retries.waiting_reason

    def close(self) -> None:
        """End the subscription; a thread that waits in it sees the iteration end."""
        self._closed = True
        self._woken.put(None)
        self._hang_up()

    def _has_ended(self) -> bool:
        if self._pid != os.getpid():
            leave_to_parent((self._call, self._requests, self._woken))
            self._call, self._woken, self._pid = None, SimpleQueue(), os.getpid()
        return self._closed or self._generation != self._connection.generation

    def _read(self) -> bytes:
        try:
            with Interruptible() as interrupt:
                call = self._connected()
                interrupt.wake_by(call.cancel)
                return next(call)
        except KeyboardInterrupt:
            self._hang_up()  # the position stands: what may have come is sent again
            raise

    def _connected(self) -> ResponseStream[bytes]:
        call = self._call
        if call is None:
            self._requests = requests = SimpleQueue[pb.SubscribeRequest | None]()
            requests.put(self._position.open())
            self._target = self._connection.endpoints.current
            self._call = call = self._connection.subscribe(self._target, _until_none(requests))
            if self._closed:  # by another thread, which may not have seen this call
                call.cancel()
        return call

    def _take(self, data: bytes) -> ReceivedBlock | None:
        received = self._position.take(data)
        self._retries.succeeded()
        granted = self._position.grant()
        if granted is not None:
            self._requests.put(granted)
        return received

    def _pause(self, seconds: float) -> None:
        try:
            self._woken.get(timeout=seconds)
        except Empty:
            return
        self._woken.put(None)

    def _hang_up(self) -> None:
        if self._pid != os.getpid():
            return
        call, self._call = self._call, None
        self._requests.put(None)
        if call is not None:
            with Interruptible():
                call.cancel()


def fetch_blocks(
    connection: Connection, position: FetchPosition, *, retries: Retries, timeout_seconds: float
) -> Iterator[ReceivedBlock]:
    """The blocks of a range, across the loss of a server.

    Args:
        connection: To the service.
        position: The range.
        retries: Decides what a failure means.
        timeout_seconds: How long one block may take.
    """
    while not position.is_complete:
        target = connection.endpoints.current
        try:
            call = connection.fetch(target, position.open(), timeout_seconds)
            try:
                while (data := _next_or_none(call)) is not None:
                    received = position.take(data)
                    retries.succeeded()
                    yield received
            finally:
                call.cancel()
            return
        except grpc.RpcError as failure:
            pause_seconds = position.failed(failure, target, retries)
        if pause_seconds is None:
            return
        time.sleep(pause_seconds)


def _next_or_none(call: ResponseStream[bytes]) -> bytes | None:
    with Interruptible() as interrupt:
        interrupt.wake_by(call.cancel)
        return next(call, None)


def _until_none(
    requests: SimpleQueue[pb.SubscribeRequest | None],
) -> Iterator[pb.SubscribeRequest]:
    while (request := requests.get()) is not None:
        yield request
