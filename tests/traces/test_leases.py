"""Leases over a socket: handed out, renewed, fenced by generation, finished by the blocks of their work."""

from __future__ import annotations

import time

import grpc
import pytest
from traces.harness import Producer, RunningServer, StartServer, code, create, details, error_name, make_block
from traces.jobs import (
    Unit,
    create_job,
    finish,
    finished,
    get_job,
    lease,
    locate,
    make_prompts,
    publish_work,
    units_of,
)

from lynearm.v1 import prompt_queue_pb2 as pb
from lynearm.v1 import trace_service_pb2
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub

ALL_UNITS: list[Unit] = [(f"p{number}", index) for number in range(5) for index in range(3)]
"""Of five prompts, three samples each."""


def renew(stub: TraceServiceStub, *keys: pb.LeaseKey, stream: str = "s") -> list[pb.LeaseKey]:
    """Those that are lost."""
    return list(stub.RenewLeases(pb.RenewLeasesRequest(stream=stream, leases=keys)).lost)


def release(stub: TraceServiceStub, *keys: pb.LeaseKey) -> None:
    stub.ReleaseLeases(pb.ReleaseLeasesRequest(stream="s", leases=keys))


def block_count(stub: TraceServiceStub) -> int:
    return stub.GetStream(trace_service_pb2.GetStreamRequest(name="s")).stream.next_offset


def assert_superseded(stub: TraceServiceStub, work: pb.FinishedWork, producer_id: str = "p") -> None:
    before = block_count(stub)
    with pytest.raises(grpc.RpcError) as caught:
        publish_work(stub, work, producer_id=producer_id)
    assert (code(caught.value), error_name(caught.value)) == ("FAILED_PRECONDITION", "LeaseSupersededError")
    assert block_count(stub) == before


@pytest.mark.parametrize("max_units", [1, 2, 3, 4, 7, 15, 100])
def test_leases_cover_every_unit_once_in_order(stub: TraceServiceStub, max_units: int) -> None:
    create_job(stub, 5, samples=3)
    leased: list[Unit] = []
    while (answer := lease(stub, max_units)).HasField("lease"):
        units = units_of(answer.lease)
        assert len(units) <= max_units
        leased += units
    assert leased == ALL_UNITS
    assert answer.job.leased_count == 15


def test_a_block_finishes_what_it_says_and_a_whole_prompt_is_listed(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=3)
    leased = lease(stub, 7).lease
    publish_work(stub, finish(leased.key, [("p0", 1), ("p1", 0), ("p1", 1), ("p1", 2)]))
    assert (get_job(stub).done_count, finished(stub)) == (4, ["p1"])
    publish_work(stub, finish(leased.key, [("p0", 0)]))
    assert finished(stub) == ["p1"]
    publish_work(stub, finish(leased.key, [("p0", 2), ("p2", 0)]))
    assert (get_job(stub).done_count, finished(stub)) == (7, ["p1", "p0"])
    assert locate(stub, "p2", "p0", "p1", "p3") == [
        ("p0", 0, [1]),
        ("p0", 1, [0]),
        ("p0", 2, [2]),
        ("p1", 0, []),
        ("p2", 2, [0]),
    ]
    stream = stub.GetStream(trace_service_pb2.GetStreamRequest(name="s")).stream
    assert stream.finished_prompt_count == 2


def test_the_last_units_end_the_job(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=3)
    keys = [(answer.key, units_of(answer)) for answer in (lease(stub, n).lease for n in (4, 11))]
    for key, units in reversed(keys):
        publish_work(stub, finish(key, units))
    job = get_job(stub)
    assert (job.state, job.done_count, job.leased_count) == (pb.JOB_STATE_DONE, 15, 0)
    assert not lease(stub, 1).HasField("lease")
    assert sorted(finished(stub)) == [f"p{number}" for number in range(5)]
    assert renew(stub, keys[0][0]) == [keys[0][0]]


