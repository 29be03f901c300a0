"""Jobs and consumers by the asynchronous client, against a real service."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client.job_worker import block_of, read_stream
from models.service_process import ServiceProcess
from traces.harness import make_spec

from lynearm.client import AsyncTraceClient, JobPrompt, TraceClient
from lynearm.client.async_consumers import AsyncConsumerClient
from lynearm.client.async_jobs import AsyncJobClient
from lynearm.client.async_leases import AsyncPromptWorker
from lynearm.client.consumers import ConsumerClient
from lynearm.client.jobs import JobClient
from lynearm.client.leases import PromptWorker
from lynearm.wire.errors import DeadlineError, LeaseSupersededError, RateLimitedError, StorageFullError
from lynearm.wire.labels import TraceFilter
from lynearm.wire.traces import Cursor
from lynearm.wire.work import FailedSamples


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path / "data", lease_silence_seconds=0.6) as process:
        yield process


def public(cls: type) -> dict[str, list[str]]:
    return {
        name: list(inspect.signature(member).parameters)
        for name, member in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("sync", "aio"),
    [
        (JobClient, AsyncJobClient),
        (ConsumerClient, AsyncConsumerClient),
        (PromptWorker, AsyncPromptWorker),
    ],
)
def test_both_have_the_same_surface(sync: type, aio: type) -> None:
    assert public(sync) == public(aio)
    assert len(public(sync)) >= 2


def test_a_job_is_created_and_worked_on(service: ServiceProcess) -> None:
    prompts = [JobPrompt(f"p{number}", b"x") for number in range(10)]

    async def work(client: AsyncTraceClient, name: str) -> None:
        async with (
            client.prompt_worker("s", "j", worker=name, max_units=4) as worker,
            client.publisher("s", name, labels={"role": name}) as publisher,
        ):
            async for lease in worker:
                units = [(one.prompt_id, index) for one in lease.prompts for index in one.sample_indices]
                await publisher.publish(block_of(units, name), finished_work=[lease.finish(units)])

    async def scenario() -> None:
        async with AsyncTraceClient(service.target) as client:
            await client.create_stream(make_spec())
            job = await client.jobs.create("s", "j", prompts, samples_per_prompt=3)
            assert (job.state, job.waiting_units) == ("open", 30)
            await asyncio.gather(work(client, "a"), work(client, "b"))
            assert [one.state for one in await client.jobs.list("s")] == ["done"]
            wanted = TraceFilter(producer_labels={"role": frozenset({"nobody"})})
            async with client.subscribe("s", follow=False, wanted=wanted) as subscription:
                assert [one async for one in subscription] == []
                assert subscription.next_offset == (await client.get_stream("s")).next_offset

    asyncio.run(scenario())
    with TraceClient(service.target) as client:
        units = sorted(unit for _, of_block in read_stream(client) for unit in of_block)
    assert units == sorted((prompt.prompt_id, index) for prompt in prompts for index in range(3))


def test_leases_are_renewed_until_their_worker_is_gone(service: ServiceProcess) -> None:
    async def scenario() -> None:
        async with AsyncTraceClient(service.target) as client:
            await client.create_stream(make_spec())
            await client.jobs.create("s", "j", [JobPrompt("p", b"")])
            hungry = client.prompt_worker("s", "j", worker="hungry")
            async with client.prompt_worker("s", "j", worker="slow") as slow:
                lease = await slow.take()
                assert lease is not None
                for _ in range(15):
                    assert await hungry.take() is None
                    await asyncio.sleep(0.1)
                assert not lease.is_lost
            taken = await hungry.take()
            assert taken is not None
            late = client.publisher("s", "slow")
            await late.publish(block_of([("p", 0)], "slow"), finished_work=[lease.finish([("p", 0)])])
            with pytest.raises(LeaseSupersededError):
                await late.flush()
            with pytest.raises(LeaseSupersededError):
                await late.close()
            await client.jobs.cancel("s", "j")
            assert (await client.jobs.get("s", "j")).state == "cancelled"

    asyncio.run(scenario())


@pytest.mark.parametrize("slow", ["LeasePrompts", "ReleaseLeases"])
def test_leaving_waits_for_what_other_tasks_ask(service: ServiceProcess, slow: str) -> None:
    async def main() -> None:
        asking = asyncio.Event()
        async with AsyncTraceClient(service.target) as client:
            await client.create_stream(make_spec())
            await client.jobs.create("s", "j", [JobPrompt(f"p{number}", b"x") for number in range(4)])

            async def send(call: Any) -> Any:
                if call.method == slow:
                    asking.set()
                    await asyncio.sleep(0.3)
                return await client.send(call)

            async def take_and_release() -> None:
                lease = await worker.take()
                assert lease is not None
                await worker.release([lease])

            worker = AsyncPromptWorker(send, "s", "j", worker="w", max_units=4, patience_seconds=0.0)
            async with worker:
                work = asyncio.create_task(take_and_release())
                await asking.wait()
            assert (await client.jobs.get("s", "j")).leased_units == 0
            await work
            assert await worker.take() is None

    asyncio.run(main())


def test_a_worker_waits_where_the_service_says_that_waiting_helps(service: ServiceProcess) -> None:
    async def run() -> None:
        refusals = [RateLimitedError("too many requests for now"), StorageFullError("no room for now")]
        async with AsyncTraceClient(service.target) as client:
            await client.create_stream(make_spec())
            await client.jobs.create("s", "j", [JobPrompt("p", b"x")])

            async def send(call: Any) -> Any:
                if call.method == "LeasePrompts" and refusals:
                    raise refusals.pop()
                return await client.send(call)

            async with AsyncPromptWorker(
                send, "s", "j", worker="w", max_units=4, patience_seconds=60.0
            ) as worker:
                assert await worker.take() is not None

    asyncio.run(run())


def test_samples_are_given_up_and_an_heir_takes_over(service: ServiceProcess) -> None:
    prompts = [JobPrompt(f"p{number}", b"x") for number in range(4)]

    async def scenario() -> None:
        async with AsyncTraceClient(service.target) as client:
            await client.create_stream(make_spec())
            await client.jobs.create("s", "j", prompts)
            dead = client.prompt_worker("s", "j", worker="dead", max_units=2)
            assert await dead.take() is not None
            async with client.prompt_worker("s", "j", worker="heir", predecessor="dead") as heir:
                lease = await heir.take()
                assert lease is not None
                assert [prompt.prompt_id for prompt in lease.prompts] == ["p0", "p1"]
                assert await heir.take() is None
                await heir.fail(lease, [FailedSamples("p1", (0,), "too long")])
            assert await client.jobs.failures("s", "j") == (FailedSamples("p1", (0,), "too long"),)
            job = await client.jobs.get("s", "j")
            assert (job.failed_units, job.leased_units) == (1, 0)

    asyncio.run(scenario())


def test_a_publisher_waits_for_a_consumer(service: ServiceProcess) -> None:
    async def scenario() -> None:
        async with AsyncTraceClient(service.target) as client:
            await client.create_stream(make_spec())
            await client.consumers.set_max_lag("s", blocks=1)
            await client.consumers.commit("s", "c", await client.consumers.cursor("s", "c"))
            async with client.publisher("s", "p") as publisher:
                for number in range(3):
                    await publisher.publish(block_of([("p", number)], "p"))
                with pytest.raises(DeadlineError, match="consumer 'c' is 1 blocks"):
                    await publisher.flush(timeout_seconds=1.0)
                await client.consumers.commit("s", "c", Cursor(1))
                await client.consumers.delete("s", "c")
                await publisher.flush(timeout_seconds=30)
            assert await client.consumers.list("s") == []

    asyncio.run(scenario())
