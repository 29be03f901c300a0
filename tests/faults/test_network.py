"""Connections that are slow, cut in the middle of a message, or half open: nothing is lost or doubled."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from models.server_process import Server, read_all
from models.tcp_proxy import Proxy
from traces.harness import make_block, make_spec

from lynearm.client import TraceClient
from lynearm.client.connection import Connection


def test_connections_that_are_slow_and_cut_lose_and_double_nothing(tmp_path: Path) -> None:
    count = 400
    with (
        Server(tmp_path / "data") as server,
        Proxy(server.target, delay_seconds=0.005, cut_bytes=300_000) as proxy,
        TraceClient(proxy.target) as client,
        TraceClient(proxy.target) as other,
        TraceClient(server.target) as direct,
    ):
        direct.create_stream(make_spec())
        received: list[bytes] = []

        def follow() -> None:
            with other.subscribe("s", credit_bytes=100_000) as blocks:
                received.extend(bytes(one.block) for one in blocks)

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        with client.publisher("s", "p", max_in_flight_bytes=200_000) as publisher:
            for number in range(count):
                publisher.publish(make_block(number, 8000), [f"prompt-{number}"])
        direct.seal_stream("s")
        reader.join(120)
        expected = [make_block(number, 8000) for number in range(count)]
        assert read_all(direct) == expected
        assert received == expected
        assert direct.finished_prompts("s") == {f"prompt-{number}" for number in range(count)}
        assert proxy.cuts > 10


def test_half_open_connections_are_given_up_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    with (
        Server(tmp_path / "data") as server,
        Proxy(server.target) as up,
        Proxy(server.target) as down,
        TraceClient(up.target) as unheard,
        TraceClient(down.target) as deaf,
        TraceClient(server.target) as direct,
    ):
        direct.create_stream(make_spec())
        first, second = unheard.publisher("s", "unheard"), deaf.publisher("s", "deaf")
        blocks = iter(deaf.subscribe("s"))
        for publisher in (first, second):
            publisher.publish(make_block(0))
            publisher.flush()
        assert [next(blocks).offset for _ in range(2)] == [0, 1]
        # The one's blocks do not arrive; the other's do, but neither its acknowledgements nor the stream.
        up.swallow("up")
        down.swallow("down")
        for number in range(1, 6):
            first.publish(make_block(number))
            second.publish(make_block(number))
        for publisher in (first, second):
            publisher.close(timeout_seconds=60)
        assert up.swallowed_bytes > 5 * 2000
        assert down.swallowed_bytes > 0
        followed = [bytes(next(blocks).block) for _ in range(10)]
        assert sorted(followed) == sorted(2 * [make_block(number) for number in range(1, 6)])
        assert read_all(direct)[2:] == followed


def test_a_publisher_that_reconnects_sends_nothing_before_it_knows_what_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_call = Connection.publish

    def start_slowly(self: Connection, *arguments: Any) -> Any:
        call = start_call(self, *arguments)
        time.sleep(0.3)  # while grpc's thread takes the first requests
        return call

    monkeypatch.setattr(Connection, "publish", start_slowly)
    with (
        Server(tmp_path / "data") as server,
        Proxy(server.target) as proxy,
        TraceClient(server.target) as direct,
        TraceClient(proxy.target) as client,
    ):
        direct.create_stream(make_spec())
        with client.publisher("s", "p") as publisher:
            publisher.publish(make_block(0))
            publisher.flush()
            proxy.swallow("up")
            for number in range(1, 5):
                publisher.publish(make_block(number))
            while proxy.swallowed_bytes < 4 * 2000:
                time.sleep(0.01)
            proxy.cut()
            while not publisher.waiting_reason:
                time.sleep(0.001)
            # What follows the blocks that were sent is not what follows those that arrived.
            publisher.publish(make_block(5))
        assert read_all(direct) == [make_block(number) for number in range(6)]
