"""The prompt queue as catalogs know it: jobs, leases, and what is asked of both.

Invariants of every catalog:

- A unit (prompt, sample index) of a job is done when the commit that holds its trace is, and only then; or
  when the stream has it already.
- Of a lease, one generation is valid: the newest. Who publishes under another is refused in the transaction
  that would have committed the block. No clock takes part in that.
- Units that are not done are either not handed out yet, or belong to exactly one lease's row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from lynearm.wire.errors import JobNotFoundError
from lynearm.wire.work import FailedSamples, JobPrompt, LeasedPrompt, LeaseKey

MAX_UNITS = 1 << 14
"""Of one lease. Its row has a byte for each, and is written with every block that finishes some."""

MAX_OPEN_LEASES = 10_000
"""Of one job: each LeasePrompts looks through them."""

LEASE_BYTES = 2 << 20
"""Contents after which a lease is full, so that it fits into a message with its ids."""

LeaseNews: TypeAlias = tuple[int, int]
"""(generation, news) of a lease: changes whenever its holder is heard of."""

FindSilent: TypeAlias = Callable[[int, Mapping[int, LeaseNews]], set[int]]
"""Given a job's id and the news of all leases that somebody holds: those that were silent for too long."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that is announced."""

    stream_name: str
    name: str
    samples_per_prompt: int
    prompt_count: int
    content_sha256: bytes


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job and how far it is."""

    stream_name: str
    name: str
    samples_per_prompt: int
    prompt_count: int
    content_sha256: bytes
    stored_prompt_count: int
    created_unix_nano: int
    done_count: int
    leased_count: int
    """Units that somebody holds and that are not done."""
    is_cancelled: bool
    failed_count: int
    """Units that were given up; done, too."""

    @property
    def is_done(self) -> bool:
        """Whether every unit is done."""
        return self.done_count == self.prompt_count * self.samples_per_prompt


@dataclass(frozen=True, slots=True)
class NewPrompts:
    """Prompts for a job that was announced."""

    stream_name: str
    job_name: str
    content_sha256: bytes
    """With which the job was announced."""
    first_prompt: int
    prompts: Sequence[JobPrompt]


@dataclass(frozen=True, slots=True)
class WorkRequest:
    """Who wants how much of which job."""

    stream_name: str
    job_name: str
    worker: str
    max_units: int
    restarted: bool
    """What the worker held before comes back first."""
    predecessor: str = ""
    """Only what this worker holds is handed out; empty: what nobody holds."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a worker gets."""

    job: JobRecord
    key: LeaseKey | None
    """None: there is nothing to hand out now."""
    prompts: tuple[LeasedPrompt, ...] = ()
    passed_over: bool = False
    """Units were found done by others, and that was noted: it is worth asking again at once."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Units of a lease that get no trace."""

    lease: LeaseKey
    samples: FailedSamples


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """Units that were given up."""

    position: int
    """Ascends with time."""
    samples: FailedSamples


@dataclass(frozen=True, slots=True)
class PromptLocation:
    """A block that holds traces of a prompt."""

    prompt_id: str
    offset: int
    sample_indices: tuple[int, ...]
    """Empty: every sample that the prompt has."""


class QueueCatalog(Protocol):
    """Jobs, their prompts and leases. A part of every `Catalog`."""

    async def create_job(self, job: NewJob) -> JobRecord:
        """Announce a job; success when it is there. One without all its prompts makes place for another.

        Raises:
            StreamNotFoundError: there is no such stream.
            JobExistsError: a complete job of that name has other prompts, or another number of samples.
        """
        ...

    async def add_prompts(self, new: NewPrompts) -> int:
        """Add the next prompts, passing over those that are there. Durable on return.

        Returns:
            How many the job has now.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
            JobIncompleteError: prompts before the first are missing.
            PreconditionError: the job was announced anew, with another digest.
            JobCancelledError: somebody ended the job.
            InvalidInputError: they are more than were announced, or all together have another digest; then
                none of the job's prompts is kept.
        """
        ...

    async def get_job(self, stream_name: str, job_name: str) -> JobRecord:
        """Describe a job.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
        """
        ...

    async def list_jobs(self, stream_name: str) -> list[JobRecord]:
        """The jobs of a stream, ascending by name.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        ...

    async def cancel_job(self, stream_name: str, job_name: str) -> JobRecord:
        """End a job that is not done: its leases are over, its prompts are dropped. Idempotent.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
        """
        ...

    async def lease_prompts(self, request: WorkRequest, find_silent: FindSilent) -> Grant:
        """Hand out units: first those that came back, in order, then new ones.

        Args:
            request: Who wants how much.
            find_silent: Says whose leases may be given to others.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
            JobIncompleteError: prompts of the job are still to be added.
            JobCancelledError: somebody ended the job.
            LeaseLimitError: too many leases are open.
        """
        ...

    async def renew_leases(self, stream_name: str, keys: Sequence[LeaseKey]) -> list[LeaseKey]:
        """Note that the holders of leases were heard of; returns those that are not theirs any more.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        ...

    async def release_leases(self, stream_name: str, keys: Sequence[LeaseKey]) -> None:
        """Take leases back from their holders; passes over those that are not theirs any more.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        ...

    async def fail_prompts(self, stream_name: str, given_up: Sequence[GivenUp]) -> None:
        """Give units up, all or none; passes over those that are done. Durable on return.

        Raises:
            StreamNotFoundError: there is no such stream.
            LeaseSupersededError: a lease is not its holder's any more.
            InvalidInputError: a lease does not cover a unit, or is of another stream.
        """
        ...

    async def list_failures(
        self, stream_name: str, job_name: str, after: int, count: int
    ) -> list[FailureRecord]:
        """Up to `count` failures of a job with positions above `after`, ascending.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
        """
        ...

    async def locate_prompts(self, stream_name: str, prompt_ids: Sequence[str]) -> list[PromptLocation]:
        """Blocks that hold traces of some prompts, ascending by prompt id, then by offset.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        ...


def job_not_found(stream_name: str, job_name: str) -> JobNotFoundError:
    """The error of every catalog for a job that it does not know."""
    return JobNotFoundError(
        f"stream {stream_name!r} has no job {job_name[:140]!r}", "create it, or name another"
    )
