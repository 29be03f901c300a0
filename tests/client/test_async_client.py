"""The async client against a real server over a socket, restarted and killed where that is the point."""

from __future__ import annotations

import asyncio
import inspect
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from models.service_process import ServiceProcess, unused_target
from models.trace_blocks import encode_traces, make_block, make_spec

from lynearm.client import (
    AsyncPublisher,
    AsyncSubscription,
    AsyncTeacherClient,
    AsyncTraceClient,
    Publisher,
    Subscription,
    TeacherClient,
    TraceClient,
)
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import (
    DeadlineError,
    InternalError,
    OffsetNotFoundError,
    ProducerFencedError,
    ServiceUnavailableError,
    StreamExistsError,
    StreamNotFoundError,
    StreamSealedError,
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path / "data") as process:
        yield process


async def publish(publisher: AsyncPublisher, numbers: range) -> None:
    for number in numbers:
        await publisher.publish(make_block(number), (f"p{number}",))


def surface(cls: type) -> dict[str, list[tuple[str, object, object]]]:
    """Public names of a class and, of its methods, the parameters with kind and default."""
    found = {}
    for name in dir(cls):
        if not name.startswith("_"):
            member = inspect.getattr_static(cls, name)
            parameters = inspect.signature(member).parameters.values() if callable(member) else ()
            found[name] = [(one.name, one.kind, one.default) for one in parameters]
    return found


@pytest.mark.parametrize(
    ("sync", "aio"),
    [
        (TraceClient, AsyncTraceClient),
        (TeacherClient, AsyncTeacherClient),
        (Publisher, AsyncPublisher),
        (Subscription, AsyncSubscription),
    ],
)
def test_both_clients_have_the_same_surface(sync: type, aio: type) -> None:
    assert surface(sync) == surface(aio)
    assert len(surface(sync)) >= 3
    assert inspect.signature(TraceClient).parameters == inspect.signature(AsyncTraceClient).parameters


def test_blocks_come_back_as_they_were_published(shared_service: ServiceProcess, stream: str) -> None:
    async def scenario() -> None:
        async with AsyncTraceClient(shared_service.target) as client:
            await client.create_stream(make_spec(stream))
            async with client.publisher(stream, "teacher") as publisher:
                await publish(publisher, range(20))
            assert (publisher.acked_blocks, publisher.in_flight_bytes) == (20, 0)
            info = await client.seal_stream(stream)
            assert (info.next_offset, info.trace_count, info.completion_token_count) == (20, 20, 100)
            async with client.subscribe(stream, credit_bytes=1) as subscription:
                received = [one async for one in subscription]
            assert [one.offset for one in received] == list(range(20))
            assert [bytes(one.block) for one in received] == [make_block(number) for number in range(20)]
            fetched = [bytes(one.block) async for one in client.fetch(stream, 7, 2)]
            assert fetched == [make_block(7), make_block(8)]
            assert await client.finished_prompts(stream) == {f"p{number}" for number in range(20)}
            assert stream in {one.spec.name for one in await client.list_streams()}
            await client.delete_stream(stream)

    asyncio.run(scenario())


def test_a_killed_service_loses_and_repeats_nothing(service: ServiceProcess) -> None:
    received: list[bytes] = []

    async def follow(client: AsyncTraceClient) -> None:
        async with client.subscribe("s") as subscription:
            received.extend([bytes(one.block) async for one in subscription])

    async def scenario() -> None:
        async with AsyncTraceClient(service.target) as client, asyncio.TaskGroup() as tasks:
            await client.create_stream(make_spec())
            tasks.create_task(follow(client))
            async with client.publisher("s", "teacher", max_in_flight_bytes=20_000) as publisher:
                await publish(publisher, range(50))
                await asyncio.to_thread(service.stop, signal.SIGKILL)
                restart = tasks.create_task(asyncio.to_thread(service.start))
                await publish(publisher, range(50, 120))
                await restart
            await client.seal_stream("s")

    asyncio.run(scenario())
    assert received == [make_block(number) for number in range(120)]


def test_an_iteration_that_is_cancelled_takes_nothing(shared_service: ServiceProcess, stream: str) -> None:
    async def scenario() -> None:
        async with AsyncTraceClient(shared_service.target) as client:
            await client.create_stream(make_spec(stream))
            async with client.publisher(stream, "teacher") as publisher, client.subscribe(stream) as blocks:
                for number in range(3):
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await anext(blocks)
                    await publish(publisher, range(number, number + 1))
                    assert (await anext(blocks)).offset == number

    asyncio.run(scenario())


def test_a_publish_that_is_cancelled_hands_over_nothing(service: ServiceProcess) -> None:
    async def scenario() -> None:
        async with AsyncTraceClient(service.target) as client:
            await client.create_stream(make_spec())
            await asyncio.to_thread(service.stop)
            publisher = client.publisher("s", "teacher", max_in_flight_bytes=5000)
            await publish(publisher, range(2))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await publish(publisher, range(2, 3))
            assert publisher.waiting_seconds > 0.1
            with pytest.raises(DeadlineError, match="2 blocks were not acknowledged"):
                await publisher.flush(0.1)
            assert "no trace service answers" in publisher.waiting_reason
            await asyncio.to_thread(service.start)
            await publish(publisher, range(3, 4))
            await publisher.close()
            assert (publisher.acked_blocks, publisher.waiting_reason) == (3, "")
            with pytest.raises(InternalError, match="after close"):
                await publish(publisher, range(5, 6))
            got = [bytes(one.block) async for one in client.fetch("s", 0, 9)]
            assert got == [make_block(0), make_block(1), make_block(3)]

    asyncio.run(scenario())