def test_one_block_may_finish_units_of_several_leases(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=3)
    one, two = lease(stub, 4).lease, lease(stub, 4).lease
    work = [finish(two.key, units_of(two)), finish(one.key, units_of(one)[2:])]
    assert publish_work(stub, *work) == {1: 0}
    assert get_job(stub).done_count == 6
    assert locate(stub, "p1") == [("p1", 0, [])]


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        ([("p0", 0), ("p3", 0)], "does not cover sample 0 of prompt 'p3'"),
        ([("p1", 3)], "does not cover sample 3"),
        ([("nobody", 0)], "does not cover sample 0 of prompt 'nobody'"),
    ],
)
def test_units_that_the_lease_does_not_cover_are_refused(
    stub: TraceServiceStub, units: list[Unit], problem: str
) -> None:
    create_job(stub, 5, samples=3)
    leased = lease(stub, 6).lease
    with pytest.raises(grpc.RpcError) as caught:
        publish_work(stub, finish(leased.key, units))
    assert code(caught.value) == "INVALID_ARGUMENT"
    assert problem in details(caught.value)
    assert (get_job(stub).done_count, block_count(stub)) == (0, 0)


def test_a_unit_is_done_once_under_the_same_lease(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=3)
    leased = lease(stub, 6).lease
    publish_work(stub, finish(leased.key, [("p0", 0), ("p0", 1)]))
    with pytest.raises(grpc.RpcError) as caught:
        publish_work(stub, finish(leased.key, [("p0", 1), ("p0", 2)]))
    assert (code(caught.value), error_name(caught.value)) == ("FAILED_PRECONDITION", "PromptFinishedError")
    assert "sample 1 of prompt 'p0'" in details(caught.value)
    assert get_job(stub).done_count == 2
    publish_work(stub, finish(leased.key, [("p0", 2)]))


def test_a_block_that_is_sent_again_finishes_its_units_once(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=3)
    leased = lease(stub, 6).lease
    work = [finish(leased.key, units_of(leased))]
    producer = Producer(stub)
    producer.send(1, make_block(1), finished_work=work)
    assert producer.acks(1) == {1: 0}
    again = Producer(stub, epoch=producer.epoch)
    again.send(1, make_block(1), finished_work=work)  # its lease is over, and its answer is the first one's
    assert again.close() == {1: 0}
    assert get_job(stub).done_count == 6
    producer.cancel()


def test_leased_units_and_whole_prompts_exclude_each_other(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=3)
    leased = lease(stub, 9).lease
    producer = Producer(stub)
    producer.send(1, make_block(1), ["p0"])
    producer.close()
    with pytest.raises(grpc.RpcError, match="sample 0 of prompt 'p0' is in the stream already"):
        publish_work(stub, finish(leased.key, [("p0", 0)]))
    publish_work(stub, finish(leased.key, [("p1", 0)]))
    producer = Producer(stub)
    producer.send(1, make_block(2), ["p1"])
    assert error_name(producer.error()) == "PromptFinishedError"
    producer = Producer(stub)
    producer.send(1, make_block(3), ["p2"], finished_work=[finish(leased.key, [("p2", 1)])])
    assert error_name(producer.error()) == "PromptFinishedError"


def test_a_prompt_that_comes_twice_is_answered_once(stub: TraceServiceStub) -> None:
    names = ["a", "b", "a", "c", "b", "a"]
    prompts = [pb.JobPrompt(prompt_id=name, content=b"%d" % n) for n, name in enumerate(names)]
    create_job(stub, prompts, samples=2)
    leased = lease(stub, 7).lease  # both, and half of the second "a"
    assert [(one.prompt_index, one.prompt_id) for one in leased.prompts] == [(0, "a"), (1, "b"), (3, "c")]
    publish_work(stub, finish(leased.key, units_of(leased)))
    while (answer := lease(stub, 2)).HasField("lease"):
        publish_work(stub, finish(answer.lease.key, units_of(answer.lease)))
    assert answer.job.state == pb.JOB_STATE_DONE
    assert finished(stub) == ["a", "b", "c"]


def test_what_the_stream_has_already_is_not_handed_out(stub: TraceServiceStub) -> None:
    create_job(stub, 4, samples=2, name="before")
    leased = lease(stub, 5, job="before").lease
    publish_work(stub, finish(leased.key, [("p0", 0), ("p0", 1), ("p1", 1)]))
    producer = Producer(stub)
    producer.send(1, make_block(1), ["p3"])
    producer.close()
    create_job(stub, 5, samples=2)
    found: list[Unit] = []
    while (answer := lease(stub, 2)).HasField("lease"):
        found += units_of(answer.lease)
    assert found == [("p1", 0), ("p2", 0), ("p2", 1), ("p4", 0), ("p4", 1)]
    assert get_job(stub).done_count == 5


