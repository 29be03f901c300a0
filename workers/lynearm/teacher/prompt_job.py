"""The job in the service: the prompts that it was made of, and what the service says of it.

Invariants: a job is named by a digest of its prompts unless the user names it, so that the same command
finds it again, and other prompts never meet its rest. Prompts are read through twice, a message's worth at a
time: once for the digest, once to be sent, and that only as far as the service does not have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from lynearm.client import StreamInfo, TraceClient
from lynearm.client.job_calls import JobInfo, NewJob
from lynearm.client.leases import Lease
from lynearm.client.trace_lookup import locate_prompts
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.inheritance import Inheritance
from lynearm.teacher.progress import FailedPrompt
from lynearm.teacher.prompt_content import encode_prompt
from lynearm.teacher.prompt_sources import UsablePrompts
from lynearm.teacher.prompts import BadLine
from lynearm.teacher.quarantine import Suspect, SuspectGroup
from lynearm.teacher.service_calls import patiently
from lynearm.teacher.shared_streams import open_joined
from lynearm.wire.errors import JobNotFoundError, StreamNotFoundError
from lynearm.wire.specs import StreamSpec
from lynearm.wire.work import DIGEST_OF_NOTHING, JobPrompt, extend_digest

MAX_REPORTED_FAILURES = 1000
"""Prompts without a trace that a report names."""

_LOCATED_AT_ONCE = 1000


class JobPrompts:
    """The prompts of a run as the queue takes them; iterated as often as needed.

    Args:
        config: Says where they are.

    Raises:
        ConfigError: if the model is refused, as by `load_checker`.
        PromptFileError: if they cannot be read, there is none or, with `strict`, one is bad.
    """

    def __init__(self, config: TeachConfig) -> None:
        self._prompts = UsablePrompts(config)
        self.count = 0
        self.digest = DIGEST_OF_NOTHING
        for prompt in self:
            self.count += 1
            self.digest = extend_digest(self.digest, prompt.prompt_id, prompt.content)

    @property
    def bad_lines(self) -> tuple[BadLine, ...]:
        """What is no prompt; of many, the first."""
        return self._prompts.bad_lines

    @property
    def bad_line_count(self) -> int:
        """How many rows are no prompts."""
        return self._prompts.bad_line_count

    def __iter__(self) -> Iterator[JobPrompt]:
        """In their order."""
        return map(encode_prompt, self._prompts)


class PromptJob:
    """One job of the service.

    Args:
        client: Of the service.
        config: Of the run.
        prompts: What is to be answered.
    """

    def __init__(self, client: TraceClient, config: TeachConfig, prompts: JobPrompts) -> None:
        self._client = client
        self._config = config
        self._prompts = prompts
        self._stream = config.stream
        self.name = config.job or f"prompts-{prompts.digest.hex()[:16]}-{config.completions}"
        self._inheritance = Inheritance(client, config.stream, self.name)
        self._counts_by_location = False

    @property
    def unit_count(self) -> int:
        """Units of the whole job."""
        return self._prompts.count * self._config.completions

    def find(self) -> JobInfo | None:
        """The job as it is now; None if there is none.

        Raises:
            LynearmError: what the service said.
        """
        try:
            return patiently(self._client, lambda: self._client.jobs.get(self._stream, self.name))
        except (StreamNotFoundError, JobNotFoundError):
            return None

    def count_finished(self, stream: StreamInfo | None, job: JobInfo | None) -> int:
        """Prompts of the job of which the stream has all completions.

        A job knows; of one that is not there yet, the stream may still have prompts by other jobs.
        """
        if stream is None:
            return 0
        self._counts_by_location = self._counts_by_location or (job is None and stream.next_offset > 0)
        if self._counts_by_location:
            return self._located()
        return (job.done_units - job.failed_units) // self._config.completions if job else 0

    def failures(self, job: JobInfo | None) -> tuple[FailedPrompt, ...]:
        """Prompts that get no trace, or fewer than wanted; of each, what was given up last."""
        if job is None or not job.failed_units:
            return ()
        listed = patiently(self._client, lambda: self._client.jobs.failures(self._stream, self.name))
        found: dict[str, FailedPrompt] = {}
        for one in listed:
            earlier = found[one.prompt_id].sample_indices if one.prompt_id in found else ()
            indices = tuple(sorted({*earlier, *one.sample_indices}))
            found[one.prompt_id] = FailedPrompt(one.prompt_id, indices, one.reason)
        return tuple(found.values())

    def prepare(self, spec: StreamSpec) -> JobInfo:
        """Open the stream, and create or find the job.

        Raises:
            StreamExistsError: if the stream exists with another spec.
            JobExistsError: if a job of that name has other prompts.
        """
        new = NewJob(
            self._stream,
            self.name,
            self._config.completions,
            self._prompts.count,
            self._prompts.digest,
        )
        patiently(self._client, lambda: open_joined(self._client, spec, self._config.route))
        return patiently(self._client, lambda: self._client.jobs.submit(new, self._prompts))

    def give_back(self, holder: str) -> None:
        """Let others have at once what a dead worker held."""
        self._inheritance.give_back(holder)

    def keep(self, holder: str) -> list[Lease]:
        """Hold what a dead worker held, so that nobody else gets it."""
        return self._inheritance.keep(holder)

    def finish(self, group: SuspectGroup) -> None:
        """Take note that prompts were answered."""
        self._inheritance.finish(group)

    def fail(self, suspect: Suspect, reason: str) -> JobInfo:
        """Give a prompt up for good; the job after that."""
        return self._inheritance.fail(suspect, reason)

    def close(self) -> None:
        """Give back what is held."""
        self._inheritance.close()

    def _located(self) -> int:
        ids = (prompt.prompt_id for prompt in self._prompts)
        finished = 0
        while chunk := list(islice(ids, _LOCATED_AT_ONCE)):
            finished += self._located_of(chunk)
        return finished

    def _located_of(self, prompt_ids: list[str]) -> int:
        found: dict[str, set[int]] = {}
        every = set(range(self._config.completions))
        locations = patiently(
            self._client, lambda: locate_prompts(self._client.send, self._stream, prompt_ids)
        )
        for location in locations:
            samples = set(location.sample_indices) or every
            found.setdefault(location.prompt_id, set()).update(samples)
        return sum(every <= samples for samples in found.values())
