"""The channels of the sync client, one for each address, opened when they are first used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import grpc

from lynearm.client import methods
from lynearm.client.calls import Call
from lynearm.client.credentials import Credentials, open_channel
from lynearm.client.endpoints import Endpoints
from lynearm.client.interrupts import Interruptible
from lynearm.client.methods import ResponseStream
from lynearm.client.retries import client_closed
from lynearm.v1 import trace_service_pb2 as pb

Result = TypeVar("Result")

_inherited: list[object] = []
"""Channels and calls of the process that this one was forked from. To destroy one would use the parent's
sockets, and locks that threads held which are not here."""


class Connection:
    """Channels to every address of a service; a forked process opens its own. Threads may share it.

    Args:
        endpoints: The addresses.
        credentials: Of the client.
    """

    def __init__(self, endpoints: Endpoints, credentials: Credentials) -> None:
        self.endpoints = endpoints
        self._credentials = credentials
        self.generation = 0
        """Grows when the connection is closed: what was made before belongs to the past."""
        self._channels: dict[str, grpc.Channel] = {}
        self._pid = os.getpid()

    def publish(self, target: str, requests: Iterator[bytes]) -> ResponseStream[pb.PublishResponse]:
        """Begin to publish; requests are framed by hand."""
        method = methods.publish_method(self._channel(target))
        return cast("ResponseStream[pb.PublishResponse]", _begin(method, requests))

    def subscribe(self, target: str, requests: Iterator[pb.SubscribeRequest]) -> ResponseStream[bytes]:
        """Begin to subscribe; responses are bytes."""
        method = methods.subscribe_method(self._channel(target))
        return cast("ResponseStream[bytes]", _begin(method, requests))

    def fetch(
        self, target: str, request: pb.FetchBlocksRequest, timeout_seconds: float
    ) -> ResponseStream[bytes]:
        """Begin to fetch; responses are bytes."""
        method = methods.fetch_method(self._channel(target))
        return cast("ResponseStream[bytes]", _begin(method, request, timeout=timeout_seconds))

    def ask(self, target: str, call: Call[Result], timeout_seconds: float) -> Result:
        """Call, and wait for the answer.

        Raises:
            grpc.RpcError: if the call failed.
        """
        method = methods.call_method(self._channel(target), call)
        with Interruptible() as interrupt:
            if call.streamed:
                responses = _begin(method, call.request, timeout=timeout_seconds)
                interrupt.wake_by(responses.cancel)
                answer = list(responses)
            else:
                answer = _result(method, call.request, timeout_seconds, interrupt)
        return call.read(answer)

    def is_serving(self, target: str, timeout_seconds: float) -> bool:
        """Whether the service at an address answers its health check with SERVING."""
        method = methods.health_method(self._channel(target))
        try:
            with Interruptible() as interrupt:
                answer = _result(method, methods.HEALTH_REQUEST, timeout_seconds, interrupt)
        except grpc.RpcError:
            return False
        return methods.is_serving(answer)

    def close(self) -> None:
        """Close the channels; calls on them end. The next call opens others."""
        self._leave_parent()
        self.generation += 1
        channels, self._channels = self._channels, {}
        with Interruptible():
            for channel in channels.values():
                channel.close()

    def _channel(self, target: str) -> grpc.Channel:
        self._leave_parent()
        channel = self._channels.get(target)
        if channel is not None:
            return channel
        with Interruptible():
            opened = open_channel(target, self._credentials, methods.CHANNEL_OPTIONS)
            channel = self._channels.setdefault(target, opened)
            if channel is not opened:  # another thread was faster
                opened.close()
        return channel

    def _leave_parent(self) -> None:
        if self._pid != os.getpid():
            leave_to_parent(self._channels)
            self._channels, self._pid = {}, os.getpid()


def leave_to_parent(thing: object) -> None:
    """Never destroy what belongs to the process that this one was forked from."""
    _inherited.append(thing)


# Any: what grpc's methods take and return is typed nowhere.
def _result(method: Any, request: object, timeout_seconds: float, interrupt: Interruptible) -> Any:
    if not interrupt.is_active:
        return _begin(method, request, timeout=timeout_seconds)
    # A call that can be cancelled, which costs a thread of grpc's.
    future = _begin(method.future, request, timeout=timeout_seconds)
    interrupt.wake_by(future.cancel)
    return future.result()


def _begin(method: Any, *arguments: object, **options: object) -> Any:
    try:
        return method(*arguments, **options)
    except ValueError as error:  # grpc's word for a channel that another thread has closed
        raise client_closed("a call") from error
