"""What a producer sends, and what it sends again."""

from __future__ import annotations

import pytest

from lynearm.client.producer_window import BATCH_BYTES, Finished, ProducerWindow
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.frames import parse_publish_request


def open_window(*sizes: int, next_sequence: int = 1) -> ProducerWindow:
    """A window that holds blocks of these sizes, and may send."""
    window = ProducerWindow("s", "p", 1 << 30)
    for size in sizes:
        window.add(bytes(size), Finished())
    reopen(window, next_sequence)
    return window


def reopen(window: ProducerWindow, next_sequence: int) -> None:
    window.reopen()
    window.receive(pb.PublishResponse(opened=pb.PublishOpened(epoch=1, next_sequence=next_sequence)))


def sent(window: ProducerWindow) -> list[list[int]]:
    """Sequence numbers in each message until nothing is left to send."""
    messages: list[list[int]] = []
    while (data := window.take()) is not None:
        blocks = parse_publish_request(data)
        assert isinstance(blocks, tuple)
        messages.append([block.sequence for block in blocks])
    return messages


def test_blocks_that_wait_go_together() -> None:
    assert sent(open_window(10, 20, 30)) == [[1, 2, 3]]


def test_a_message_has_no_more_than_a_batch_unless_one_block_does() -> None:
    third = BATCH_BYTES // 3
    assert sent(open_window(third, third, third, third)) == [[1, 2], [3, 4]]
    assert sent(open_window(10, 3 * third + 9, 10)) == [[1], [2], [3]]


def test_a_block_that_comes_later_does_not_wait() -> None:
    window = open_window(10)
    assert sent(window) == [[1]]
    window.add(b"later", Finished())
    assert sent(window) == [[2]]


def test_after_a_lost_connection_a_batch_goes_on_where_the_service_is() -> None:
    window = open_window(10, 20, 30, 40)
    assert sent(window) == [[1, 2, 3, 4]]
    reopen(window, 3)
    assert (window.acked_blocks, sent(window)) == (2, [[3, 4]])
    window.receive(pb.PublishResponse(ack=pb.PublishAck(first_sequence=3, offsets=[7, 8])))
    assert (window.is_empty, window.in_flight_bytes) == (True, 0)


def test_what_is_too_large_for_a_message_leaves_nothing_behind() -> None:
    window = open_window()
    with pytest.raises(InvalidInputError, match="fewer traces"):
        window.add(bytes(3 << 20), Finished(tuple(f"{number:08}" * 30 for number in range(5000))))
    assert (window.is_empty, window.in_flight_bytes, sent(window)) == (True, 0, [])
