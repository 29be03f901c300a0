"""The SDK against a real server over a socket, restarted and killed where that is the point."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from models.service_process import ServiceProcess, unused_target
from models.trace_blocks import make_block, make_spec

from lynearm.client import Publisher, TraceClient, stop_on_interrupt
from lynearm.wire.errors import (
    DeadlineError,
    InvalidInputError,
    OffsetNotFoundError,
    ProducerFencedError,
    PromptFinishedError,
    ServiceUnavailableError,
    StreamExistsError,
    StreamNotFoundError,
    StreamSealedError,
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path / "data") as process:
        yield process


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[TraceClient]:
    with TraceClient(service.target) as one:
        yield one


def publish(publisher: Publisher, numbers: range) -> None:
    for number in numbers:
        publisher.publish(make_block(number), (f"p{number}",))


def test_blocks_come_back_as_they_were_published(client: TraceClient) -> None:
    client.create_stream(make_spec())
    with client.publisher("s", "teacher") as publisher:
        publish(publisher, range(20))
    assert publisher.acked_blocks == 20
    assert publisher.in_flight_bytes == 0
    info = client.seal_stream("s")
    assert (info.next_offset, info.trace_count, info.completion_token_count) == (20, 20, 100)
    with client.subscribe("s") as subscription:
        received = list(subscription)
    assert [one.offset for one in received] == list(range(20))
    assert [bytes(one.block) for one in received] == [make_block(number) for number in range(20)]
    assert [bytes(one.block) for one in client.fetch("s", 7, 2)] == [make_block(7), make_block(8)]
    assert client.finished_prompts("s") == {f"p{number}" for number in range(20)}


def test_a_closed_client_opens_again(client: TraceClient) -> None:
    client.create_stream(make_spec())
    client.close()
    assert client.get_stream("s").next_offset == 0


def test_a_killed_service_loses_and_repeats_nothing(service: ServiceProcess, client: TraceClient) -> None:
    client.create_stream(make_spec())
    received: list[bytes] = []

    def follow() -> None:
        with TraceClient(service.target) as reader, reader.subscribe("s") as subscription:
            received.extend(bytes(one.block) for one in subscription)

    reader = threading.Thread(target=follow)
    reader.start()
    with client.publisher("s", "teacher", max_in_flight_bytes=20_000) as publisher:
        publish(publisher, range(50))
        service.stop(signal.SIGKILL)
        restart = threading.Timer(1.0, service.start)
        restart.start()
        publish(publisher, range(50, 120))
        restart.join()
        publisher.flush(30)
    client.seal_stream("s")
    reader.join(30)
    assert received == [make_block(number) for number in range(120)]


def test_publish_waits_for_a_service_that_is_not_there_yet(tmp_path: Path, service: ServiceProcess) -> None:
    with TraceClient(service.target) as client:
        client.create_stream(make_spec())
        service.stop()
        with client.publisher("s", "teacher") as publisher:
            publisher.publish(make_block(0))
            with pytest.raises(DeadlineError, match="1 blocks were not acknowledged"):
                publisher.flush(0.5)
            assert "no trace service answers" in publisher.waiting_reason
            service.start()
            publisher.flush(30)
            assert publisher.waiting_reason == ""


def test_publish_waits_when_too_much_is_in_flight(service: ServiceProcess, client: TraceClient) -> None:
    client.create_stream(make_spec())
    service.stop()
    publisher = client.publisher("s", "teacher", max_in_flight_bytes=5000)
    publish(publisher, range(2))
    third = threading.Thread(target=publish, args=(publisher, range(2, 3)))
    third.start()
    third.join(0.5)
    assert third.is_alive()
    service.start()
    third.join(30)
    publisher.close()
    assert publisher.acked_blocks == 3
    assert publisher.waiting_seconds > 0.4


def test_patience_ends_with_the_reason(service: ServiceProcess) -> None:
    with TraceClient(service.target, patience_seconds=0.5) as client:
        client.create_stream(make_spec())
        service.stop()
        publisher = client.publisher("s", "teacher")
        publisher.publish(make_block(0))
        with pytest.raises(ServiceUnavailableError, match="lynearm serve"):
            publisher.flush(30)
        with pytest.raises(ServiceUnavailableError), client.subscribe("s") as subscription:
            next(subscription)


def test_a_new_publisher_fences_the_old_one(client: TraceClient) -> None:
    client.create_stream(make_spec())
    old = client.publisher("s", "teacher")
    publish(old, range(3))
    old.flush(30)
    with client.publisher("s", "teacher") as new:
        publish(new, range(3, 5))
        new.flush(30)
        publish(old, range(9, 10))
        with pytest.raises(ProducerFencedError):
            old.flush(30)
    assert client.get_stream("s").next_offset == 5
    with pytest.raises(ProducerFencedError):
        old.close()


def test_a_finished_prompt_is_not_taken_twice(client: TraceClient) -> None:
    client.create_stream(make_spec())
    with client.publisher("s", "a") as publisher:
        publisher.publish(make_block(0), ("p0",))
    other = client.publisher("s", "b")
    other.publish(make_block(1), ("p0",))
    with pytest.raises(PromptFinishedError, match="p0"):
        other.flush(30)


def test_a_sealed_stream_says_so(client: TraceClient) -> None:
    client.create_stream(make_spec())
    client.seal_stream("s")
    publisher = client.publisher("s", "teacher")
    publisher.publish(make_block(0))
    with pytest.raises(StreamSealedError):
        publisher.flush(30)


def test_what_is_not_there_is_named(client: TraceClient) -> None:
    for call in (client.get_stream, client.seal_stream, client.delete_stream, client.finished_prompts):
        with pytest.raises(StreamNotFoundError, match="'nope'"):
            call("nope")
    with pytest.raises(StreamNotFoundError, match="'nope'"):
        list(client.subscribe("nope"))
    client.create_stream(make_spec())
    with pytest.raises(OffsetNotFoundError):
        list(client.fetch("s", 3))


def test_creating_twice_needs_the_same_spec(client: TraceClient) -> None:
    spec = make_spec()
    client.create_stream(spec)
    assert client.create_stream(spec, allow_existing=True).spec == spec
    with pytest.raises(StreamExistsError):
        client.create_stream(spec)
    with pytest.raises(StreamExistsError):
        client.create_stream(make_spec(license="MIT"), allow_existing=True)
    client.delete_stream("s")
    assert client.list_streams() == []


def test_a_live_subscription_starts_at_the_tail(client: TraceClient) -> None:
    client.create_stream(make_spec())
    with client.publisher("s", "teacher") as publisher:
        publish(publisher, range(5))
        publisher.flush(30)
        with client.subscribe("s", start="live") as subscription:
            publish(publisher, range(5, 6))
            assert next(subscription).offset == 5


def test_without_follow_a_subscription_ends_at_the_end(client: TraceClient) -> None:
    client.create_stream(make_spec())
    with client.publisher("s", "teacher") as publisher:
        publish(publisher, range(3))
    assert [one.offset for one in client.subscribe("s", start=1, follow=False)] == [1, 2]


def test_close_wakes_a_subscription_that_waits(client: TraceClient) -> None:
    client.create_stream(make_spec())
    subscription = client.subscribe("s")
    ended = threading.Event()

    def wait_for_blocks() -> None:
        assert list(subscription) == []
        ended.set()

    reader = threading.Thread(target=wait_for_blocks)
    reader.start()
    time.sleep(0.3)
    assert not ended.is_set()
    subscription.close()
    reader.join(10)
    assert ended.is_set()


@pytest.mark.parametrize("delay_seconds", [0.0, 0.01, 0.5], ids=["early", "connecting", "waiting"])
def test_an_interrupt_ends_a_subscription(client: TraceClient, delay_seconds: float) -> None:
    client.create_stream(make_spec())
    timer = threading.Timer(delay_seconds, os.kill, (os.getpid(), signal.SIGINT))
    with client.subscribe("s") as blocks, stop_on_interrupt(wake=blocks.close) as stop:
        timer.start()
        assert list(blocks) == []
        assert stop.is_set()


def test_small_credit_still_delivers_everything(client: TraceClient) -> None:
    client.create_stream(make_spec())
    with client.publisher("s", "teacher") as publisher:
        publish(publisher, range(30))
    client.seal_stream("s")
    with client.subscribe("s", credit_bytes=1) as subscription:
        assert len(list(subscription)) == 30


def test_no_service_is_said_within_seconds() -> None:
    target = unused_target()
    with TraceClient(target) as client:
        with pytest.raises(ServiceUnavailableError, match=f"no trace service answers at {target}"):
            client.list_streams()
        with pytest.raises(ServiceUnavailableError, match="lynearm serve"):
            client.wait_until_ready(0.3)


@pytest.mark.parametrize("target", ["", "localhost", "localhost:", "localhost:x", ":7411", "localhost:70000"])
def test_a_target_that_is_no_address_is_refused(target: str) -> None:
    with pytest.raises(InvalidInputError, match="not host:port"):
        TraceClient(target)
