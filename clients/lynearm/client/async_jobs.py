"""`lynearm.client.jobs` for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import islice

from lynearm.client import job_calls
from lynearm.client.job_calls import JobInfo, NewJob
from lynearm.client.sending import AsyncSendCall
from lynearm.wire.work import FailedSamples, JobPrompt


class AsyncJobClient:
    """The jobs of one service; `AsyncTraceClient.jobs`. Every method is that of `JobClient`, awaited.

    Args:
        send: Sends calls.
    """

    def __init__(self, send: AsyncSendCall) -> None:
        self._send = send

    async def create(
        self, stream: str, name: str, prompts: Iterable[JobPrompt], *, samples_per_prompt: int = 1
    ) -> JobInfo:
        """As `JobClient.create`."""
        new = await asyncio.to_thread(NewJob.of, stream, name, prompts, samples_per_prompt)
        return await self.submit(new, prompts)

    async def submit(self, new: NewJob, prompts: Iterable[JobPrompt]) -> JobInfo:
        """As `JobClient.submit`."""
        job = await self._send(job_calls.create_job(new))
        if job.state != "adding":
            return job
        stored = job.stored_prompt_count
        for call in job_calls.add_prompts(new, stored, islice(prompts, stored, None)):
            await self._send(call)
        job = await self.get(new.stream, new.name)
        if job.state == "adding":
            raise job_calls.incomplete(job)
        return job

    async def get(self, stream: str, name: str) -> JobInfo:
        """As `JobClient.get`."""
        return await self._send(job_calls.get_job(stream, name))

    async def list(self, stream: str) -> list[JobInfo]:
        """As `JobClient.list`."""
        return await self._send(job_calls.list_jobs(stream))

    async def cancel(self, stream: str, name: str) -> JobInfo:
        """As `JobClient.cancel`."""
        return await self._send(job_calls.cancel_job(stream, name))

    async def failures(self, stream: str, name: str) -> tuple[FailedSamples, ...]:
        """As `JobClient.failures`."""
        return await self._send(job_calls.list_failed_prompts(stream, name))
