"""Ctrl-C as a request, with real signals."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lynearm.client import stop_on_interrupt


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