def test_a_long_stretch_that_is_done_is_passed_over(stub: TraceServiceStub) -> None:
    prompts = make_prompts(40_000)
    for start in range(0, 40_000, 20_000):
        producer = Producer(stub, producer_id=f"p{start}")
        producer.send(1, make_block(start), [one.prompt_id for one in prompts[start : start + 20_000]])
        producer.close()
    create_job(stub, [*prompts, pb.JobPrompt(prompt_id="new")], samples=16)
    assert units_of(lease(stub, 3).lease) == [("new", 0), ("new", 1), ("new", 2)]
    assert get_job(stub).done_count == 40_000 * 16


def test_released_units_are_handed_out_again_first(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=3)
    one, two = lease(stub, 4).lease, lease(stub, 4).lease
    publish_work(stub, finish(one.key, [("p0", 0), ("p0", 2)]))
    release(stub, one.key, two.key)
    release(stub, one.key)
    three = lease(stub, 2, "v").lease
    assert units_of(three) == [("p0", 1), ("p1", 0)]
    assert units_of(lease(stub, 3, "v").lease) == ALL_UNITS[4:7]
    assert units_of(lease(stub, 3, "v").lease) == ALL_UNITS[7:8]
    assert units_of(lease(stub, 3, "v").lease) == ALL_UNITS[8:11]
    assert_superseded(stub, finish(one.key, [("p0", 1)]))
    publish_work(stub, finish(three.key, [("p0", 1)]))


def test_a_worker_that_restarts_gets_back_what_it_held(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=3)
    old = lease(stub, 4).lease
    other = lease(stub, 4, "other").lease
    new = lease(stub, 9, restarted=True).lease
    assert units_of(new) == units_of(old)
    assert (new.key.lease_id, new.key.generation) == (old.key.lease_id, old.key.generation + 1)
    assert_superseded(stub, finish(old.key, [("p0", 0)]))
    assert renew(stub, old.key, new.key, other.key) == [old.key]
    publish_work(stub, finish(new.key, [("p0", 0)]))


def test_a_silent_lease_is_taken_over_and_its_holder_is_fenced(start_server: StartServer) -> None:
    stub = start_server(lease_silence_seconds=0.3).stub
    create(stub)
    create_job(stub, 1, samples=4)
    silent = lease(stub, 4)
    assert silent.lease.silence_milliseconds == 300
    publish_work(stub, finish(silent.lease.key, [("p0", 1)]))
    assert not lease(stub, 4, "other").HasField("lease")  # its silence is counted from here on
    time.sleep(0.35)
    taken = lease(stub, 4, "other").lease
    assert units_of(taken) == [("p0", 0), ("p0", 2), ("p0", 3)]
    assert_superseded(stub, finish(silent.lease.key, [("p0", 0)]))
    assert renew(stub, silent.lease.key) == [silent.lease.key]
    publish_work(stub, finish(taken.key, units_of(taken)))
    assert get_job(stub).state == pb.JOB_STATE_DONE


@pytest.mark.parametrize("news", ["renewal", "publish"])
def test_a_holder_that_is_heard_of_keeps_its_lease(start_server: StartServer, news: str) -> None:
    stub = start_server(lease_silence_seconds=0.4).stub
    create(stub)
    create_job(stub, 1, samples=20)
    key = lease(stub, 20).lease.key
    until = time.monotonic() + 1.2
    number = 0
    while time.monotonic() < until:
        if news == "renewal":
            assert not renew(stub, key)
        else:
            publish_work(stub, finish(key, [("p0", number)]), number=number)
            number += 1
        assert not lease(stub, 4, "other").HasField("lease")
        time.sleep(0.1)
    publish_work(stub, finish(key, [("p0", 19)]), number=99)


def test_a_worker_that_was_silent_may_publish_until_somebody_takes_over(start_server: StartServer) -> None:
    """Fencing is by generation: no clock ends a lease."""
    stub = start_server(lease_silence_seconds=0.1).stub
    create(stub)
    create_job(stub, 1, samples=2)
    leased = lease(stub, 2).lease
    lease(stub, 1, "other")
    time.sleep(0.2)
    publish_work(stub, finish(leased.key, [("p0", 0)]))
    assert units_of(lease(stub, 2, restarted=True).lease) == [("p0", 1)]