def test_a_publisher_leaves_at_once_when_its_task_is_cancelled(service: ServiceProcess) -> None:
    async def hold(client: AsyncTraceClient, entered: asyncio.Event) -> None:
        async with client.publisher("s", "teacher") as publisher:
            await publish(publisher, range(1))
            entered.set()
            await asyncio.sleep(3600)

    async def scenario() -> None:
        async with AsyncTraceClient(service.target) as client:
            await client.create_stream(make_spec())
            await asyncio.to_thread(service.stop)  # so that nothing becomes durable
            entered = asyncio.Event()
            task = asyncio.create_task(hold(client, entered))
            await entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_close_ends_a_subscription_that_waits(shared_service: ServiceProcess, stream: str) -> None:
    async def drain(blocks: AsyncSubscription) -> list[int]:
        return [one.offset async for one in blocks]

    async def scenario() -> None:
        async with AsyncTraceClient(shared_service.target) as client:
            await client.create_stream(make_spec(stream))
            first, second = client.subscribe(stream), client.subscribe(stream, start="live")
            readers = [asyncio.create_task(drain(one)) for one in (first, second)]
            await asyncio.sleep(0.2)
            assert not any(reader.done() for reader in readers)
            await first.close()
            assert await readers[0] == []
            await client.close()
            assert await readers[1] == []
            assert (await client.get_stream(stream)).next_offset == 0  # a closed client opens again

    asyncio.run(scenario())


def test_a_live_subscription_starts_at_the_tail(shared_service: ServiceProcess, stream: str) -> None:
    async def scenario() -> None:
        async with AsyncTraceClient(shared_service.target) as client:
            await client.create_stream(make_spec(stream))
            async with client.publisher(stream, "teacher") as publisher:
                await publish(publisher, range(5))
                await publisher.flush(30)
                async with client.subscribe(stream, start="live") as subscription:
                    await publish(publisher, range(5, 6))
                    assert (await anext(subscription)).offset == 5
            ended = [one.offset async for one in client.subscribe(stream, start=4, follow=False)]
            assert ended == [4, 5]

    asyncio.run(scenario())


def test_errors_are_the_typed_ones(shared_service: ServiceProcess, stream: str) -> None:
    async def scenario() -> None:
        async with AsyncTraceClient(shared_service.target) as client:
            for call in (client.get_stream, client.seal_stream, client.finished_prompts):
                with pytest.raises(StreamNotFoundError, match="'nope'"):
                    await call("nope")
            with pytest.raises(StreamNotFoundError, match="'nope'"):
                await anext(client.subscribe("nope"))
            await client.open_stream(make_spec(stream))
            with pytest.raises(StreamExistsError, match="licen"):
                await client.open_stream(make_spec(stream, license="MIT"))
            with pytest.raises(OffsetNotFoundError):
                await anext(client.fetch(stream, 3))
            old, new = (client.publisher(stream, "teacher") for _ in range(2))
            for number, publisher in enumerate((old, new)):
                await publish(publisher, range(number, number + 1))
                await publisher.flush(30)
            await publish(old, range(3, 4))
            with pytest.raises(ProducerFencedError):
                await old.close()
            await client.seal_stream(stream)
            await publish(new, range(2, 3))
            with pytest.raises(StreamSealedError):
                await new.close()

    asyncio.run(scenario())


def test_no_service_is_said_within_seconds() -> None:
    async def scenario() -> None:
        target = unused_target()
        async with AsyncTraceClient(target, patience_seconds=0.2) as client:
            with pytest.raises(ServiceUnavailableError, match=f"no trace service answers at {target}"):
                await client.list_streams()
            with pytest.raises(ServiceUnavailableError, match="lynearm serve"):
                await client.wait_until_ready(0.3)
            with pytest.raises(ServiceUnavailableError):
                await anext(client.subscribe("s"))
            publisher = client.publisher("s", "teacher")
            await publisher.publish(make_block(0))
            with pytest.raises(ServiceUnavailableError, match="lynearm serve"):
                await publisher.close()

    asyncio.run(scenario())


def test_blocks_are_decoded_with_dictionaries_fetched_before(
    shared_service: ServiceProcess, stream: str
) -> None:
    async def scenario() -> None:
        async with AsyncTraceClient(shared_service.target) as client:
            await client.create_stream(make_spec(stream))
            async with client.publisher(stream, "teacher") as publisher:
                await publisher.publish(encode_traces(range(3)))
            dictionaries = client.dictionaries(stream)
            async for one in client.subscribe(stream, follow=False):
                traces = decode_block(one.block, dictionaries=await dictionaries.reader_for(one.block))
                assert [trace.prompt_id for trace in traces] == ["p0", "p1", "p2"]

    asyncio.run(scenario())


def test_a_client_goes_from_one_event_loop_to_the_next(shared_service: ServiceProcess) -> None:
    client = AsyncTraceClient(shared_service.target)
    for _ in range(3):
        assert asyncio.run(client.is_serving())
    asyncio.run(client.close())
