"""Consumers: named readers of a stream, whose positions the service keeps.

A trainer keeps its position in its own checkpoint, saved with the weights, and stores it here afterwards:
then publishers know how far they may run ahead, the service what it may drop, and people where it is.
"""

from __future__ import annotations

from lynearm.client import calls, consumer_calls
from lynearm.client.consumer_calls import ConsumerInfo
from lynearm.client.sending import SendCall
from lynearm.wire.errors import ConsumerNotFoundError
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.traces import Cursor


class ConsumerClient:
    """The consumers of one service; `TraceClient.consumers`. Threads may share it.

    Args:
        send: Sends calls.
    """

    def __init__(self, send: SendCall) -> None:
        self._send = send

    def commit(
        self, stream: str, name: str, cursor: Cursor, *, allow_backwards: bool = False
    ) -> ConsumerInfo:
        """Store how far a consumer is; durable on return. The first time makes the consumer.

        Args:
            stream: That it reads.
            name: Of the consumer in the stream.
            cursor: What it has used.
            allow_backwards: Take a cursor before the stored one, too.

        Raises:
            StreamNotFoundError: there is no such stream.
            OffsetNotFoundError: the stream is not that long.
            CursorBackwardsError: the stored cursor is further.
        """
        return self._send(consumer_calls.commit_cursor(stream, name, cursor, allow_backwards=allow_backwards))

    def get(self, stream: str, name: str) -> ConsumerInfo:
        """A consumer as it is now.

        Raises:
            StreamNotFoundError, ConsumerNotFoundError: there is no such stream or consumer.
        """
        return self._send(consumer_calls.get_consumer(stream, name))

    def cursor(self, stream: str, name: str) -> Cursor:
        """Where a consumer goes on reading; the first block that is there, if it never stored a cursor.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        try:
            return self.get(stream, name).cursor
        except ConsumerNotFoundError:
            return Cursor(self._send(calls.get_stream(stream)).first_offset)

    def list(self, stream: str) -> list[ConsumerInfo]:
        """The consumers of a stream, by name.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        return self._send(consumer_calls.list_consumers(stream))

    def delete(self, stream: str, name: str) -> None:
        """Forget a consumer; publishers do not wait for it any more.

        Raises:
            StreamNotFoundError, ConsumerNotFoundError: there is no such stream or consumer.
        """
        self._send(consumer_calls.delete_consumer(stream, name))

    def set_max_lag(self, stream: str, *, blocks: int = 0, traces: int = 0) -> StreamInfo:
        """Bound how far publishers may run ahead of the slowest consumer. While there is none, nobody waits.

        Args:
            stream: Name of the stream.
            blocks: 0: no bound.
            traces: 0: no bound.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        return self._send(consumer_calls.set_max_lag(stream, blocks=blocks, traces=traces))
