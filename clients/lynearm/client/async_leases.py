"""`lynearm.client.leases` for asyncio."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Generator, Iterable
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from lynearm.client import job_calls
from lynearm.client.calls import Call
from lynearm.client.job_calls import Grant, JobInfo
from lynearm.client.leases import (
    FAILED_PER_CALL,
    POLL_SECONDS,
    RENEWALS,
    HeldLeases,
    Lease,
    helps_to_wait,
)
from lynearm.client.pulse import Pulse
from lynearm.client.sending import AsyncSendCall
from lynearm.wire.errors import LynearmError
from lynearm.wire.specs import check_name
from lynearm.wire.work import FailedSamples

logger = logging.getLogger(__name__)


class AsyncPromptWorker:
    """Takes work of a job, lease by lease. Made by `AsyncTraceClient.prompt_worker`; use `async with`.

    A task of its own renews the leases, and needs the loop to be free for that.

    Args:
        send: Sends calls.
        stream: Of the job.
        job: Name of the job.
        worker: Name of this worker.
        max_units: Most units of one lease.
        patience_seconds: How long `take` waits for a service that went away, or has no room for now.
        predecessor: A worker that has ended, of which this one takes over what it held, and nothing else.
    """

    def __init__(
        self,
        send: AsyncSendCall,
        stream: str,
        job: str,
        *,
        worker: str,
        max_units: int,
        patience_seconds: float,
        predecessor: str = "",
    ) -> None:
        self.stream = check_name(stream)
        self.job_name = check_name(job, what="job")
        self.worker = check_name(worker, what="worker")
        self.job: JobInfo | None = None
        """The job as `take` saw it last."""
        self._send = send
        self._max_units = max_units
        self._patience_seconds = patience_seconds
        self._predecessor = predecessor
        self._restarted = not predecessor
        self._silence_seconds = math.inf
        self._held = HeldLeases()
        self._calls = 0
        self._changed = Pulse()
        self._closed = False
        self._has_leased = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """The worker itself."""
        self._task = asyncio.create_task(self._renew(), name=f"renew-{self.job_name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back what is not done; not after a cancellation, which must not wait."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if isinstance(error, asyncio.CancelledError):
            return
        # What another task is about to be given has to go back as well, over a client that is open.
        # Whoever ends a call may begin the next one before this task runs again.
        await self._changed.wait_for(lambda: not self._calls)
        try:
            await self.release(self._held.leases)
        except LynearmError as failure:
            logger.warning("job %s: leases come back later: %s", self.job_name, failure)

    async def __aiter__(self) -> AsyncIterator[Lease]:
        """As `PromptWorker.__iter__`."""
        while True:
            lease = await self.take()
            if lease is not None:
                yield lease
            elif self._closed or (self.job is not None and self.job.state == "done"):
                return
            else:
                await _pause()

    @property
    def held(self) -> list[Lease]:
        """As `PromptWorker.held`."""
        return self._held.leases

    async def take(self) -> Lease | None:
        """As `PromptWorker.take`."""
        call = job_calls.lease_prompts(
            self.stream,
            self.job_name,
            worker=self.worker,
            max_units=self._max_units,
            restarted=self._restarted,
            predecessor=self._predecessor,
        )
        with self._under_way():
            return None if self._closed else self._keep(await self._send_patiently(call))

    def _keep(self, grant: Grant) -> Lease | None:
        self._restarted = False
        self.job = grant.job
        if grant.key is None:
            return None
        self._silence_seconds = grant.silence_seconds
        lease = Lease(grant.key, grant.prompts)
        self._held.add(lease)
        self._has_leased.set()
        return lease

    async def release(self, leases: Iterable[Lease]) -> None:
        """As `PromptWorker.release`."""
        with self._under_way():
            keys = self._held.remove(leases)
            if keys:
                await self._send(job_calls.release_leases(self.stream, keys))

    async def fail(self, lease: Lease, samples: Iterable[FailedSamples]) -> None:
        """As `PromptWorker.fail`."""
        failed = list(samples)
        for first in range(0, len(failed), FAILED_PER_CALL):
            part = failed[first : first + FAILED_PER_CALL]
            await self._send(job_calls.fail_prompts(self.stream, lease.key, part))
            lease.give_up(part)

    @contextmanager
    def _under_way(self) -> Generator[None]:
        """What leaving waits for."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._changed.send()

    async def _renew(self) -> None:
        await self._has_leased.wait()
        while True:
            await asyncio.sleep(self._silence_seconds / RENEWALS)
            if not self._held.keys:
                continue
            try:
                lost = await self._send(job_calls.renew_leases(self.stream, self._held.keys))
            except LynearmError as error:
                logger.warning("job %s: leases could not be renewed: %s", self.job_name, error)
            else:
                self._held.lose(self.job_name, lost)

    async def _send_patiently(self, call: Call[Grant]) -> Grant:
        started = time.monotonic()
        while True:
            try:
                return await self._send(call)
            except LynearmError as error:
                spent = time.monotonic() - started >= self._patience_seconds
                if self._closed or spent or not helps_to_wait(error):
                    raise
            await _pause()


async def _pause() -> None:
    await asyncio.sleep(POLL_SECONDS * random.uniform(0.5, 1.0))
