"""Jobs by the SDK: created from more prompts than memory holds, worked on by processes that are killed."""

from __future__ import annotations

import random
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client.job_worker import Unit, WorkerProcess, block_of, read_stream
from models.service_process import ServiceProcess
from traces.harness import make_spec

from lynearm.client import JobPrompt, TraceClient
from lynearm.client.leases import PromptWorker
from lynearm.wire.errors import (
    InvalidInputError,
    JobCancelledError,
    JobExistsError,
    JobIncompleteError,
    JobNotFoundError,
    LeaseSupersededError,
    LynearmError,
    RateLimitedError,
    StorageFullError,
)
from lynearm.wire.work import FailedSamples


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path / "data", lease_silence_seconds=1.0) as process:
        yield process


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[TraceClient]:
    with TraceClient(service.target) as one:
        one.create_stream(make_spec())
        yield one


class Prompts:
    """Prompts that are made as they are asked for."""

    def __init__(self, count: int, *, content_bytes: int = 10, fail_at: int = -1) -> None:
        self._count = count
        self._content_bytes = content_bytes
        self.fail_at = fail_at
        self.passes = 0

    def __iter__(self) -> Iterator[JobPrompt]:
        self.passes += 1
        for number in range(self._count):
            if number == self.fail_at and self.passes > 1:
                raise ConnectionResetError("the disk with the prompts went away")
            yield JobPrompt(f"p{number}", str(number).encode().ljust(self._content_bytes, b"."))


def units_of(prompts: int, samples: int) -> list[Unit]:
    return [(f"p{number}", index) for number in range(prompts) for index in range(samples)]


def assert_each_once(client: TraceClient, units: list[Unit]) -> None:
    published = [unit for _, of_block in read_stream(client) for unit in of_block]
    assert sorted(published) == sorted(units)
    job = client.jobs.get("s", "j")
    assert (job.state, job.done_units, job.waiting_units) == ("done", len(units), 0)
    assert client.finished_prompts("s") == {prompt_id for prompt_id, _ in units}


def test_a_job_is_created_and_worked_on(client: TraceClient) -> None:
    job = client.jobs.create("s", "j", Prompts(10), samples_per_prompt=3)
    assert (job.state, job.unit_count, job.waiting_units, job.stored_prompt_count) == ("open", 30, 30, 10)
    with client.prompt_worker("s", "j", worker="w", max_units=7) as worker, client.publisher("s", "w") as pub:
        for lease in worker:
            units = [(one.prompt_id, index) for one in lease.prompts for index in one.sample_indices]
            assert all(one.content == str(one.prompt_index).encode().ljust(10, b".") for one in lease.prompts)
            assert lease.open_count == len(units) <= 7
            pub.publish(block_of(units, "w"), finished_work=[lease.finish(units)])
            assert lease.open_count == 0
    assert_each_once(client, units_of(10, 3))


def test_a_job_larger_than_what_may_be_held_is_streamed(client: TraceClient) -> None:
    prompts = Prompts(30_000, content_bytes=2000)
    tracemalloc.start()
    try:
        job = client.jobs.create("s", "j", prompts)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (job.state, job.prompt_count, prompts.passes) == ("open", 30_000, 2)
    assert peak_bytes < 12 << 20  # of 60 MB


def test_a_creation_that_was_cut_off_goes_on(client: TraceClient, service: ServiceProcess) -> None:
    prompts = Prompts(20_000, content_bytes=100, fail_at=15_000)
    with pytest.raises(ConnectionResetError):
        client.jobs.create("s", "j", prompts)
    partial = client.jobs.get("s", "j")
    assert partial.state == "adding"
    assert 0 < partial.stored_prompt_count < 15_000
    with client.prompt_worker("s", "j", worker="w") as worker, pytest.raises(JobIncompleteError):
        worker.take()
    service.kill()
    service.start()
    prompts.fail_at = -1
    assert client.jobs.create("s", "j", prompts).stored_prompt_count == 20_000
    assert client.jobs.create("s", "j", prompts).state == "open"


def test_prompts_that_change_between_the_passes_are_refused(client: TraceClient) -> None:
    class Changing(Prompts):
        def __iter__(self) -> Iterator[JobPrompt]:
            yield from super().__iter__()
            yield JobPrompt(f"last-{self.passes}", b"")

    with pytest.raises(InvalidInputError, match="have digest"):
        client.jobs.create("s", "j", Changing(3))
    with pytest.raises(InvalidInputError, match="is an iterator"):
        client.jobs.create("s", "j", iter(Prompts(3)))
    with pytest.raises(InvalidInputError, match="prompt_count is 0"):
        client.jobs.create("s", "j", [])
    assert client.jobs.create("s", "j", Prompts(3)).state == "open"
    with pytest.raises(JobExistsError):
        client.jobs.create("s", "j", Prompts(4))
    with pytest.raises(JobNotFoundError):
        client.jobs.get("s", "k")


