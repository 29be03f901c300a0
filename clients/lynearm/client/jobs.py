"""Jobs: prompts that the service keeps and hands out to workers.

`create` streams the prompts in messages of bounded size, so that a job may be larger than memory, and goes on
where an earlier attempt was cut off.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from lynearm.client import job_calls
from lynearm.client.job_calls import JobInfo, NewJob
from lynearm.client.sending import SendCall
from lynearm.wire.work import FailedSamples, JobPrompt


class JobClient:
    """The jobs of one service; `TraceClient.jobs`. Threads may share it.

    Args:
        send: Sends calls.
    """

    def __init__(self, send: SendCall) -> None:
        self._send = send

    def create(
        self, stream: str, name: str, prompts: Iterable[JobPrompt], *, samples_per_prompt: int = 1
    ) -> JobInfo:
        """Create a job, or complete one whose creation was cut off; idempotent.

        Args:
            stream: Takes the traces.
            name: Of the job in its stream.
            prompts: Iterated twice, and the same both times: once for its digest, once to be sent. Only a
                message's worth is held in memory.
            samples_per_prompt: Completions wanted of each prompt.

        Raises:
            StreamNotFoundError: there is no such stream.
            JobExistsError: a job of that name has other prompts, or another number of samples.
            InvalidInputError: there is no prompt, `prompts` is an iterator, or it changed between.
        """
        return self.submit(NewJob.of(stream, name, prompts, samples_per_prompt), prompts)

    def submit(self, new: NewJob, prompts: Iterable[JobPrompt]) -> JobInfo:
        """As `create`, for prompts that were read through before; iterated once, if at all.

        Args:
            new: What `NewJob.of` said of the prompts.
            prompts: The same prompts.

        Raises:
            LynearmError: as for `create`.
        """
        job = self._send(job_calls.create_job(new))
        if job.state != "adding":
            return job
        stored = job.stored_prompt_count
        for call in job_calls.add_prompts(new, stored, islice(prompts, stored, None)):
            self._send(call)
        job = self.get(new.stream, new.name)
        if job.state == "adding":
            raise job_calls.incomplete(job)
        return job

    def get(self, stream: str, name: str) -> JobInfo:
        """A job as it is now.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
        """
        return self._send(job_calls.get_job(stream, name))

    def list(self, stream: str) -> list[JobInfo]:
        """The jobs of a stream, by name.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        return self._send(job_calls.list_jobs(stream))

    def cancel(self, stream: str, name: str) -> JobInfo:
        """End a job: its leases are over, and its workers hear of it. Traces that are published stay.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
        """
        return self._send(job_calls.cancel_job(stream, name))

    def failures(self, stream: str, name: str) -> tuple[FailedSamples, ...]:
        """Samples of a job that were given up and why, in the order in which that happened.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
        """
        return self._send(job_calls.list_failed_prompts(stream, name))
