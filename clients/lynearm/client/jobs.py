"""Jobs: prompts that the service keeps and hands out to workers.

`create` streams the prompts in messages of bounded size, so that a job may be larger than memory, and goes on
where an earlier attempt was cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias

from lynearm.client.unary_calls import SendCall, UnaryCall
from lynearm.v1 import prompt_queue_pb2 as pb
from lynearm.wire.errors import InvalidInputError, JobIncompleteError
from lynearm.wire.specs import check_name
from lynearm.wire.work import DIGEST_OF_NOTHING, check_prompt_id, extend_digest

JobState: TypeAlias = Literal["adding", "open", "done", "cancelled"]

_MESSAGE_BYTES = 1 << 20
"""Prompts after which a message is full. One of 1 MiB may come on top; gRPC takes 4 MiB."""

_MESSAGE_PROMPTS = 1 << 13

_PROMPT_OVERHEAD_BYTES = 16

_STATES: dict[int, JobState] = {
    int(pb.JOB_STATE_ADDING): "adding",
    int(pb.JOB_STATE_OPEN): "open",
    int(pb.JOB_STATE_DONE): "done",
    int(pb.JOB_STATE_CANCELLED): "cancelled",
}


@dataclass(frozen=True, slots=True)
class JobPrompt:
    """A prompt of a job."""

    prompt_id: str
    """1 to 256 bytes of UTF-8. One that the stream has finished already is not handed out."""
    content: bytes
    """What a worker needs to answer it; opaque to the service, at most 1 MiB."""


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job as it was when the service answered. A unit is one sample of one prompt."""

    stream: str
    name: str
    samples_per_prompt: int
    prompt_count: int
    stored_prompt_count: int
    state: JobState
    done_units: int
    leased_units: int
    """In the hands of workers, and not done."""
    created_unix_nano: int

    @property
    def unit_count(self) -> int:
        """Units of the whole job."""
        return self.prompt_count * self.samples_per_prompt

    @property
    def waiting_units(self) -> int:
        """Units that are neither done nor in the hands of workers."""
        return self.unit_count - self.done_units - self.leased_units


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
        if iter(prompts) is prompts:
            raise InvalidInputError(
                "prompts is an iterator, which can be iterated once only", "pass a list, or a class of yours"
            )
        count, digest = 0, DIGEST_OF_NOTHING
        for prompt in prompts:
            count += 1
            digest = extend_digest(digest, check_prompt_id(prompt.prompt_id), prompt.content)
        announced = pb.CreateJobRequest(
            stream=check_name(stream),
            name=check_name(name, what="job"),
            samples_per_prompt=samples_per_prompt,
            prompt_count=count,
            content_sha256=digest,
        )
        job = self._send(UnaryCall("CreateJob", announced, _read_job))
        if job.state != "adding":
            return job
        stored = job.stored_prompt_count
        for batch in _messages(islice(prompts, stored, None)):
            request = pb.AddPromptsRequest(
                stream=stream, job=name, first_prompt=stored, prompts=batch, content_sha256=digest
            )
            self._send(UnaryCall("AddPrompts", request, _read_stored))
            stored += len(batch)
        job = self.get(stream, name)
        if job.state == "adding":
            raise JobIncompleteError(
                f"job {name!r} has {job.stored_prompt_count} of {job.prompt_count} prompts, and no more came",
                "do the prompts change while they are read? create the job again",
            )
        return job

    def get(self, stream: str, name: str) -> JobInfo:
        """A job as it is now.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
        """
        request = pb.GetJobRequest(stream=check_name(stream), name=check_name(name, what="job"))
        return self._send(UnaryCall("GetJob", request, _read_job))

    def list(self, stream: str) -> list[JobInfo]:
        """The jobs of a stream, by name.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        request = pb.ListJobsRequest(stream=check_name(stream))
        return self._send(UnaryCall("ListJobs", request, _read_jobs))

    def cancel(self, stream: str, name: str) -> JobInfo:
        """End a job: its leases are over, and its workers hear of it. Traces that are published stay.

        Raises:
            StreamNotFoundError, JobNotFoundError: there is no such stream or job.
        """
        request = pb.CancelJobRequest(stream=check_name(stream), name=check_name(name, what="job"))
        return self._send(UnaryCall("CancelJob", request, _read_job))


def job_from_proto(job: pb.Job) -> JobInfo:
    """The job in a message."""
    return JobInfo(
        stream=job.stream,
        name=job.name,
        samples_per_prompt=job.samples_per_prompt,
        prompt_count=job.prompt_count,
        stored_prompt_count=job.stored_prompt_count,
        state=_STATES[job.state],
        done_units=job.done_count,
        leased_units=job.leased_count,
        created_unix_nano=job.created_unix_nano,
    )


def _messages(prompts: Iterable[JobPrompt]) -> Iterator[list[pb.JobPrompt]]:
    batch: list[pb.JobPrompt] = []
    size_bytes = 0
    for prompt in prompts:
        batch.append(pb.JobPrompt(prompt_id=prompt.prompt_id, content=prompt.content))
        size_bytes += len(prompt.prompt_id) + len(prompt.content) + _PROMPT_OVERHEAD_BYTES
        if size_bytes >= _MESSAGE_BYTES or len(batch) == _MESSAGE_PROMPTS:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _read_job(answer: pb.CreateJobResponse | pb.GetJobResponse | pb.CancelJobResponse) -> JobInfo:
    return job_from_proto(answer.job)


def _read_jobs(answer: pb.ListJobsResponse) -> list[JobInfo]:
    return [job_from_proto(job) for job in answer.jobs]


def _read_stored(answer: pb.AddPromptsResponse) -> int:
    return answer.stored_prompt_count
