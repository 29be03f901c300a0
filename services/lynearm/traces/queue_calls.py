"""The methods of the prompt queue."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from lynearm.traces.backend import Backend
from lynearm.traces.calls import Context
from lynearm.traces.job_records import MAX_UNITS, GivenUp, JobRecord, NewJob, NewPrompts, WorkRequest
from lynearm.v1 import prompt_queue_pb2 as pb
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.specs import check_name
from lynearm.wire.work import (
    MAX_SAMPLES,
    FailedSamples,
    JobPrompt,
    LeaseKey,
    check_prompt_id,
    check_reason,
    check_sample_indices,
)

MAX_PROMPTS = 1 << 32
"""Of a job."""

MAX_CONTENT_BYTES = 1 << 20
"""Of a prompt."""

MAX_PROMPTS_PER_MESSAGE = 1 << 16
MAX_KEYS_PER_MESSAGE = 10_000
MAX_LOCATED_PROMPTS = 1000
MAX_FAILED_PROMPTS = 1000

_DIGEST_BYTES = 32


class QueueCalls:
    """Answers calls about jobs and leases from a backend.

    Args:
        backend: What the calls work on.
    """

    def __init__(self, backend: Backend) -> None:
        self._catalog = backend.catalog
        self._silence = backend.silence

    async def create_job(self, request: pb.CreateJobRequest, _: Context) -> pb.CreateJobResponse:
        """CreateJob."""
        _check_range("samples_per_prompt", request.samples_per_prompt, MAX_SAMPLES)
        _check_range("prompt_count", request.prompt_count, MAX_PROMPTS)
        if len(request.content_sha256) != _DIGEST_BYTES:
            raise InvalidInputError(
                f"content_sha256 of {len(request.content_sha256)} bytes, expected {_DIGEST_BYTES}"
            )
        job = NewJob(
            request.stream,
            check_name(request.name, what="job"),
            request.samples_per_prompt,
            request.prompt_count,
            request.content_sha256,
        )
        return pb.CreateJobResponse(job=_job_to_proto(await self._catalog.create_job(job)))

    async def add_prompts(self, request: pb.AddPromptsRequest, _: Context) -> pb.AddPromptsResponse:
        """AddPrompts."""
        if len(request.prompts) > MAX_PROMPTS_PER_MESSAGE:
            raise _too_many("prompts", len(request.prompts), MAX_PROMPTS_PER_MESSAGE)
        prompts = await asyncio.to_thread(_read_prompts, request.prompts)
        new = NewPrompts(
            request.stream,
            check_name(request.job, what="job"),
            request.content_sha256,
            request.first_prompt,
            prompts,
        )
        return pb.AddPromptsResponse(stored_prompt_count=await self._catalog.add_prompts(new))

    async def get_job(self, request: pb.GetJobRequest, _: Context) -> pb.GetJobResponse:
        """GetJob."""
        job = await self._catalog.get_job(request.stream, check_name(request.name, what="job"))
        return pb.GetJobResponse(job=_job_to_proto(job))

    async def list_jobs(self, request: pb.ListJobsRequest, _: Context) -> pb.ListJobsResponse:
        """ListJobs."""
        jobs = await self._catalog.list_jobs(request.stream)
        return pb.ListJobsResponse(jobs=[_job_to_proto(job) for job in jobs])

    async def cancel_job(self, request: pb.CancelJobRequest, _: Context) -> pb.CancelJobResponse:
        """CancelJob."""
        job = await self._catalog.cancel_job(request.stream, check_name(request.name, what="job"))
        return pb.CancelJobResponse(job=_job_to_proto(job))

    async def lease_prompts(self, request: pb.LeasePromptsRequest, _: Context) -> pb.LeasePromptsResponse:
        """LeasePrompts."""
        _check_range("max_units", request.max_units, MAX_UNITS)
        wanted = WorkRequest(
            request.stream,
            check_name(request.job, what="job"),
            check_name(request.worker, what="worker"),
            request.max_units,
            request.restarted,
            check_name(request.predecessor, what="worker") if request.predecessor else "",
        )
        grant = await self._catalog.lease_prompts(wanted, self._silence.find_silent)
        while grant.passed_over:
            grant = await self._catalog.lease_prompts(wanted, self._silence.find_silent)
        response = pb.LeasePromptsResponse(job=_job_to_proto(grant.job))
        if grant.key is not None:
            lease = response.lease
            lease.key.lease_id, lease.key.generation = grant.key.lease_id, grant.key.generation
            lease.silence_milliseconds = int(self._silence.silence_seconds * 1000)
            for prompt in grant.prompts:
                lease.prompts.add(
                    prompt_index=prompt.prompt_index,
                    prompt_id=prompt.prompt_id,
                    content=prompt.content,
                    sample_indices=prompt.sample_indices,
                )
        return response

    async def renew_leases(self, request: pb.RenewLeasesRequest, _: Context) -> pb.RenewLeasesResponse:
        """RenewLeases."""
        lost = await self._catalog.renew_leases(request.stream, _read_keys(request.leases))
        keys = [pb.LeaseKey(lease_id=key.lease_id, generation=key.generation) for key in lost]
        return pb.RenewLeasesResponse(lost=keys)

    async def release_leases(self, request: pb.ReleaseLeasesRequest, _: Context) -> pb.ReleaseLeasesResponse:
        """ReleaseLeases."""
        await self._catalog.release_leases(request.stream, _read_keys(request.leases))
        return pb.ReleaseLeasesResponse()

    async def fail_prompts(self, request: pb.FailPromptsRequest, _: Context) -> pb.FailPromptsResponse:
        """FailPrompts."""
        if len(request.failed) > MAX_FAILED_PROMPTS:
            raise _too_many("failed prompts", len(request.failed), MAX_FAILED_PROMPTS)
        await self._catalog.fail_prompts(request.stream, [_read_failed(one) for one in request.failed])
        return pb.FailPromptsResponse()

    async def list_failed_prompts(self, request: pb.ListFailedPromptsRequest, context: Context) -> None:
        """ListFailedPrompts."""
        job, position = check_name(request.job, what="job"), 0
        while page := await self._catalog.list_failures(request.stream, job, position, MAX_FAILED_PROMPTS):
            failed = [
                pb.FailedPrompt(
                    prompt_id=one.samples.prompt_id,
                    sample_indices=one.samples.sample_indices,
                    reason=one.samples.reason,
                )
                for one in page
            ]
            await context.write(pb.ListFailedPromptsResponse(failed=failed))
            position = page[-1].position

    async def locate_prompts(self, request: pb.LocatePromptsRequest, _: Context) -> pb.LocatePromptsResponse:
        """LocatePrompts."""
        if len(request.prompt_ids) > MAX_LOCATED_PROMPTS:
            raise _too_many("prompt ids", len(request.prompt_ids), MAX_LOCATED_PROMPTS)
        prompt_ids = [check_prompt_id(prompt_id) for prompt_id in request.prompt_ids]
        found = await self._catalog.locate_prompts(request.stream, prompt_ids)
        locations = [
            pb.PromptLocation(
                prompt_id=location.prompt_id, offset=location.offset, sample_indices=location.sample_indices
            )
            for location in found
        ]
        return pb.LocatePromptsResponse(locations=locations)


def _job_to_proto(job: JobRecord) -> pb.Job:
    return pb.Job(
        stream=job.stream_name,
        name=job.name,
        samples_per_prompt=job.samples_per_prompt,
        prompt_count=job.prompt_count,
        stored_prompt_count=job.stored_prompt_count,
        content_sha256=job.content_sha256,
        created_unix_nano=job.created_unix_nano,
        done_count=job.done_count,
        leased_count=job.leased_count,
        failed_count=job.failed_count,
        state=_state(job),
    )


def _state(job: JobRecord) -> pb.JobState.ValueType:
    if job.is_cancelled:
        return pb.JOB_STATE_CANCELLED
    if job.is_done:
        return pb.JOB_STATE_DONE
    return pb.JOB_STATE_ADDING if job.stored_prompt_count < job.prompt_count else pb.JOB_STATE_OPEN


def _read_prompts(messages: Iterable[pb.JobPrompt]) -> list[JobPrompt]:
    prompts = [JobPrompt(check_prompt_id(message.prompt_id), message.content) for message in messages]
    for prompt in prompts:
        if len(prompt.content) > MAX_CONTENT_BYTES:
            raise InvalidInputError(
                f"prompt {prompt.prompt_id!r} has {len(prompt.content)} bytes of content, "
                f"expected at most {MAX_CONTENT_BYTES}"
            )
    return prompts


def _read_failed(message: pb.FailedPrompt) -> GivenUp:
    return GivenUp(
        LeaseKey(message.lease.lease_id, message.lease.generation),
        FailedSamples(
            check_prompt_id(message.prompt_id),
            check_sample_indices(message.sample_indices),
            check_reason(message.reason),
        ),
    )


def _read_keys(messages: Sequence[pb.LeaseKey]) -> list[LeaseKey]:
    if len(messages) > MAX_KEYS_PER_MESSAGE:
        raise _too_many("leases", len(messages), MAX_KEYS_PER_MESSAGE)
    return [LeaseKey(message.lease_id, message.generation) for message in messages]


def _check_range(name: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise InvalidInputError(f"{name} is {value}, expected 1 to {largest}")


def _too_many(what: str, count: int, most: int) -> InvalidInputError:
    return InvalidInputError(f"{count} {what} in one request, at most {most} may be", "send several requests")
