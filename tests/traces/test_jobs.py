"""Jobs over a socket: created in parts, described, cancelled, kept across restarts."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from traces.harness import RunningServer, StartServer, code, create, details, error_name
from traces.jobs import (
    add,
    announce,
    create_job,
    digest_of,
    finish,
    get_job,
    lease,
    make_prompts,
    publish_work,
    units_of,
)

from lynearm.v1 import prompt_queue_pb2 as pb
from lynearm.v1 import trace_service_pb2
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub


def test_a_job_is_created_in_parts_and_goes_on_where_it_was_cut_off(
    start_server: StartServer, server: RunningServer
) -> None:
    create(server.stub)
    prompts = make_prompts(10)
    digest = digest_of(prompts)
    assert announce(server.stub, prompts).state == pb.JOB_STATE_ADDING
    assert add(server.stub, prompts[:4], digest=digest) == 4
    server.stop()
    stub = start_server().stub
    job = announce(stub, prompts)
    assert (job.stored_prompt_count, job.state) == (4, pb.JOB_STATE_ADDING)
    with pytest.raises(grpc.RpcError) as caught:
        lease(stub, 1)
    assert (code(caught.value), error_name(caught.value)) == ("FAILED_PRECONDITION", "JobIncompleteError")
    assert add(stub, prompts[2:7], 2, digest=digest) == 7  # two of them are there
    assert add(stub, prompts[:3], digest=digest) == 7
    assert add(stub, prompts[7:], 7, digest=digest) == 10
    job = announce(stub, prompts)
    assert (job.prompt_count, job.stored_prompt_count, job.state) == (10, 10, pb.JOB_STATE_OPEN)
    leased = lease(stub, 100).lease
    assert [(one.prompt_index, one.prompt_id, one.content) for one in leased.prompts] == [
        (number, f"p{number}", b"line %d" % number) for number in range(10)
    ]


def test_many_prompts_come_back_as_they_were_added(stub: TraceServiceStub) -> None:
    prompts = [
        pb.JobPrompt(prompt_id=f"p{number}", content=number.to_bytes(4) * (number % 700))
        for number in range(5000)
    ]
    digest = digest_of(prompts)
    announce(stub, prompts)
    for start in range(0, 5000, 700):
        add(stub, prompts[start : start + 700], start, digest=digest)
    found: list[pb.LeasedPrompt] = []
    while (answer := lease(stub, 1500)).HasField("lease"):
        found += answer.lease.prompts
    assert [(one.prompt_id, one.content) for one in found] == [(p.prompt_id, p.content) for p in prompts]
    assert [one.prompt_index for one in found] == list(range(5000))


def test_a_lease_of_long_prompts_fits_into_a_message(stub: TraceServiceStub) -> None:
    prompts = [
        pb.JobPrompt(prompt_id=f"p{number}", content=bytes([number]) * (1 << 20)) for number in range(6)
    ]
    digest = digest_of(prompts)
    announce(stub, prompts)
    for number, prompt in enumerate(prompts):
        add(stub, [prompt], number, digest=digest)
    sizes: list[int] = []
    while (answer := lease(stub, 100)).HasField("lease"):
        sizes.append(len(answer.lease.prompts))
    assert sum(sizes) == 6
    assert max(sizes) <= 3


def test_the_same_job_may_be_announced_again_and_another_not(stub: TraceServiceStub) -> None:
    create_job(stub, 3, samples=2)
    assert announce(stub, make_prompts(3), samples=2).state == pb.JOB_STATE_OPEN
    for prompts, samples in ((make_prompts(3), 1), (make_prompts(4), 2), (make_prompts(4)[1:], 2)):
        with pytest.raises(grpc.RpcError) as caught:
            announce(stub, prompts, samples=samples)
        assert (code(caught.value), error_name(caught.value)) == ("ALREADY_EXISTS", "JobExistsError")


def test_a_job_without_all_its_prompts_makes_place_for_another(stub: TraceServiceStub) -> None:
    first, second = make_prompts(5), make_prompts(8)[4:]
    announce(stub, first)
    add(stub, first[:3], digest=digest_of(first))
    assert announce(stub, second).stored_prompt_count == 0
    with pytest.raises(grpc.RpcError, match="announced anew") as caught:
        add(stub, first[3:], digest=digest_of(first), first=3)
    assert code(caught.value) == "FAILED_PRECONDITION"
    assert add(stub, second) == 4
    assert [prompt.prompt_id for prompt in lease(stub, 9).lease.prompts] == ["p4", "p5", "p6", "p7"]


def test_prompts_that_are_not_those_announced_are_dropped(stub: TraceServiceStub) -> None:
    prompts = make_prompts(4)
    announce(stub, prompts)
    changed = [*prompts[:3], pb.JobPrompt(prompt_id="p3", content=b"another")]
    with pytest.raises(grpc.RpcError, match="have digest") as caught:
        add(stub, changed, digest=digest_of(prompts))
    assert code(caught.value) == "INVALID_ARGUMENT"
    assert get_job(stub).stored_prompt_count == 0
    assert add(stub, prompts) == 4


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ({"samples_per_prompt": 65_537}, "samples_per_prompt is 65537"),
        ({"prompt_count": 0}, "prompt_count is 0"),
        ({"prompt_count": 2**40}, "prompt_count"),
        ({"content_sha256": b"x"}, "content_sha256 of 1 bytes"),
        ({"name": "../j"}, "job"),
        ({"name": ""}, "job"),
    ],
)
def test_a_job_that_cannot_be_is_refused(
    stub: TraceServiceStub, fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        announce(stub, make_prompts(2), **fields)
    assert code(caught.value) == "INVALID_ARGUMENT"
    assert problem in details(caught.value)


@pytest.mark.parametrize(
    ("prompts", "first", "name"),
    [
        ([pb.JobPrompt(prompt_id="", content=b"x")], 0, "InvalidInputError"),
        ([pb.JobPrompt(prompt_id="x" * 257)], 0, "InvalidInputError"),
        ([pb.JobPrompt(prompt_id="x", content=bytes((1 << 20) + 1))], 0, "InvalidInputError"),
        (make_prompts(3), 0, "InvalidInputError"),
        (make_prompts(1), 1, "JobIncompleteError"),
    ],
)
def test_prompts_that_cannot_be_are_refused(
    stub: TraceServiceStub, prompts: list[pb.JobPrompt], first: int, name: str
) -> None:
    announce(stub, make_prompts(2))
    with pytest.raises(grpc.RpcError) as caught:
        add(stub, prompts, first, digest=digest_of(make_prompts(2)))
    assert error_name(caught.value) == name
    assert get_job(stub).stored_prompt_count == 0


def test_status_says_what_is_done_leased_and_waiting(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=4)
    answer = lease(stub, 6)
    assert (answer.job.done_count, answer.job.leased_count) == (0, 6)
    lease(stub, 3, "another")
    publish_work(stub, finish(answer.lease.key, units_of(answer.lease)[:5]))
    job = get_job(stub)
    assert (job.done_count, job.leased_count, job.state) == (5, 4, pb.JOB_STATE_OPEN)
    stub.ReleaseLeases(pb.ReleaseLeasesRequest(stream="s", leases=[answer.lease.key]))
    job = get_job(stub)
    assert (job.done_count, job.leased_count) == (5, 3)


def test_a_cancelled_job_takes_nothing_and_keeps_what_is_done(
    start_server: StartServer, server: RunningServer
) -> None:
    create(server.stub)
    create_job(server.stub, 4, samples=2)
    leased = lease(server.stub, 4).lease
    units = units_of(leased)
    publish_work(server.stub, finish(leased.key, units[:3]))
    request = pb.CancelJobRequest(stream="s", name="j")
    job = server.stub.CancelJob(request).job
    assert (job.state, job.done_count, job.leased_count) == (pb.JOB_STATE_CANCELLED, 3, 0)
    server.stop()
    stub = start_server().stub
    assert stub.CancelJob(request).job == job
    with pytest.raises(grpc.RpcError) as caught:
        publish_work(stub, finish(leased.key, units[3:]))
    assert (code(caught.value), error_name(caught.value)) == ("FAILED_PRECONDITION", "LeaseSupersededError")
    with pytest.raises(grpc.RpcError) as caught:
        lease(stub, 1)
    assert (code(caught.value), error_name(caught.value)) == ("FAILED_PRECONDITION", "JobCancelledError")
    assert announce(stub, make_prompts(4), samples=2).state == pb.JOB_STATE_CANCELLED
    create_job(stub, 4, samples=2, name="again")
    rest = lease(stub, 99, job="again").lease
    assert units_of(rest) == [("p1", 1), ("p2", 0), ("p2", 1), ("p3", 0), ("p3", 1)]


def test_a_job_that_is_done_cannot_be_cancelled(stub: TraceServiceStub) -> None:
    create_job(stub, 2)
    leased = lease(stub, 2).lease
    publish_work(stub, finish(leased.key, units_of(leased)))
    assert stub.CancelJob(pb.CancelJobRequest(stream="s", name="j")).job.state == pb.JOB_STATE_DONE


def test_jobs_are_listed_by_name_and_go_with_their_stream(stub: TraceServiceStub) -> None:
    for name in ("b", "a", "a-b"):
        create_job(stub, 2, name=name)
    leased = lease(stub, 1, job="a").lease
    publish_work(stub, finish(leased.key, units_of(leased)))
    jobs = stub.ListJobs(pb.ListJobsRequest(stream="s")).jobs
    assert [(job.name, job.done_count) for job in jobs] == [("a", 1), ("a-b", 0), ("b", 0)]
    stub.DeleteStream(trace_service_pb2.DeleteStreamRequest(name="s"))
    create(stub)
    assert not stub.ListJobs(pb.ListJobsRequest(stream="s")).jobs
    create_job(stub, 2, name="a")
    assert len(units_of(lease(stub, 9, job="a").lease)) == 2


@pytest.mark.parametrize("stream", ["s", "nope"])
def test_what_is_not_there_is_said(stub: TraceServiceStub, stream: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetJob(pb.GetJobRequest(stream=stream, name="nope"))
    expected = "JobNotFoundError" if stream == "s" else "StreamNotFoundError"
    assert (code(caught.value), error_name(caught.value)) == ("NOT_FOUND", expected)
    with pytest.raises(grpc.RpcError) as caught:
        lease(stub, 1, stream=stream, job="nope")
    assert error_name(caught.value) == expected
