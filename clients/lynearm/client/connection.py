"""The channels of the sync client, one for each address, opened when they are first used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from lynearm.client import methods
from lynearm.client.calls import Call
from lynearm.client.credentials import Credentials, open_channel
from lynearm.client.endpoints import Endpoints
from lynearm.client.forks import close_before_forks, leave_to_parent, opening
from lynearm.client.interrupts import Interruptible
from lynearm.client.methods import ResponseStream
from lynearm.client.retries import client_closed
from lynearm.v1 import teacher_service_pb2 as teacher_pb
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.allocation import keep_freed_memory

Result = TypeVar("Result")


class Connection:
    """Channels to every address of a service. Threads may share it.

    Before a fork, and when the client is closed, they are closed, and calls on them end; later calls, and
    those of the child, open others.

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
        close_before_forks(self)
        keep_freed_memory()

    def publish(self, target: str, requests: Iterator[bytes]) -> ResponseStream[pb.PublishResponse]:
        """Begin to publish; requests are framed by hand."""
        call = self._begin(target, methods.publish_method, requests)
        return cast("ResponseStream[pb.PublishResponse]", call)

    def subscribe(self, target: str, requests: Iterator[pb.SubscribeRequest]) -> ResponseStream[bytes]:
        """Begin to subscribe; responses are bytes."""
        return cast("ResponseStream[bytes]", self._begin(target, methods.subscribe_method, requests))

    def fetch(
        self, target: str, request: pb.FetchBlocksRequest, timeout_seconds: float
    ) -> ResponseStream[bytes]:
        """Begin to fetch; responses are bytes."""
        call = self._begin(target, methods.fetch_method, request, timeout=timeout_seconds)
        return cast("ResponseStream[bytes]", call)

    def score(
        self, target: str, requests: Iterator[teacher_pb.ScoreRequest], timeout_seconds: float | None
    ) -> ResponseStream[teacher_pb.ScoreResponse]:
        """Begin to have a teacher score completions."""
        call = self._begin(target, methods.score_method, requests, timeout=timeout_seconds)
        return cast("ResponseStream[teacher_pb.ScoreResponse]", call)

    def generate(
        self, target: str, request: teacher_pb.GenerateRequest, timeout_seconds: float | None
    ) -> ResponseStream[teacher_pb.GenerateResponse]:
        """Begin to have a teacher answer a prompt."""
        call = self._begin(target, methods.generate_method, request, timeout=timeout_seconds)
        return cast("ResponseStream[teacher_pb.GenerateResponse]", call)

    def ask(self, target: str, call: Call[Result], timeout_seconds: float) -> Result:
        """Call, and wait for the answer.

        Raises:
            grpc.RpcError: if the call failed.
        """

        def make_method(channel: grpc.Channel) -> Any:
            return methods.call_method(channel, call)

        with Interruptible() as interrupt:
            if call.streamed:
                responses = self._begin(target, make_method, call.request, timeout=timeout_seconds)
                interrupt.wake_by(responses.cancel)
                answer = list(responses)
            else:
                answer = self._ask(target, make_method, call.request, timeout_seconds, interrupt)
        return call.read(answer)

    def is_serving(self, target: str, timeout_seconds: float) -> bool:
        """Whether the service at an address answers its health check with SERVING."""
        try:
            with Interruptible() as interrupt:
                answer = self._ask(
                    target, methods.health_method, methods.HEALTH_REQUEST, timeout_seconds, interrupt
                )
        except grpc.RpcError:
            return False
        return methods.is_serving(answer)

    def close(self) -> None:
        """Close the channels, and tell by `generation` that what was made before is over."""
        self.generation += 1
        with Interruptible():
            self.prepare_fork()

    def prepare_fork(self) -> None:
        """Close the channels; returns when none of their threads is in gRPC."""
        self._leave_parent()
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    # Any, below: what grpc's methods take and return is typed nowhere.
    def _ask(
        self,
        target: str,
        make_method: Callable[[grpc.Channel], Any],
        request: Message,
        timeout_seconds: float,
        interrupt: Interruptible,
    ) -> Any:
        if not interrupt.is_active:
            return self._begin(target, make_method, request, timeout=timeout_seconds)

        def make_future(channel: grpc.Channel) -> Any:
            return make_method(channel).future

        # A call that can be cancelled, which costs a thread of grpc's.
        future = self._begin(target, make_future, request, timeout=timeout_seconds)
        interrupt.wake_by(future.cancel)
        return future.result()

    def _begin(
        self, target: str, make_method: Callable[[grpc.Channel], Any], *arguments: object, **options: object
    ) -> Any:
        while True:
            generation, channel = self.generation, self._channel(target)
            try:
                return make_method(channel)(*arguments, **options)
            except ValueError as error:  # grpc's word for a channel that another thread has closed
                if generation != self.generation or self._channels.get(target) is channel:
                    raise client_closed("a call") from error
                # It was closed before a fork.

    def _channel(self, target: str) -> grpc.Channel:
        with opening():
            self._leave_parent()
            channel = self._channels.get(target)
            if channel is None:
                with Interruptible():
                    channel = open_channel(target, self._credentials, methods.CHANNEL_OPTIONS)
                    self._channels[target] = channel
        return channel

    def _leave_parent(self) -> None:
        if self._pid != os.getpid():
            leave_to_parent(self._channels)
            self._channels, self._pid = {}, os.getpid()
