"""Peers that stall, freeze, or come back with less than they had."""

from __future__ import annotations

import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from models.server_process import Server, publish_singly, read_all
from traces.harness import make_block, make_spec

from lynearm.client import TraceClient
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.errors import InternalError, LynearmError

MIB = 1 << 20

_FOLLOWER = """
import sys
from lynearm.client import TraceClient
with TraceClient(sys.argv[1]) as client:
    for received in client.subscribe("s"):
        print(received.offset, flush=True)
"""


def wait_until(holds: Callable[[], bool], *, seconds: float = 45) -> None:
    """Wait for something that takes a while; what never comes fails the test."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def test_a_subscriber_that_stalls_costs_the_server_no_more_than_its_credit(tmp_path: Path) -> None:
    credit_bytes = 8 * MIB
    with (
        Server(tmp_path / "data", cache_bytes=MIB) as server,
        TraceClient(server.target) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        # The same work before, so that only the stall makes a difference.
        publish_singly(client, range(40), size_bytes=MIB)
        assert len(read_all(client)) == 40
        before = server.rss_bytes
        requests: queue.SimpleQueue[pb.SubscribeRequest | None] = queue.SimpleQueue()
        opening = pb.SubscribeOpen(stream="s", credit_bytes=credit_bytes, follow=True)
        requests.put(pb.SubscribeRequest(open=opening))
        call = TraceServiceStub(channel).Subscribe(iter(requests.get, None))
        next(call)
        publish_singly(client, range(40, 120), size_bytes=MIB)
        assert len(read_all(client)) == 120
        assert server.rss_bytes - before < credit_bytes + 16 * MIB
        # It stalled, it was not lost.
        requests.put(pb.SubscribeRequest(credit_bytes=1 << 40))
        for offset in range(1, 120):
            assert next(call).offset == offset
        requests.put(None)
        call.cancel()


def test_a_frozen_peer_is_noticed_by_either_side_and_holds_up_nobody(tmp_path: Path) -> None:
    with (
        Server(tmp_path / "first", max_calls=1) as server,
        Server(tmp_path / "second") as frozen,
        TraceClient(server.target) as client,
        TraceClient(frozen.target) as other,
    ):
        publish_singly(client, range(1))
        other.create_stream(make_spec())
        follower = subprocess.Popen([sys.executable, "-c", _FOLLOWER, server.target], stdout=subprocess.PIPE)
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"0\n"
        assert not _has_room(client)
        publisher = other.publisher("s", "p")
        publisher.publish(make_block(1))
        publisher.flush()
        follower.send_signal(signal.SIGSTOP)
        frozen.send_signal(signal.SIGSTOP)
        publisher.publish(make_block(2))
        # Either side asks after 10 s and gives up after 5 more; gRPC by itself would take more than a minute.
        wait_until(lambda: _has_room(client) and publisher.waiting_reason != "")
        publish_singly(client, range(1, 2))
        frozen.send_signal(signal.SIGCONT)
        publisher.close(timeout_seconds=60)
        assert read_all(other) == [make_block(1), make_block(2)]
        follower.send_signal(signal.SIGCONT)
        assert follower.stdout.readline() == b"1\n"
        follower.kill()
        follower.communicate()


def _has_room(client: TraceClient) -> bool:
    try:
        client.list_streams()
    except LynearmError:
        return False
    return True


def test_a_service_that_lost_acknowledged_blocks_is_not_taken_for_the_same(tmp_path: Path) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"
    with Server(data) as server:
        port = int(server.target.rpartition(":")[2])
        client = TraceClient(server.target)
        client.create_stream(make_spec())
        publisher = client.publisher("s", "p")
        publisher.publish(make_block(0))
        publisher.flush()
    shutil.copytree(data, copy)
    with Server(data, port=port):
        for number in (1, 2):
            publisher.publish(make_block(number))
            publisher.flush(timeout_seconds=60)
    shutil.rmtree(data)
    copy.rename(data)
    with Server(data, port=port):
        publisher.publish(make_block(3))
        with pytest.raises(InternalError, match="3 were, it has 1"):
            publisher.flush(timeout_seconds=60)
        assert client.get_stream("s").next_offset == 1
        client.close()
