"""Work of a job in the hands of one worker.

Invariants: the service gives a unit (a sample of a prompt) to one worker at a time, and takes it back only
from one that was silent for long. Whoever lost a lease without noticing is refused at publish, whatever
its clock says: each sample is in the stream once. Leases are renewed by a thread until they are done, given
back or lost.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from lynearm.client import job_calls
from lynearm.client.calls import Call
from lynearm.client.job_calls import Grant, JobInfo
from lynearm.client.sending import SendCall
from lynearm.wire.errors import DeadlineError, InvalidInputError, LynearmError
from lynearm.wire.specs import check_name
from lynearm.wire.work import FailedSamples, FinishedSamples, FinishedWork, LeasedPrompt, LeaseKey

logger = logging.getLogger(__name__)

DEFAULT_UNITS = 64
"""Enough for a batch of a busy engine, and little to do again for whoever takes over."""

POLL_SECONDS = 1.0
"""Between tries while others hold all that is left, or the service is away."""

FAILED_PER_CALL = 1000
"""Prompts that one call may give up."""

RENEWALS = 3
"""Renewals in the time that a holder may be silent: two of them may be lost."""


class Lease:
    """Some units of a job; made by `PromptWorker.take`. Threads may share it.

    Args:
        key: Names it.
        prompts: What it covers.
    """

    def __init__(self, key: LeaseKey, prompts: tuple[LeasedPrompt, ...]) -> None:
        self.key = key
        self.prompts = prompts
        self.is_lost = False
        """The service has given what is left of it to others: what is made for it now is of no use."""
        self._open = {
            (prompt.prompt_id, sample_index) for prompt in prompts for sample_index in prompt.sample_indices
        }

    @property
    def open_count(self) -> int:
        """Units that `finish` was not told of."""
        return len(self._open)

    def give_up(self, samples: Iterable[FailedSamples]) -> None:
        """Take note that samples were given up; `PromptWorker.fail` calls it."""
        self._open -= {(one.prompt_id, index) for one in samples for index in one.sample_indices}

    def finish(self, samples: Iterable[tuple[str, int]]) -> FinishedWork:
        """What `Publisher.publish` takes as `finished_work`, with the block that holds these samples' traces.

        Args:
            samples: (prompt id, sample index) of each trace in the block that is of this lease.

        Raises:
            InvalidInputError: the lease does not cover a sample, or it was finished before.
        """
        by_prompt: dict[str, list[int]] = {}
        named: set[tuple[str, int]] = set()
        for sample in samples:
            if sample not in self._open or sample in named:
                raise InvalidInputError(
                    f"lease {self.key.lease_id} has no open sample {sample[1]} of prompt {sample[0]!r}",
                    "finish each of its samples once",
                )
            named.add(sample)
            by_prompt.setdefault(sample[0], []).append(sample[1])
        if not named:
            raise InvalidInputError("a block finishes no sample of the lease", "leave the lease out")
        self._open -= named
        prompts = (FinishedSamples(prompt_id, tuple(sorted(found))) for prompt_id, found in by_prompt.items())
        return FinishedWork(self.key, tuple(prompts))


class HeldLeases:
    """The leases of one worker that are neither over nor given back; no I/O, no locks."""

    def __init__(self) -> None:
        self._leases: dict[LeaseKey, Lease] = {}

    @property
    def keys(self) -> list[LeaseKey]:
        """Those to be renewed."""
        return list(self._leases)

    @property
    def leases(self) -> list[Lease]:
        """The leases themselves."""
        return list(self._leases.values())

    def add(self, lease: Lease) -> None:
        """Take note of a new one."""
        self._leases[lease.key] = lease

    def remove(self, leases: Iterable[Lease]) -> list[LeaseKey]:
        """Forget some; the keys of those that were held."""
        keys = [lease.key for lease in leases if lease.key in self._leases]
        for key in keys:
            del self._leases[key]
        return keys

    def lose(self, job_name: str, keys: Iterable[LeaseKey]) -> None:
        """Forget those that the service says are over, and mark those of which something was left."""
        for key in keys:
            lease = self._leases.pop(key, None)
            # A lease of which every unit was published is over as well.
            if lease is not None and lease.open_count:
                lease.is_lost = True
                logger.warning("job %s: lease %d was given to others", job_name, key.lease_id)


class PromptWorker:
    """Takes work of a job, lease by lease. Made by `TraceClient.prompt_worker`; use it as a context manager.

    Entering says that the worker has just started: what it held under this name comes back first. Leaving
    gives back what is not done.

    Args:
        send: Sends calls.
        stream: Of the job.
        job: Name of the job.
        worker: Name of this worker: of two that use the same one, each takes the other's leases at its start.
        max_units: Most units of one lease.
        patience_seconds: How long `take` waits for a service that went away, or has no room for now.
        predecessor: A worker that has ended, of which this one takes over what it held, and nothing else.
    """

    def __init__(
        self,
        send: SendCall,
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
        self._changed = threading.Condition()
        # All guarded by _changed.
        self._held = HeldLeases()
        self._calls = 0
        self._closed = False
        self._thread = threading.Thread(target=self._renew, name=f"renew-{job}", daemon=True)

    def __enter__(self) -> Self:
        """The worker itself."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back what is not done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            # What another thread is about to be given has to go back as well, over a client that is open.
            self._changed.wait_for(lambda: not self._calls)
        try:
            self.release(self.held)
        except LynearmError as failure:
            logger.warning("job %s: leases come back later: %s", self.job_name, failure)

    def __iter__(self) -> Iterator[Lease]:
        """Leases until every unit of the job is done; waits while others hold all that is left.

        Raises:
            LynearmError: as for `take`.
        """
        while True:
            lease = self.take()
            if lease is not None:
                yield lease
            elif self._closed or (self.job is not None and self.job.state == "done"):
                return
            else:
                self._pause()

    @property
    def held(self) -> list[Lease]:
        """Leases that are neither over nor given back, as far as is known here."""
        with self._changed:
            return self._held.leases

    def take(self) -> Lease | None:
        """The next work; None when there is none now: `job` then says whether there may be later.

        None as well once the worker was left.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
            JobIncompleteError: prompts of the job are still to be added.
            JobCancelledError: somebody ended the job.
            LeaseLimitError: too many leases of the job are held.
            ServiceUnavailableError: the service stayed away too long.
            RateLimitedError, StorageFullError: it had no room for as long.
        """
        call = job_calls.lease_prompts(
            self.stream,
            self.job_name,
            worker=self.worker,
            max_units=self._max_units,
            restarted=self._restarted,
            predecessor=self._predecessor,
        )
        with self._under_way():
            return None if self._closed else self._keep(self._send_patiently(call))

    def _keep(self, grant: Grant) -> Lease | None:
        self._restarted = False
        self.job = grant.job
        if grant.key is None:
            return None
        lease = Lease(grant.key, grant.prompts)
        with self._changed:
            self._silence_seconds = grant.silence_seconds
            self._held.add(lease)
            self._changed.notify_all()
        return lease

    def release(self, leases: Iterable[Lease]) -> None:
        """Let others have what is not done of some leases.

        Raises:
            LynearmError: the service did not hear of it; they come back once this worker was silent for long.
        """
        with self._under_way():
            with self._changed:
                keys = self._held.remove(leases)
            if keys:
                self._send(job_calls.release_leases(self.stream, keys))

    def fail(self, lease: Lease, samples: Iterable[FailedSamples]) -> None:
        """Give samples of a lease up for good: they get no trace, and the job calls them done. Idempotent.

        Args:
            lease: Covers the samples.
            samples: What to give up, and why; those that are finished already are passed over.

        Raises:
            LeaseSupersededError: the lease was given to others.
            LynearmError: the service did not hear of it; they come back once this worker was silent for long.
        """
        failed = list(samples)
        for first in range(0, len(failed), FAILED_PER_CALL):
            part = failed[first : first + FAILED_PER_CALL]
            self._send(job_calls.fail_prompts(self.stream, lease.key, part))
            lease.give_up(part)

    @contextmanager
    def _under_way(self) -> Generator[None]:
        """What leaving waits for."""
        with self._changed:
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def _renew(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._held.keys)
                self._changed.wait_for(lambda: self._closed, self._silence_seconds / RENEWALS)
                if self._closed:
                    return
                keys = self._held.keys
            try:
                lost = self._send(job_calls.renew_leases(self.stream, keys))
            except LynearmError as error:
                logger.warning("job %s: leases could not be renewed: %s", self.job_name, error)
                continue
            with self._changed:
                self._held.lose(self.job_name, lost)

    def _send_patiently(self, call: Call[Grant]) -> Grant:
        started = time.monotonic()
        while True:
            try:
                return self._send(call)
            except LynearmError as error:
                spent = time.monotonic() - started >= self._patience_seconds
                if self._closed or spent or not helps_to_wait(error):
                    raise
            self._pause()

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, POLL_SECONDS * random.uniform(0.5, 1.0))


def helps_to_wait(error: LynearmError) -> bool:
    """Whether the same call may succeed later: the service is away, silent, or has no room for now."""
    return isinstance(error, DeadlineError) or error.retry_seconds is not None
