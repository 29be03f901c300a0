"""A worker's way to the service: what it leases, and what it publishes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from lynearm.client import Publisher, TraceClient
from lynearm.client.leases import Lease, PromptWorker
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.dictionary import DictionaryKeeper
from lynearm.teacher.leasing import LeaseAhead
from lynearm.teacher.profile_keeper import ProfileKeeper
from lynearm.teacher.publishing import BlockWriter
from lynearm.teacher.selection import TraceSelection
from lynearm.teacher.service_calls import patiently
from lynearm.teacher.shared_streams import open_joined
from lynearm.wire.errors import LynearmError
from lynearm.wire.specs import StreamSpec
from lynearm.wire.work import FailedSamples

logger = logging.getLogger(__name__)


class WorkerConnection:
    """One worker's publisher and leases, from the day that it knows its job to its end.

    Args:
        config: The worker's.
        spec: Of the stream, which is opened.
        job: Name of the job.
        producer_id: Names its blocks; a predecessor of that name is fenced off.
        holder: Names its leases; what was held under that name comes back first.
        selection: Says what of a finished prompt is published; None: everything.

    Raises:
        StreamExistsError: if the stream exists with another spec.
    """

    def __init__(
        self,
        config: TeachConfig,
        spec: StreamSpec,
        job: str,
        *,
        producer_id: str,
        holder: str,
        selection: TraceSelection | None = None,
    ) -> None:
        self._selection = selection
        self._config = config
        self._job = job
        self._producer_id = producer_id
        self._client = TraceClient(config.service)
        self._earlier_blocks = 0
        self._earlier_seconds = (0.0, 0.0)
        self._client.wait_until_ready()
        self._spec = patiently(self._client, lambda: open_joined(self._client, spec, config.route))
        self._lease_units = lease_units(config)
        prompt_worker = self._client.prompt_worker(
            config.stream, job, worker=holder, max_units=self._lease_units
        )
        self.prompt_worker: PromptWorker = prompt_worker.__enter__()
        self._publisher, self.writer = self._open()
        self.profile: ProfileKeeper | None = None
        """Keeps what is measured of layers; None: nothing is."""
        if config.stats:
            self.profile = ProfileKeeper(self._client, config.stream, producer_id, spec.teacher)

    @property
    def acked_blocks(self) -> int:
        """Blocks that are durable."""
        return self._earlier_blocks + self._publisher.acked_blocks

    @property
    def waiting_seconds(self) -> float:
        """How long blocks waited for room, in all."""
        return self._earlier_seconds[0] + self._publisher.waiting_seconds

    @property
    def encode_seconds(self) -> float:
        """Time spent on encoding, in all."""
        return self._earlier_seconds[1] + self.writer.encode_seconds

    @property
    def waiting_reason(self) -> str:
        """Why nothing can be published right now; empty while it can."""
        return self._publisher.waiting_reason

    def lease_ahead(self) -> LeaseAhead:
        """Begin to lease."""
        return LeaseAhead(self.prompt_worker, self._lease_units)

    def is_job_done(self) -> bool:
        """Whether every unit of the job is done, whoever did it; waits for a service that is away."""
        job = patiently(self._client, lambda: self._client.jobs.get(self._config.stream, self._job))
        return job.state == "done"

    def reopen(self) -> None:
        """Begin anew after a refusal: what was not committed is dropped, and every lease given back.

        Raises:
            LynearmError: what the service said.
        """
        self._end_publishing()
        self._earlier_blocks = self.acked_blocks
        self._earlier_seconds = (self.waiting_seconds, self.encode_seconds)
        held = self.prompt_worker.held
        patiently(self._client, lambda: self.prompt_worker.release(held))
        self._publisher, self.writer = self._open()

    def close(self) -> None:
        """Make durable what was handed over, give back the leases, and go."""
        try:
            self.writer.close()
        finally:
            self._end_publishing()
            self.prompt_worker.__exit__(None, None, None)
            self._client.close()

    def _open(self) -> tuple[Publisher, BlockWriter]:
        config, vocab_size = self._config, self._spec.teacher.vocab_size
        publisher = self._client.publisher(config.stream, self._producer_id)
        keeper: DictionaryKeeper | None = None
        if config.dictionary:
            keeper = DictionaryKeeper(self._client, config.stream, self._spec.codec, vocab_size=vocab_size)
        writer = BlockWriter(
            publisher,
            config,
            codec=self._spec.codec,
            dictionaries=keeper,
            vocab_size=vocab_size,
            give_up=self._give_up,
            selection=self._selection,
        )
        return publisher, writer

    def _end_publishing(self) -> None:
        self.writer.abandon()
        # What it could not publish was said before.
        with contextlib.suppress(LynearmError):
            self._publisher.close(timeout_seconds=0.0)

    def _give_up(self, lease: Lease, failed: Sequence[FailedSamples]) -> None:
        patiently(self._client, lambda: self.prompt_worker.fail(lease, failed))


def lease_units(config: TeachConfig) -> int:
    """Units of one lease: about a quarter of a batch, in whole prompts."""
    prompts = max(1, config.max_batch // (4 * config.completions))
    return min(prompts * config.completions, 1 << 14)
