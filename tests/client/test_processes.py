"""Clients in other processes: sent there by pickle, or inherited by a fork."""

from __future__ import annotations

import asyncio
import pickle
import threading

import pytest
from models.client_children import publish_one, read_all, read_all_async, read_on, run_in_child
from models.service_process import ServiceProcess, unused_target
from models.trace_blocks import make_block, make_spec

from lynearm.client import AsyncTraceClient, Credentials, TraceClient
from lynearm.wire.errors import PreconditionError, StreamNotFoundError

METHODS = ("fork", "spawn")


def fill(service: ServiceProcess, stream: str, count: int = 3) -> None:
    with TraceClient(service.target) as client:
        client.create_stream(make_spec(stream))
        with client.publisher(stream, "teacher") as publisher:
            for number in range(count):
                publisher.publish(make_block(number))


@pytest.mark.parametrize("method", METHODS)
def test_a_child_reads_with_its_parents_client(
    shared_service: ServiceProcess, stream: str, method: str
) -> None:
    fill(shared_service, stream)
    client = TraceClient(shared_service.target)
    # The parent is in the middle of everything: it publishes, and follows, before and after the child.
    with client, client.publisher(stream, "parent") as publisher, client.subscribe(stream) as blocks:
        publisher.publish(make_block(3))
        publisher.flush(30)
        assert [next(blocks).offset for _ in range(2)] == [0, 1]
        for _ in range(2):
            assert run_in_child(method, read_all, (client, stream)) == [0, 1, 2, 3]
        publisher.publish(make_block(4))
        publisher.flush(30)
        assert [next(blocks).offset for _ in range(3)] == [2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("was_used", [False, True])
def test_a_child_reads_with_its_parents_async_client(
    shared_service: ServiceProcess, stream: str, method: str, was_used: bool
) -> None:
    fill(shared_service, stream)
    client = AsyncTraceClient(shared_service.target)

    async def use_and_close() -> None:
        async with client:
            await client.get_stream(stream)

    if was_used:
        asyncio.run(use_and_close())
    assert run_in_child(method, read_all_async, (client, stream)) == [0, 1, 2]


def test_a_child_of_a_connected_async_client_is_told(shared_service: ServiceProcess, stream: str) -> None:
    fill(shared_service, stream)

    async def scenario() -> None:
        async with AsyncTraceClient(shared_service.target) as client:
            await client.get_stream(stream)
            sync = TraceClient(shared_service.target)
            for refused in (
                run_in_child("fork", read_all_async, (client, stream)),
                run_in_child("fork", read_all, (sync, stream)),
            ):
                assert isinstance(refused, PreconditionError)
                assert "spawn" in str(refused)
            assert run_in_child("spawn", read_all_async, (client, stream)) == [0, 1, 2]
            assert (await client.get_stream(stream)).next_offset == 3
        assert run_in_child("fork", read_all, (sync, stream)) == [0, 1, 2]

    asyncio.run(scenario())


def test_a_closed_async_client_counts_until_nothing_refers_to_its_calls(
    shared_service: ServiceProcess, stream: str
) -> None:
    fill(shared_service, stream)

    async def fail() -> None:
        async with AsyncTraceClient(shared_service.target) as client, client.subscribe("none") as blocks:
            assert [one async for one in blocks]

    client = TraceClient(shared_service.target)
    with pytest.raises(StreamNotFoundError) as kept:  # its traceback holds the call
        asyncio.run(fail())
    assert isinstance(run_in_child("fork", read_all, (client, stream)), PreconditionError)
    assert run_in_child("spawn", read_all, (client, stream)) == [0, 1, 2]
    del kept
    assert run_in_child("fork", read_all, (client, stream)) == [0, 1, 2]


def test_a_process_may_fork_as_soon_as_its_async_client_is_closed(
    shared_service: ServiceProcess, stream: str
) -> None:
    fill(shared_service, stream)
    sync = TraceClient(shared_service.target)

    async def scenario() -> None:
        async with AsyncTraceClient(shared_service.target) as client:
            async with client.publisher(stream, "other") as publisher:
                await publisher.publish(make_block(3))
            async with client.subscribe(stream) as blocks:
                async for _ in blocks:
                    break
        # In a notebook, say: the loop does not turn in between, and all of these can still be named.
        assert run_in_child("fork", read_all, (sync, stream)) == [0, 1, 2, 3]
        assert publisher.acked_blocks == 1
        assert blocks.next_offset == 1

    asyncio.run(scenario())


def test_forks_break_nothing_of_a_parent_that_is_busy(shared_service: ServiceProcess, stream: str) -> None:
    fill(shared_service, stream, count=0)
    received: list[bytes] = []

    def follow() -> None:
        with client.subscribe(stream) as blocks:
            received.extend(bytes(one.block) for one in blocks)

    with TraceClient(shared_service.target) as client:
        reader = threading.Thread(target=follow)
        reader.start()
        with client.publisher(stream, "parent", max_in_flight_bytes=20_000) as publisher:
            for number in range(100):
                publisher.publish(make_block(number))
                if number % 10 == 0:
                    offsets = run_in_child("fork", read_all, (client, stream))
                    assert offsets == list(range(len(offsets)))
        client.seal_stream(stream)
        reader.join(60)
    assert received == [make_block(number) for number in range(100)]


def test_a_forked_subscription_goes_on_by_itself(shared_service: ServiceProcess, stream: str) -> None:
    fill(shared_service, stream)
    with TraceClient(shared_service.target) as client, client.subscribe(stream, follow=False) as blocks:
        assert next(blocks).offset == 0
        assert run_in_child("fork", read_on, blocks) == [1, 2]
        assert [one.offset for one in blocks] == [1, 2]


def test_a_publisher_stays_in_its_process(shared_service: ServiceProcess, stream: str) -> None:
    fill(shared_service, stream)
    with TraceClient(shared_service.target) as client, client.publisher(stream, "teacher") as publisher:
        refused = run_in_child("fork", publish_one, publisher)
        assert isinstance(refused, PreconditionError)
        assert "make a publisher in the process" in str(refused)
        publisher.publish(make_block(3))
        publisher.flush(30)
    with pytest.raises(TypeError):
        pickle.dumps(publisher)


@pytest.mark.parametrize("kind", [TraceClient, AsyncTraceClient])
def test_a_pickle_holds_the_settings_alone(
    kind: type[TraceClient | AsyncTraceClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LYNEARM_TOKEN", "secret-of-the-environment")
    targets = [unused_target(), "localhost:1"]
    client = kind(targets, timeout_seconds=2.0, patience_seconds=3.0)
    pickled = pickle.dumps(client)
    assert b"secret" not in pickled
    assert b"hannel" not in pickled
    copy = pickle.loads(pickled)
    assert type(copy) is kind
    assert copy.target == client.target == ",".join(targets)
    assert pickle.dumps(copy) == pickled
    given = pickle.loads(pickle.dumps(kind(targets, credentials=Credentials(token="given"))))
    assert pickle.dumps(given) != pickled
