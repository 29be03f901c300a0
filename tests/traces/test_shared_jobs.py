"""One job, worked on through two servers of one catalog at the same time."""

from __future__ import annotations

import random
import threading
from typing import Any

import grpc
import psycopg
import pytest
from traces.harness import Producer, StartServer, create, error_name, make_block
from traces.jobs import (
    Unit,
    create_job,
    digest_of,
    finish,
    finished,
    get_job,
    lease,
    make_prompts,
    units_of,
)
from traces.storages import on_cluster, wait_until_blocked

from lynearm.v1 import prompt_queue_pb2 as pb
from lynearm.v1 import trace_service_pb2
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub

PROMPTS, SAMPLES = 60, 3


def work(stubs: list[TraceServiceStub], name: str, published: list[Unit], faults: list[str]) -> None:
    """Lease here, publish there, forget or give back now and then, until the job is done."""
    choices = random.Random(name)
    restarted = True
    while True:
        answer = lease(choices.choice(stubs), choices.randint(1, 9), name, restarted=restarted)
        restarted = choices.random() < 0.1
        if not answer.HasField("lease"):
            if answer.job.state == pb.JOB_STATE_DONE:
                return
            restarted = True
            continue
        key, units = answer.lease.key, units_of(answer.lease)
        fate = choices.random()
        if fate < 0.1:
            request = pb.ReleaseLeasesRequest(stream="s", leases=[key])
            choices.choice(stubs).ReleaseLeases(request)
        if fate > 0.9:
            continue
        choices.choice(stubs).RenewLeases(pb.RenewLeasesRequest(stream="s", leases=[key]))
        try:
            producer = Producer(choices.choice(stubs), producer_id=name)
            producer.send(1, make_block(1), finished_work=[finish(key, units)])
            producer.close()
            published += units
        except grpc.RpcError as error:
            faults.append(error_name(error))


@on_cluster
def test_a_job_of_a_stream_that_is_deleted_meanwhile_is_refused(
    storage: dict[str, Any], start_server: StartServer
) -> None:
    stub = start_server().stub
    create(stub)
    prompts = make_prompts(3)
    request = pb.CreateJobRequest(
        stream="s", name="j", samples_per_prompt=1, prompt_count=3, content_sha256=digest_of(prompts)
    )
    with psycopg.connect(storage["catalog"]) as deleting:
        deleting.execute("DELETE FROM streams")
        call = stub.CreateJob.future(request)
        wait_until_blocked(storage["catalog"])
    with pytest.raises(grpc.RpcError) as caught:
        call.result(60)
    assert error_name(caught.value) == "StreamNotFoundError"


@on_cluster
def test_a_lease_that_is_made_while_a_block_that_names_it_waits_fails_no_other_block(
    storage: dict[str, Any], start_server: StartServer
) -> None:
    stub = start_server(group_milliseconds=500).stub
    create(stub)
    for name in ("j", "k"):
        create_job(stub, 2, name=name)
    held = lease(stub, 1, "w").lease
    guessed = pb.LeaseKey(lease_id=held.key.lease_id + 1, generation=1)
    good, bad = Producer(stub, producer_id="good"), Producer(stub, producer_id="bad")
    with psycopg.connect(storage["catalog"]) as holding:
        holding.execute("SELECT id FROM jobs WHERE name = 'j' FOR UPDATE")
        work = [finish(held.key, units_of(held)), finish(guessed, [("p1", 0)])]
        bad.send(1, make_block(1), finished_work=work)
        good.send(1, make_block(2))
        wait_until_blocked(storage["catalog"])
        assert lease(stub, 1, "x", job="k").lease.key == guessed
    assert good.acks(1) == {1: 0}
    assert error_name(bad.error()) == "LeaseSupersededError"


@on_cluster
def test_each_sample_is_published_once_through_two_servers(start_server: StartServer) -> None:
    stubs = [start_server().stub for _ in range(2)]
    create(stubs[0])
    create_job(stubs[0], PROMPTS, samples=SAMPLES)
    published: dict[str, list[Unit]] = {name: [] for name in "abcd"}
    faults: list[str] = []
    crashed: list[BaseException] = []

    def run(*arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            crashed.append(error)

    threads = [
        threading.Thread(target=run, args=(stubs, name, units, faults)) for name, units in published.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert crashed == []
    expected = [(f"p{number}", index) for number in range(PROMPTS) for index in range(SAMPLES)]
    assert sorted(unit for units in published.values() for unit in units) == sorted(expected)
    assert set(faults) <= {"LeaseSupersededError"}
    job = get_job(stubs[1])
    assert (job.state, job.done_count, job.leased_count) == (pb.JOB_STATE_DONE, len(expected), 0)
    assert sorted(finished(stubs[0])) == sorted(f"p{number}" for number in range(PROMPTS))
    stream = stubs[0].GetStream(trace_service_pb2.GetStreamRequest(name="s")).stream
    assert stream.finished_prompt_count == PROMPTS
