"""The calls about jobs and leases: what each sends, and what its answer means; no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lynearm.client.calls import Call
from lynearm.v1 import prompt_queue_pb2 as pb
from lynearm.wire.errors import InvalidInputError, JobIncompleteError
from lynearm.wire.specs import check_name
from lynearm.wire.work import (
    DIGEST_OF_NOTHING,
    FailedSamples,
    JobPrompt,
    LeasedPrompt,
    LeaseKey,
    check_prompt_id,
    check_reason,
    extend_digest,
)

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
    failed_units: int = 0
    """Given up, without a trace; done, too."""

    @property
    def unit_count(self) -> int:
        """Units of the whole job."""
        return self.prompt_count * self.samples_per_prompt

    @property
    def waiting_units(self) -> int:
        """Units that are neither done nor in the hands of workers."""
        return self.unit_count - self.done_units - self.leased_units


@dataclass(frozen=True, slots=True)
class Grant:
    """What a worker that asks for work gets."""

    job: JobInfo
    key: LeaseKey | None
    """None: there is nothing to hand out now."""
    prompts: tuple[LeasedPrompt, ...]
    silence_seconds: float
    """How long the holder may be silent."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job before its prompts are sent."""

    stream: str
    name: str
    samples_per_prompt: int
    prompt_count: int
    content_sha256: bytes

    @classmethod
    def of(cls, stream: str, name: str, prompts: Iterable[JobPrompt], samples_per_prompt: int) -> NewJob:
        """Read through the prompts once.

        Raises:
            InvalidInputError: `prompts` is an iterator, which is read once only, or an id cannot be one.
        """
        if iter(prompts) is prompts:
            raise InvalidInputError(
                "prompts is an iterator, which can be iterated once only", "pass a list, or a class of yours"
            )
        count, digest = 0, DIGEST_OF_NOTHING
        for prompt in prompts:
            count += 1
            digest = extend_digest(digest, check_prompt_id(prompt.prompt_id), prompt.content)
        return cls(check_name(stream), check_name(name, what="job"), samples_per_prompt, count, digest)


def create_job(job: NewJob) -> Call[JobInfo]:
    """CreateJob."""
    request = pb.CreateJobRequest(
        stream=job.stream,
        name=job.name,
        samples_per_prompt=job.samples_per_prompt,
        prompt_count=job.prompt_count,
        content_sha256=job.content_sha256,
    )
    return Call("CreateJob", request, pb.CreateJobResponse, _read_job)


def add_prompts(job: NewJob, first_prompt: int, prompts: Iterable[JobPrompt]) -> Iterator[Call[int]]:
    """AddPrompts, once for each message's worth; each result is how many the service has then."""
    for batch in _messages(prompts):
        request = pb.AddPromptsRequest(
            stream=job.stream,
            job=job.name,
            first_prompt=first_prompt,
            prompts=batch,
            content_sha256=job.content_sha256,
        )
        yield Call("AddPrompts", request, pb.AddPromptsResponse, _read_stored)
        first_prompt += len(batch)


def get_job(stream: str, name: str) -> Call[JobInfo]:
    """GetJob."""
    request = pb.GetJobRequest(stream=check_name(stream), name=check_name(name, what="job"))
    return Call("GetJob", request, pb.GetJobResponse, _read_job)


def list_jobs(stream: str) -> Call[list[JobInfo]]:
    """ListJobs."""
    request = pb.ListJobsRequest(stream=check_name(stream))
    return Call("ListJobs", request, pb.ListJobsResponse, _read_jobs)


def cancel_job(stream: str, name: str) -> Call[JobInfo]:
    """CancelJob."""
    request = pb.CancelJobRequest(stream=check_name(stream), name=check_name(name, what="job"))
    return Call("CancelJob", request, pb.CancelJobResponse, _read_job)