def test_cancelling_reaches_the_workers(client: TraceClient) -> None:
    client.jobs.create("s", "j", Prompts(10))
    publisher = client.publisher("s", "w")
    with client.prompt_worker("s", "j", worker="w", max_units=4) as worker:
        lease = worker.take()
        assert lease is not None
        publisher.publish(block_of([("p0", 0)], "w"), finished_work=[lease.finish([("p0", 0)])])
        publisher.flush()
        cancelled = client.jobs.cancel("s", "j")
        assert (cancelled.state, cancelled.done_units) == ("cancelled", 1)
        publisher.publish(block_of([("p1", 0)], "w"), finished_work=[lease.finish([("p1", 0)])])
        with pytest.raises(LeaseSupersededError):
            publisher.flush()
        with pytest.raises(JobCancelledError):
            worker.take()
        until = time.monotonic() + 20
        while not lease.is_lost and time.monotonic() < until:
            time.sleep(0.05)
        assert lease.is_lost
    with pytest.raises(LeaseSupersededError):
        publisher.close()
    assert [job.name for job in client.jobs.list("s")] == ["j"]


def test_leaving_gives_back_what_is_not_done(client: TraceClient) -> None:
    client.jobs.create("s", "j", Prompts(10))
    with client.prompt_worker("s", "j", worker="w", max_units=4) as worker:
        assert worker.take() is not None
        assert worker.take() is not None
        assert client.jobs.get("s", "j").leased_units == 8
    assert client.jobs.get("s", "j").leased_units == 0


@pytest.mark.parametrize("slow", ["LeasePrompts", "ReleaseLeases"])
def test_leaving_waits_for_what_other_threads_ask(client: TraceClient, slow: str) -> None:
    client.jobs.create("s", "j", Prompts(4))
    asking, leaving = threading.Event(), threading.Event()

    def send(call: Any) -> Any:
        if call.method == slow:
            asking.set()
            assert leaving.wait(30)
            time.sleep(0.3)
        return client.send(call)

    worker = PromptWorker(send, "s", "j", worker="w", max_units=4, patience_seconds=0.0)

    def take_and_release() -> None:
        lease = worker.take()
        assert lease is not None
        worker.release([lease])

    with ThreadPoolExecutor() as threads:
        with worker:
            work = threads.submit(take_and_release)
            assert asking.wait(30)
            leaving.set()
        assert client.jobs.get("s", "j").leased_units == 0
        work.result()
    assert worker.take() is None


@pytest.mark.parametrize("error_type", [RateLimitedError, StorageFullError])
def test_a_worker_waits_where_the_service_says_that_waiting_helps(
    client: TraceClient, error_type: type[LynearmError]
) -> None:
    client.jobs.create("s", "j", Prompts(4))
    refusals = [error_type("too much for now")]

    def send(call: Any) -> Any:
        if call.method == "LeasePrompts" and refusals:
            raise refusals.pop()
        return client.send(call)

    with PromptWorker(send, "s", "j", worker="w", max_units=4, patience_seconds=60.0) as worker:
        assert worker.take() is not None
    with PromptWorker(send, "s", "j", worker="w", max_units=4, patience_seconds=0.0) as worker:
        refusals.append(error_type("too much for now"))
        with pytest.raises(error_type):
            worker.take()


def test_leases_are_renewed_while_a_worker_thinks(client: TraceClient) -> None:
    client.jobs.create("s", "j", Prompts(4))
    with (
        client.prompt_worker("s", "j", worker="slow", max_units=4) as slow,
        client.prompt_worker("s", "j", worker="hungry", max_units=4) as hungry,
    ):
        lease = slow.take()
        assert lease is not None
        until = time.monotonic() + 3.0
        while time.monotonic() < until:
            assert hungry.take() is None
            time.sleep(0.1)
        assert not lease.is_lost


@pytest.mark.parametrize("samples", [[("p9", 0)], [("p0", 1)], [("p0", 0), ("p0", 0)], []])
def test_a_lease_finishes_each_of_its_samples_once(client: TraceClient, samples: list[Unit]) -> None:
    client.jobs.create("s", "j", Prompts(10))
    with client.prompt_worker("s", "j", worker="w", max_units=4) as worker:
        lease = worker.take()
        assert lease is not None
        with pytest.raises(InvalidInputError):
            lease.finish(samples)
        assert lease.open_count == 4
        lease.finish([("p3", 0)])
        with pytest.raises(InvalidInputError, match="no open sample 0 of prompt 'p3'"):
            lease.finish([("p3", 0)])


def wait_for_blocks(client: TraceClient, count: int) -> None:
    """Wait until so many are durable; what a worker says that it handed over may not be."""
    while client.get_stream("s").next_offset < count:
        time.sleep(0.01)