def test_leases_survive_a_restart_of_the_server(start_server: StartServer, server: RunningServer) -> None:
    create(server.stub)
    create_job(server.stub, 5, samples=3)
    leased = lease(server.stub, 4).lease
    publish_work(server.stub, finish(leased.key, [("p0", 0)]))
    server.stop()
    stub = start_server().stub
    assert not renew(stub, leased.key)
    assert units_of(lease(stub, 4, "other").lease) == ALL_UNITS[4:8]
    publish_work(stub, finish(leased.key, ALL_UNITS[1:4]))
    assert get_job(stub).done_count == 4


def test_a_refused_block_finishes_nothing_and_its_neighbours_do(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=3)
    gone, good = lease(stub, 3).lease, lease(stub, 3).lease
    release(stub, gone.key)
    late, right = Producer(stub, producer_id="late"), Producer(stub, producer_id="right")
    late.send(1, make_block(1), finished_work=[finish(gone.key, units_of(gone))])
    right.send(1, make_block(2), finished_work=[finish(good.key, units_of(good))])
    assert error_name(late.error()) == "LeaseSupersededError"
    assert right.close() == {1: 0}
    assert (get_job(stub).done_count, finished(stub)) == (3, ["p1"])


def test_a_lease_of_another_stream_is_of_no_use(stub: TraceServiceStub) -> None:
    create(stub, "other")
    create_job(stub, 5)
    key = lease(stub, 2).lease.key
    assert renew(stub, key, stream="other") == [key]
    stub.ReleaseLeases(pb.ReleaseLeasesRequest(stream="other", leases=[key]))
    producer = Producer(stub, "other")
    producer.send(1, make_block(1), finished_work=[finish(key, [("p0", 0)])])
    assert "another stream" in details(producer.error())
    publish_work(stub, finish(key, [("p0", 0)]))


def test_a_lease_that_never_was_is_refused(stub: TraceServiceStub) -> None:
    create_job(stub, 5)
    key = lease(stub, 2).lease.key
    for lease_id, generation in ((key.lease_id, 0), (key.lease_id, 2), (99, 1), (2**64 - 1, 2**64 - 1)):
        wrong = pb.LeaseKey(lease_id=lease_id, generation=generation)
        assert renew(stub, wrong) == [wrong]
        assert_superseded(stub, finish(wrong, [("p0", 0)]))


def test_work_that_says_nothing_or_something_twice_is_refused(stub: TraceServiceStub) -> None:
    create_job(stub, 5, samples=3)
    key = lease(stub, 9).lease.key
    twice = pb.FinishedSamples(prompt_id="p0", sample_indices=[1, 1])
    for work in (
        [pb.FinishedWork(lease=key)],
        [pb.FinishedWork(lease=key, prompts=[pb.FinishedSamples(prompt_id="p0")])],
        [pb.FinishedWork(lease=key, prompts=[twice])],
        [finish(key, [("p0", 0)]), finish(key, [("p1", 0)])],
    ):
        with pytest.raises(grpc.RpcError) as caught:
            publish_work(stub, *work)
        assert code(caught.value) == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"units": 0}, "max_units is 0"),
        ({"units": 16_385}, "max_units is 16385"),
        ({"units": 1, "worker": ""}, "worker"),
    ],
)
def test_a_request_for_work_that_cannot_be_is_refused(
    stub: TraceServiceStub, fields: dict[str, int], problem: str
) -> None:
    create_job(stub, 5)
    with pytest.raises(grpc.RpcError) as caught:
        lease(stub, **fields)
    assert code(caught.value) == "INVALID_ARGUMENT"
    assert problem in details(caught.value)


def fail(
    stub: TraceServiceStub, key: pb.LeaseKey, *units: Unit, reason: str = "too long", stream: str = "s"
) -> None:
    failed = [
        pb.FailedPrompt(lease=key, prompt_id=prompt_id, sample_indices=[index], reason=reason)
        for prompt_id, index in units
    ]
    stub.FailPrompts(pb.FailPromptsRequest(stream=stream, failed=failed))


