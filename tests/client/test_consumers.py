"""Consumers, filters and lookup by the SDK, with real traces."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from models.service_process import ServiceProcess
from traces.harness import make_spec
from wire.building import VOCAB_SIZE, build_trace

from lynearm.client import (
    JobPrompt,
    ReceivedBlock,
    Retention,
    TraceClient,
    TraceId,
    fetch_trace,
    fetch_traces,
)
from lynearm.client.trace_lookup import locate_prompts
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.errors import (
    ConsumerNotFoundError,
    CursorBackwardsError,
    DeadlineError,
    OffsetNotFoundError,
    StreamNotFoundError,
)
from lynearm.wire.labels import TraceFilter, summarise_tags
from lynearm.wire.traces import Cursor, Trace


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path / "data") as process:
        yield process


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[TraceClient]:
    with TraceClient(service.target) as one:
        one.create_stream(make_spec())
        yield one


def traces_of(prompt_id: str, samples: Sequence[int], subject: str = "maths") -> list[Trace]:
    return [
        build_trace(prompt_id=prompt_id, sample_index=index, tags={"subject": subject}) for index in samples
    ]


def encoded(traces: Sequence[Trace]) -> bytes:
    return encode_block(traces, codec="exact", vocab_size=VOCAB_SIZE)


def publish(client: TraceClient, blocks: Sequence[Sequence[Trace]], **labels: str) -> None:
    """Blocks whose tags are said, and that finish their prompts."""
    with client.publisher("s", "p" + "".join(labels.values()), labels=labels) as publisher:
        for traces in blocks:
            publisher.publish(
                encoded(traces),
                sorted({trace.prompt_id for trace in traces}),
                tags=summarise_tags(trace.tags for trace in traces),
            )


def offsets(blocks: Iterator[ReceivedBlock]) -> list[int]:
    return [received.offset for received in blocks]


def test_a_consumer_goes_on_where_it_was(client: TraceClient, service: ServiceProcess) -> None:
    publish(client, [traces_of(f"p{number}", range(3)) for number in range(6)])
    assert client.consumers.cursor("s", "student") == Cursor()
    with pytest.raises(ConsumerNotFoundError):
        client.consumers.get("s", "student")
    stored = client.consumers.commit("s", "student", Cursor(2, 1))
    assert (stored.cursor, stored.lag_blocks, stored.lag_traces) == (Cursor(2, 1), 4, 11)
    service.kill()
    service.start()
    start = client.consumers.cursor("s", "student")
    used: list[str] = []
    with client.subscribe("s", start=start, follow=False) as subscription:
        for received in subscription:
            used += [trace.prompt_id for trace in decode_block(received.block)[received.used_traces :]]
    assert used == ["p2"] * 2 + ["p3"] * 3 + ["p4"] * 3 + ["p5"] * 3
    with pytest.raises(CursorBackwardsError):
        client.consumers.commit("s", "student", Cursor(1))
    assert client.consumers.commit("s", "student", Cursor(1), allow_backwards=True).lag_blocks == 5
    client.consumers.commit("s", "a", Cursor(6))
    assert [(one.name, one.lag_traces) for one in client.consumers.list("s")] == [("a", 0), ("student", 15)]
    client.consumers.delete("s", "a")
    assert [one.name for one in client.consumers.list("s")] == ["student"]


def test_a_cursor_survives_a_service_that_is_killed_before_its_block(
    client: TraceClient, service: ServiceProcess
) -> None:
    with client.subscribe("s", start=Cursor(0), follow=True) as subscription:
        publish(client, [traces_of("p0", range(3)), traces_of("p1", range(3))])
        assert next(subscription).used_traces == 0
    with client.subscribe("s", start=Cursor(1, 2)) as subscription:
        service.kill()
        restart = threading.Timer(0.5, service.start)
        restart.start()
        received = next(subscription)
        assert (received.offset, received.used_traces) == (1, 2)
        restart.join()


def test_filters_pass_over_blocks_and_keep_the_order(client: TraceClient, service: ServiceProcess) -> None:
    subjects = ["law", "maths", "law", "law", "maths"]
    publish(
        client, [traces_of(f"p{n}", range(2), subject) for n, subject in enumerate(subjects)], role="teacher"
    )
    publish(client, [traces_of("q0", range(2)), traces_of("q1", range(2), "law")], role="rollout")
    maths = TraceFilter(tags={"subject": frozenset({"maths"})})
    assert offsets(client.subscribe("s", follow=False, wanted=maths)) == [1, 4, 5]
    rollouts = TraceFilter(producer_labels={"role": frozenset({"rollout"})})
    assert offsets(client.subscribe("s", follow=False, wanted=rollouts)) == [5, 6]
    both = TraceFilter(maths.tags, rollouts.producer_labels)
    with client.subscribe("s", wanted=both) as subscription:
        assert next(subscription).offset == 5
        service.kill()
        service.start()
        client.seal_stream("s")
        assert list(subscription) == []
        assert subscription.next_offset == 7  # over the block that it did not want


def test_traces_are_found_by_prompt_by_name_and_by_position(client: TraceClient) -> None:
    publish(client, [[*traces_of("a", range(3)), *traces_of("b", range(2))], traces_of("c", range(1))])
    found = list(fetch_traces(client, "s", ["c", TraceId("a", 2), TraceId("b", 7), "nobody"]))
    assert [(one.cursor, one.trace.prompt_id, one.trace.sample_index) for one in found] == [
        (Cursor(0, 2), "a", 2),
        (Cursor(1, 0), "c", 0),
    ]
    assert [one.cursor for one in fetch_traces(client, "s", iter(["b", "b"]))] == [Cursor(0, 3), Cursor(0, 4)]
    assert fetch_trace(client, "s", Cursor(0, 4)).prompt_id == "b"
    for cursor in (Cursor(0, 5), Cursor(2, 0)):
        with pytest.raises(OffsetNotFoundError):
            fetch_trace(client, "s", cursor)
    with pytest.raises(StreamNotFoundError):
        list(fetch_traces(client, "nope", ["a"]))


def test_samples_of_a_job_are_found_in_the_blocks_that_brought_them(client: TraceClient) -> None:
    client.jobs.create("s", "j", [JobPrompt("a", b""), JobPrompt("b", b"")], samples_per_prompt=3)
    with client.prompt_worker("s", "j", worker="w") as worker, client.publisher("s", "w") as publisher:
        lease = worker.take()
        assert lease is not None
        for samples in ([("a", 2), ("b", 1)], [("a", 0), ("a", 1)], [("b", 0)]):
            traces = [build_trace(prompt_id=prompt_id, sample_index=index) for prompt_id, index in samples]
            publisher.publish(encoded(traces), finished_work=[lease.finish(samples)])
        publisher.flush()
        found = locate_prompts(client.send, "s", ["a", "b"])
        located = [(one.prompt_id, one.offset, one.sample_indices) for one in found]
        assert located == [("a", 0, (2,)), ("b", 0, (1,)), ("a", 1, (0, 1)), ("b", 2, (0,))]
        assert [one.cursor for one in fetch_traces(client, "s", [TraceId("b", 1), TraceId("a", 1)])] == [
            Cursor(0, 1),
            Cursor(1, 1),
        ]
        assert len(list(fetch_traces(client, "s", ["a", "b"]))) == 5


def test_a_publisher_waits_for_a_consumer_and_says_so(client: TraceClient) -> None:
    assert client.consumers.set_max_lag("s", blocks=2).max_lag_blocks == 2
    client.consumers.commit("s", "slow", Cursor())
    block = encoded(traces_of("p", range(2)))
    with client.publisher("s", "t") as publisher:
        for _ in range(5):
            publisher.publish(block)
        with pytest.raises(DeadlineError, match="consumer 'slow' is 2 blocks and 4 traces behind"):
            publisher.flush(timeout_seconds=1.0)
        assert client.get_stream("s").next_offset == 2
        client.consumers.commit("s", "slow", Cursor(2))
        publisher_is_held_at(client, 4)
        assert client.consumers.set_max_lag("s").max_lag_blocks == 0
        publisher.flush(timeout_seconds=30)
        assert publisher.waiting_reason == ""
    assert client.get_stream("s").next_offset == 5


def publisher_is_held_at(client: TraceClient, offset: int) -> None:
    with client.subscribe("s") as subscription:
        while next(subscription).offset < offset - 1:
            pass
    assert client.get_stream("s").next_offset == offset


def test_a_new_consumer_begins_at_the_first_block_that_is_there(client: TraceClient) -> None:
    publish(client, [traces_of(f"p{number}", [0]) for number in range(3)])
    client.set_retention("s", Retention(max_bytes=1))
    client.collect_garbage()
    assert client.consumers.cursor("s", "new") == Cursor(2)
