"""Whose leases are given to others, and that no time counts in which the service could not hear anybody."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from models.service_process import ServiceProcess
from models.trace_blocks import make_spec

from lynearm.client import JobPrompt, TraceClient, leases
from lynearm.traces import silence
from lynearm.traces.silence import SilenceWatch


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(silence.time, "monotonic", made)
    return made


def listen(watch: SilenceWatch, clock: Clock, seconds: float, steps: int) -> None:
    """Let time pass in steps, with a sign of life of the loop after each."""
    ticks = 0

    async def sleep(_: float) -> None:
        nonlocal ticks
        if ticks == steps:
            raise asyncio.CancelledError
        ticks += 1
        clock.seconds += seconds / steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(silence.asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(watch.run())


def test_a_holder_that_is_not_heard_of_becomes_silent(clock: Clock) -> None:
    watch = SilenceWatch(60)
    assert watch.find_silent(1, {7: (1, 1), 8: (1, 1)}) == set()
    listen(watch, clock, 59, 118)
    assert watch.find_silent(1, {7: (1, 1), 8: (1, 2)}) == set()
    listen(watch, clock, 2, 4)
    assert watch.find_silent(1, {7: (1, 1), 8: (1, 2)}) == {7}


def test_time_in_which_nobody_was_heard_counts_for_nobody(clock: Clock) -> None:
    watch = SilenceWatch(60)
    watch.find_silent(1, {7: (1, 1)})
    listen(watch, clock, 3600, 1)
    assert watch.find_silent(1, {7: (1, 1)}) == set()
    # Not even before the loop has run again.
    clock.seconds += 3600
    assert watch.find_silent(1, {7: (1, 1)}) == set()
    listen(watch, clock, 60, 120)
    assert watch.find_silent(1, {7: (1, 1)}) == {7}


def test_a_service_that_was_frozen_takes_no_lease_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The holder says nothing of itself: a renewal that reached the frozen service's socket would hide what
    # is tested here.
    monkeypatch.setattr(leases, "RENEWALS", 0.01)
    with (
        ServiceProcess(tmp_path / "data", lease_silence_seconds=8) as service,
        TraceClient(service.target) as client,
    ):
        client.open_stream(make_spec("lessons"))
        client.jobs.create("lessons", "job", [JobPrompt(f"p{n}", b"x") for n in range(4)])
        with (
            client.prompt_worker("lessons", "job", worker="one", max_units=4) as one,
            client.prompt_worker("lessons", "job", worker="two", max_units=4) as two,
        ):
            assert one.take() is not None
            assert two.take() is None
            service.freeze()
            time.sleep(9)
            service.thaw()
            assert two.take() is None
