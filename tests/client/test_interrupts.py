"""Ctrl-C as a request, with real signals."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from models.service_process import ServiceProcess
from models.trace_blocks import make_block, make_spec

from lynearm.client import TraceClient, stop_on_interrupt


def send_interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_interrupt_only_sets_the_event() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stop:
        assert not stop.is_set()
        send_interrupt()
        assert stop.is_set()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_raises() -> None:
    with stop_on_interrupt():
        send_interrupt()
        with pytest.raises(KeyboardInterrupt):
            send_interrupt()


def test_without_an_interrupt_nothing_is_woken() -> None:
    woken = threading.Event()
    with stop_on_interrupt(wake=woken.set) as stop:
        pass
    assert not stop.is_set()
    assert not woken.is_set()


def test_another_thread_gets_the_event_and_no_handler() -> None:
    handlers: list[bool] = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with stop_on_interrupt():
            handlers.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert handlers == [True]


def interrupt_after(seconds: float) -> None:
    timer = threading.Timer(seconds, send_interrupt)
    timer.daemon = True
    timer.start()


def test_an_interrupt_ends_a_waiting_call_and_breaks_nothing(
    shared_service: ServiceProcess, stream: str
) -> None:
    with TraceClient(shared_service.target) as client:
        client.create_stream(make_spec(stream))
        with client.publisher(stream, "teacher") as publisher, client.subscribe(stream) as blocks:
            for number in range(3):
                interrupt_after(0.1)
                with pytest.raises(KeyboardInterrupt):
                    next(blocks)
                publisher.publish(make_block(number))
                assert next(blocks).offset == number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_ends_what_waits_for_a_frozen_service(
    shared_service: ServiceProcess, stream: str
) -> None:
    with TraceClient(shared_service.target) as client:
        client.create_stream(make_spec(stream))
        with client.publisher(stream, "teacher", max_in_flight_bytes=1) as publisher:
            publisher.publish(make_block(0))
            publisher.flush(30)
            shared_service.freeze()
            try:
                publisher.publish(make_block(1))
                for wait in (
                    lambda: publisher.publish(make_block(9)),
                    publisher.flush,
                    lambda: client.get_stream(stream),
                    lambda: client.finished_prompts(stream),
                    lambda: next(client.fetch(stream, 0)),
                ):
                    interrupt_after(0.1)
                    with pytest.raises(KeyboardInterrupt):
                        wait()
            finally:
                shared_service.thaw()
        # What was interrupted was not published.
        assert client.get_stream(stream).next_offset == 2