def lease_prompts(
    stream: str, job: str, *, worker: str, max_units: int, restarted: bool, predecessor: str = ""
) -> Call[Grant]:
    """LeasePrompts. Where its answer is lost, the units come back once their holder was silent for long."""
    request = pb.LeasePromptsRequest(
        stream=stream,
        job=job,
        worker=worker,
        max_units=max_units,
        restarted=restarted,
        predecessor=predecessor,
    )
    return Call("LeasePrompts", request, pb.LeasePromptsResponse, _read_grant)


def renew_leases(stream: str, keys: Sequence[LeaseKey]) -> Call[list[LeaseKey]]:
    """RenewLeases; the result are those that are lost."""
    request = pb.RenewLeasesRequest(stream=stream, leases=map(_key_to_proto, keys))
    return Call("RenewLeases", request, pb.RenewLeasesResponse, _read_lost)


def release_leases(stream: str, keys: Sequence[LeaseKey]) -> Call[None]:
    """ReleaseLeases."""
    request = pb.ReleaseLeasesRequest(stream=stream, leases=map(_key_to_proto, keys))
    return Call("ReleaseLeases", request, pb.ReleaseLeasesResponse, _read_nothing)


def fail_prompts(stream: str, key: LeaseKey, failed: Sequence[FailedSamples]) -> Call[None]:
    """FailPrompts."""
    messages = [
        pb.FailedPrompt(
            lease=_key_to_proto(key),
            prompt_id=one.prompt_id,
            sample_indices=one.sample_indices,
            reason=check_reason(one.reason),
        )
        for one in failed
    ]
    request = pb.FailPromptsRequest(stream=stream, failed=messages)
    return Call("FailPrompts", request, pb.FailPromptsResponse, _read_nothing)


def list_failed_prompts(stream: str, name: str) -> Call[tuple[FailedSamples, ...]]:
    """ListFailedPrompts."""
    request = pb.ListFailedPromptsRequest(stream=check_name(stream), job=check_name(name, what="job"))
    return Call("ListFailedPrompts", request, pb.ListFailedPromptsResponse, _read_failed, streamed=True)


def incomplete(job: JobInfo) -> JobIncompleteError:
    """Why a job has fewer prompts than were announced although all were sent."""
    return JobIncompleteError(
        f"job {job.name!r} has {job.stored_prompt_count} of {job.prompt_count} prompts, and no more came",
        "do the prompts change while they are read? create the job again",
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


def _job(job: pb.Job) -> JobInfo:
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
        failed_units=job.failed_count,
    )


def _read_job(answer: pb.CreateJobResponse | pb.GetJobResponse | pb.CancelJobResponse) -> JobInfo:
    return _job(answer.job)


def _read_jobs(answer: pb.ListJobsResponse) -> list[JobInfo]:
    return [_job(job) for job in answer.jobs]


def _read_stored(answer: pb.AddPromptsResponse) -> int:
    return answer.stored_prompt_count


def _read_grant(answer: pb.LeasePromptsResponse) -> Grant:
    lease = answer.lease
    key = LeaseKey(lease.key.lease_id, lease.key.generation) if answer.HasField("lease") else None
    prompts = tuple(
        LeasedPrompt(prompt.prompt_index, prompt.prompt_id, prompt.content, tuple(prompt.sample_indices))
        for prompt in lease.prompts
    )
    return Grant(_job(answer.job), key, prompts, lease.silence_milliseconds / 1000)


def _read_lost(answer: pb.RenewLeasesResponse) -> list[LeaseKey]:
    return [LeaseKey(key.lease_id, key.generation) for key in answer.lost]


def _read_failed(answers: Sequence[pb.ListFailedPromptsResponse]) -> tuple[FailedSamples, ...]:
    return tuple(
        FailedSamples(one.prompt_id, tuple(one.sample_indices), one.reason)
        for answer in answers
        for one in answer.failed
    )


def _read_nothing(_answer: pb.ReleaseLeasesResponse | pb.FailPromptsResponse) -> None:
    return None


def _key_to_proto(key: LeaseKey) -> pb.LeaseKey:
    return pb.LeaseKey(lease_id=key.lease_id, generation=key.generation)