def test_a_killed_workers_prompts_go_to_another(client: TraceClient, service: ServiceProcess) -> None:
    client.jobs.create("s", "j", Prompts(20), samples_per_prompt=3)
    victim = WorkerProcess(service.target, "victim", max_units=30, unit_seconds=0.05)
    wait_for_blocks(client, 1)
    victim.kill()
    assert client.jobs.get("s", "j").leased_units > 0
    heir = WorkerProcess(service.target, "heir", unit_seconds=0)
    heir.wait()
    assert_each_once(client, units_of(20, 3))
    workers = {worker for worker, _ in read_stream(client)}
    assert workers == {"victim", "heir"}


def test_a_frozen_worker_is_fenced_when_it_wakes(client: TraceClient, service: ServiceProcess) -> None:
    """It believes in its lease, whatever time has passed; its publish is refused all the same."""
    client.jobs.create("s", "j", Prompts(10), samples_per_prompt=3)
    frozen = WorkerProcess(service.target, "frozen", max_units=30, unit_seconds=0.03)
    frozen.wait_for("published")
    frozen.signal(signal.SIGSTOP)
    heir = WorkerProcess(service.target, "heir", unit_seconds=0.01)
    heir.wait_for("leased")
    frozen.signal(signal.SIGCONT)
    lines = frozen.wait()
    heir.wait()
    assert "refused LeaseSupersededError" in lines
    assert_each_once(client, units_of(10, 3))


def test_a_worker_that_is_killed_again_and_again_goes_on(
    client: TraceClient, service: ServiceProcess
) -> None:
    client.jobs.create("s", "j", Prompts(20), samples_per_prompt=2)
    for _ in range(3):
        worker = WorkerProcess(service.target, "w", unit_seconds=0.02)
        wait_for_blocks(client, client.get_stream("s").next_offset + 1)
        worker.kill()
    worker = WorkerProcess(service.target, "w", unit_seconds=0)
    first = worker.wait_for("leased")
    assert '["p0", 0]' not in first  # what is done is not done again, and the rest comes back at once
    worker.wait()
    assert_each_once(client, units_of(20, 2))


def test_a_service_that_is_killed_under_its_workers_loses_and_repeats_nothing(
    client: TraceClient, service: ServiceProcess
) -> None:
    client.jobs.create("s", "j", Prompts(60), samples_per_prompt=3)
    workers = [
        WorkerProcess(service.target, f"w{number}", max_units=9, unit_seconds=0.02) for number in range(2)
    ]
    instants = random.Random(5)
    for _ in range(4):
        workers[0].wait_for("published")
        time.sleep(instants.uniform(0, 0.1))
        service.kill()
        service.start()
    for worker in workers:
        worker.wait()
    assert_each_once(client, units_of(60, 3))


def test_samples_that_are_given_up_are_listed_with_the_reason(client: TraceClient) -> None:
    client.jobs.create("s", "j", Prompts(3), samples_per_prompt=2)
    with client.prompt_worker("s", "j", worker="w") as worker, client.publisher("s", "w") as publisher:
        lease = worker.take()
        assert lease is not None
        worker.fail(lease, [FailedSamples("p1", (0, 1), "too long"), FailedSamples("p2", (1,), "it crashed")])
        assert lease.open_count == 3
        units = [("p0", 0), ("p0", 1), ("p2", 0)]
        with pytest.raises(InvalidInputError, match="no open sample 0 of prompt 'p1'"):
            lease.finish([("p1", 0)])
        publisher.publish(block_of(units, "w"), finished_work=[lease.finish(units)])
    job = client.jobs.get("s", "j")
    assert (job.state, job.done_units, job.failed_units) == ("done", 6, 3)
    assert client.jobs.failures("s", "j") == (
        FailedSamples("p1", (0, 1), "too long"),
        FailedSamples("p2", (1,), "it crashed"),
    )
    with pytest.raises(InvalidInputError, match="a reason of 1001 bytes"):
        worker.fail(lease, [FailedSamples("p0", (0,), "x" * 1001)])
    with pytest.raises(JobNotFoundError):
        client.jobs.failures("s", "other")


def test_an_heir_takes_over_what_a_dead_worker_held_and_nothing_else(client: TraceClient) -> None:
    client.jobs.create("s", "j", Prompts(20))
    dead = client.prompt_worker("s", "j", worker="dead", max_units=4)
    lost = [dead.take() for _ in range(2)]
    with client.prompt_worker("s", "j", worker="heir", max_units=99, predecessor="dead") as heir:
        taken = [heir.take() for _ in range(3)]
        assert [one and one.prompts for one in taken] == [*(one and one.prompts for one in lost), None]
        assert [lease.prompts for lease in heir.held] == [one.prompts for one in taken if one]
        first = lost[0]
        assert first is not None
        publisher = client.publisher("s", "dead")
        publisher.publish(block_of([("p0", 0)], "dead"), finished_work=[first.finish([("p0", 0)])])
        with pytest.raises(LeaseSupersededError):
            publisher.flush()
    assert client.jobs.get("s", "j").leased_units == 0
