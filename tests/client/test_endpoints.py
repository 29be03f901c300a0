"""Several addresses of one service: which is used, when it is left, and that nothing is lost by it."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import pytest
from models.service_process import ServiceProcess, unused_target
from models.trace_blocks import make_block, make_spec

from lynearm.client import AsyncTraceClient, TraceClient
from lynearm.client.endpoints import Endpoints, parse_targets
from lynearm.client.retries import FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS, Retries
from lynearm.wire.errors import InvalidInputError, RateLimitedError, ServiceUnavailableError


def test_addresses_come_with_commas_or_as_a_sequence() -> None:
    expected = ("a:1", "[::1]:2", "b:65535")
    assert parse_targets("a:1,[::1]:2, b:65535") == parse_targets(["a:1", "[::1]:2", "b:65535"]) == expected
    assert TraceClient(["a:1", "b:2"]).target == AsyncTraceClient("a:1,b:2").target == "a:1,b:2"


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ([], "host:port"),
        ("a:1,", "host:port"),
        (["a:1", "b"], "'b'"),
        ("a:1,b:2,a:1", "names an address twice"),
    ],
)
def test_addresses_that_are_none_are_refused(target: str | list[str], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        TraceClient(target)


def test_an_address_is_left_once_for_all_that_failed_there() -> None:
    endpoints = Endpoints(("a:1", "b:2", "c:3"))
    endpoints.leave("a:1")
    endpoints.leave("a:1")  # by another call, which failed there too
    assert endpoints.current == "b:2"
    endpoints.leave("b:2")
    endpoints.leave("c:3")
    assert endpoints.current == "a:1"


def test_waits_double_with_full_jitter_once_every_address_was_tried() -> None:
    random.seed(0)
    for addresses in (1, 2):
        targets = tuple(f"a:{port + 1}" for port in range(addresses))
        tries = [Retries(Endpoints(targets), 60.0) for _ in range(200)]
        for failure in range(12):
            pauses = [one.lost(ServiceUnavailableError("away")) for one in tries]
            bound = min(LAST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (failure // addresses))
            assert max(pauses) <= bound
            assert max(pauses) > 0.9 * bound  # spread over all of it
            assert min(pauses) < 0.1 * bound


def test_a_service_that_says_when_to_come_back_is_believed() -> None:
    error = RateLimitedError("too fast", "slow down")
    error.retry_seconds = 3.0
    patient, hasty = (Retries(Endpoints(("a:1",)), patience) for patience in (60.0, 1.0))
    assert 3.0 <= patient.lost(error) <= 3.0 + FIRST_PAUSE_SECONDS
    with pytest.raises(RateLimitedError):
        hasty.lost(error)


def test_patience_lasts_until_every_address_was_tried() -> None:
    retries = Retries(Endpoints(("a:1", "b:2", "c:3")), 0.0)
    for target in ("a:1", "b:2"):
        retries.lost(ServiceUnavailableError("away"), target)
    with pytest.raises(ServiceUnavailableError):
        retries.lost(ServiceUnavailableError("away"), "c:3")


def test_another_server_takes_over(tmp_path: Path) -> None:
    first, second = ServiceProcess(tmp_path / "data"), ServiceProcess(tmp_path / "data")
    received: list[bytes] = []
    with TraceClient([unused_target(), first.target, second.target]) as client:
        with first:
            client.create_stream(make_spec())
            follow = threading.Thread(target=_follow, args=(client, received))
            follow.start()
            publisher = client.publisher("s", "teacher")
            for number in range(20):
                publisher.publish(make_block(number))
        # The first was killed with blocks in flight.
        with second:
            for number in range(20, 40):
                publisher.publish(make_block(number))
            publisher.close(60)
            assert client.get_stream("s").next_offset == 40
            client.seal_stream("s")
            follow.join(60)
    assert received == [make_block(number) for number in range(40)]


def _follow(client: TraceClient, received: list[bytes]) -> None:
    with client.subscribe("s") as blocks:
        received.extend(bytes(one.block) for one in blocks)


def test_another_server_takes_over_from_an_async_clients(tmp_path: Path) -> None:
    first, second = ServiceProcess(tmp_path / "data"), ServiceProcess(tmp_path / "data")

    async def follow(client: AsyncTraceClient) -> list[bytes]:
        async with client.subscribe("s") as blocks:
            return [bytes(one.block) async for one in blocks]

    async def scenario() -> list[bytes]:
        async with AsyncTraceClient(f"{first.target},{second.target}") as client:
            await asyncio.to_thread(first.start)
            await client.create_stream(make_spec())
            reader = asyncio.create_task(follow(client))
            publisher = client.publisher("s", "teacher")
            for number in range(20):
                await publisher.publish(make_block(number))
            await asyncio.to_thread(first.kill)
            await asyncio.to_thread(second.start)
            for number in range(20, 40):
                await publisher.publish(make_block(number))
            await publisher.close(60)
            assert [one.offset async for one in client.fetch("s", 39)] == [39]
            await client.seal_stream("s")
            return await reader

    try:
        assert asyncio.run(scenario()) == [make_block(number) for number in range(40)]
    finally:
        first.kill()
        second.kill()