def failures(stub: TraceServiceStub, job: str = "j") -> list[tuple[str, list[int], str]]:
    pages = stub.ListFailedPrompts(pb.ListFailedPromptsRequest(stream="s", job=job))
    return [(one.prompt_id, list(one.sample_indices), one.reason) for page in pages for one in page.failed]


def test_units_that_are_given_up_are_done_without_a_trace(stub: TraceServiceStub) -> None:
    create_job(stub, 3, samples=2)
    leased = lease(stub, 4).lease
    fail(stub, leased.key, ("p0", 1))
    fail(stub, leased.key, ("p0", 1), ("p1", 0), reason="crashed")
    job = get_job(stub)
    assert (job.done_count, job.failed_count, job.leased_count) == (2, 2, 2)
    assert failures(stub) == [("p0", [1], "too long"), ("p1", [0], "crashed")]
    publish_work(stub, finish(leased.key, [("p0", 0), ("p1", 1)]))
    assert finished(stub) == []
    last = lease(stub, 9).lease
    assert units_of(last) == [("p2", 0), ("p2", 1)]
    fail(stub, last.key, ("p2", 0), ("p2", 1))
    fail(stub, last.key, ("p2", 0))
    assert (get_job(stub).state, get_job(stub).failed_count) == (pb.JOB_STATE_DONE, 4)
    assert len(failures(stub)) == 4


def test_what_was_given_up_is_handed_out_again_by_another_job(stub: TraceServiceStub) -> None:
    create_job(stub, 1)
    fail(stub, lease(stub, 1).lease.key, ("p0", 0))
    create_job(stub, 1, name="again")
    assert units_of(lease(stub, 1, job="again").lease) == [("p0", 0)]
    assert failures(stub, "again") == []


def test_only_the_holder_of_a_lease_gives_its_units_up(stub: TraceServiceStub) -> None:
    create_job(stub, 2)
    first = lease(stub, 2).lease
    release(stub, first.key)
    with pytest.raises(grpc.RpcError) as caught:
        fail(stub, first.key, ("p0", 0))
    assert error_name(caught.value) == "LeaseSupersededError"
    second = lease(stub, 2, worker="other").lease
    with pytest.raises(grpc.RpcError) as caught:
        fail(stub, first.key, ("p0", 0))
    assert error_name(caught.value) == "LeaseSupersededError"
    with pytest.raises(grpc.RpcError) as caught:
        fail(stub, second.key, ("p0", 0), ("p7", 0))
    assert code(caught.value) == "INVALID_ARGUMENT"
    assert (get_job(stub).failed_count, failures(stub)) == (0, [])


@pytest.mark.parametrize("reason", ["", "x" * 1001, "a\0b"])
def test_a_reason_that_no_database_keeps_is_refused(stub: TraceServiceStub, reason: str) -> None:
    create_job(stub, 1)
    with pytest.raises(grpc.RpcError) as caught:
        fail(stub, lease(stub, 1).lease.key, ("p0", 0), reason=reason)
    assert code(caught.value) == "INVALID_ARGUMENT"


def test_a_successor_takes_over_every_lease_and_nothing_else(stub: TraceServiceStub) -> None:
    create_job(stub, 10)
    mine = [lease(stub, 2, worker="dead").lease for _ in range(3)]
    others = lease(stub, 2, worker="alive").lease
    taken = [lease(stub, 100, worker="heir", predecessor="dead").lease for _ in range(3)]
    assert [units_of(one) for one in taken] == [units_of(one) for one in mine]
    assert not lease(stub, 100, worker="heir", predecessor="dead").HasField("lease")
    assert renew(stub, *(one.key for one in mine)) == [one.key for one in mine]
    assert renew(stub, others.key, *(one.key for one in taken)) == []
    assert units_of(lease(stub, 100).lease) == [("p8", 0), ("p9", 0)]


def test_while_a_successor_takes_over_nobody_else_gets_the_rest(stub: TraceServiceStub) -> None:
    create_job(stub, 4)
    for _ in range(2):
        lease(stub, 2, worker="dead")
    first = lease(stub, 100, worker="heir", predecessor="dead").lease
    assert not lease(stub, 100, worker="alive").HasField("lease")
    second = lease(stub, 100, worker="heir", predecessor="dead").lease
    assert units_of(first) + units_of(second) == [(f"p{number}", 0) for number in range(4)]
