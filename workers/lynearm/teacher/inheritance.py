"""What dead workers leave behind: their leases, taken over at once instead of after a long silence."""

from __future__ import annotations

import logging
import threading

from lynearm.client import TraceClient
from lynearm.client.job_calls import JobInfo
from lynearm.client.leases import Lease, PromptWorker
from lynearm.teacher.quarantine import Suspect, SuspectGroup
from lynearm.teacher.service_calls import patiently
from lynearm.wire.errors import LeaseSupersededError
from lynearm.wire.work import MAX_REASON_BYTES, FailedSamples

logger = logging.getLogger(__name__)

_MAX_UNITS = 1 << 14
"""Of one lease: what was handed out as one comes over as one."""


class Inheritance:
    """Takes leases over and keeps them; waits for a service that is away. Threads may share it.

    Args:
        client: Of the service.
        stream: Of the job.
        job: Name of the job.
    """

    def __init__(self, client: TraceClient, stream: str, job: str) -> None:
        self._client = client
        self._stream = stream
        self._job = job
        self._lock = threading.Lock()
        self._heirs: dict[Lease, PromptWorker] = {}
        self._open: list[PromptWorker] = []

    def give_back(self, holder: str) -> None:
        """Let others have at once what a dead worker held.

        Raises:
            LynearmError: what the service said.
        """
        heir, leases = self._take_over(holder)
        heir.__exit__(None, None, None)
        logger.info("job %s: %d leases of %s were given back", self._job, len(leases), holder)

    def keep(self, holder: str) -> list[Lease]:
        """Hold what a dead worker held, so that nobody else gets it.

        Raises:
            LynearmError: what the service said.
        """
        heir, leases = self._take_over(holder)
        with self._lock:
            self._open.append(heir)
            self._heirs.update((lease, heir) for lease in leases)
        return leases

    def finish(self, group: SuspectGroup) -> None:
        """Take note that prompts were answered."""
        for suspect in group.suspects:
            samples = FailedSamples(suspect.prompt.prompt_id, suspect.prompt.sample_indices, "")
            suspect.lease.give_up([samples])

    def fail(self, suspect: Suspect, reason: str) -> JobInfo:
        """Give a prompt up for good; the job after that.

        Raises:
            LynearmError: what the service said.
        """
        text = reason.replace("\0", " ").encode()[:MAX_REASON_BYTES].decode(errors="ignore")
        failed = FailedSamples(suspect.prompt.prompt_id, suspect.prompt.sample_indices, text)
        heir = self._heirs[suspect.lease]
        try:
            patiently(self._client, lambda: heir.fail(suspect.lease, [failed]))
        except LeaseSupersededError as error:
            logger.warning("job %s: %s", self._job, error)
        return patiently(self._client, lambda: self._client.jobs.get(self._stream, self._job))

    def close(self) -> None:
        """Give back what is left."""
        for heir in self._open:
            heir.__exit__(None, None, None)

    def _take_over(self, holder: str) -> tuple[PromptWorker, list[Lease]]:
        heir = self._client.prompt_worker(
            self._stream, self._job, worker=f"{holder}-heir", max_units=_MAX_UNITS, predecessor=holder
        )
        heir.__enter__()
        leases: list[Lease] = []
        while (lease := heir.take()) is not None:
            leases.append(lease)
        return heir, leases
