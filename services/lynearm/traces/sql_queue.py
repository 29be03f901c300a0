"""The prompt queue and the consumers in a SQL catalog: what every such catalog has, whatever its database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from sqlalchemy import Connection

from lynearm.traces import (
    consumer_transactions,
    failure_transactions,
    job_transactions,
    lease_transactions,
)
from lynearm.traces.consumer_records import ConsumerRecord, LagState, MaxLag
from lynearm.traces.job_records import (
    FailureRecord,
    FindSilent,
    GivenUp,
    Grant,
    JobRecord,
    NewJob,
    NewPrompts,
    PromptLocation,
    WorkRequest,
)
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.traces import Cursor
from lynearm.wire.work import LeaseKey

T = TypeVar("T")


class SqlQueue:
    """Adds `QueueCatalog` and `ConsumerCatalog` to a catalog that runs transactions."""

    async def _write(self, work: Callable[[Connection], T]) -> T:
        """Run work in a transaction that may write."""
        raise NotImplementedError

    async def _read(self, work: Callable[[Connection], T]) -> T:
        """Run work in a transaction that does not."""
        raise NotImplementedError

    async def create_job(self, job: NewJob) -> JobRecord:
        """See `QueueCatalog.create_job`."""
        return await self._write(lambda connection: job_transactions.create_job(connection, job))

    async def add_prompts(self, new: NewPrompts) -> int:
        """See `QueueCatalog.add_prompts`."""
        outcome = await self._write(lambda connection: job_transactions.add_prompts(connection, new))
        if isinstance(outcome, InvalidInputError):  # what led to it is committed
            raise outcome
        return outcome

    async def get_job(self, stream_name: str, job_name: str) -> JobRecord:
        """See `QueueCatalog.get_job`."""
        return await self._read(
            lambda connection: job_transactions.get_job(connection, stream_name, job_name)
        )

    async def list_jobs(self, stream_name: str) -> list[JobRecord]:
        """See `QueueCatalog.list_jobs`."""
        return await self._read(lambda connection: job_transactions.list_jobs(connection, stream_name))

    async def cancel_job(self, stream_name: str, job_name: str) -> JobRecord:
        """See `QueueCatalog.cancel_job`."""
        return await self._write(
            lambda connection: job_transactions.cancel_job(connection, stream_name, job_name)
        )

    async def lease_prompts(self, request: WorkRequest, find_silent: FindSilent) -> Grant:
        """See `QueueCatalog.lease_prompts`."""
        return await self._write(
            lambda connection: lease_transactions.lease_prompts(connection, request, find_silent)
        )

    async def renew_leases(self, stream_name: str, keys: Sequence[LeaseKey]) -> list[LeaseKey]:
        """See `QueueCatalog.renew_leases`."""
        return await self._write(
            lambda connection: lease_transactions.renew_leases(connection, stream_name, keys)
        )

    async def release_leases(self, stream_name: str, keys: Sequence[LeaseKey]) -> None:
        """See `QueueCatalog.release_leases`."""
        await self._write(lambda connection: lease_transactions.release_leases(connection, stream_name, keys))

    async def fail_prompts(self, stream_name: str, given_up: Sequence[GivenUp]) -> None:
        """See `QueueCatalog.fail_prompts`."""
        await self._write(
            lambda connection: failure_transactions.fail_prompts(connection, stream_name, given_up)
        )

    async def list_failures(
        self, stream_name: str, job_name: str, after: int, count: int
    ) -> list[FailureRecord]:
        """See `QueueCatalog.list_failures`."""
        return await self._read(
            lambda connection: failure_transactions.list_failures(
                connection, stream_name, job_name, after, count
            )
        )

    async def locate_prompts(self, stream_name: str, prompt_ids: Sequence[str]) -> list[PromptLocation]:
        """See `QueueCatalog.locate_prompts`."""
        return await self._read(
            lambda connection: job_transactions.locate_prompts(connection, stream_name, prompt_ids)
        )

    async def set_max_lag(self, stream_name: str, max_lag: MaxLag) -> None:
        """See `ConsumerCatalog.set_max_lag`."""
        await self._write(
            lambda connection: consumer_transactions.set_max_lag(connection, stream_name, max_lag)
        )

    async def read_lag(self, stream_id: int) -> LagState:
        """See `ConsumerCatalog.read_lag`."""
        return await self._read(lambda connection: consumer_transactions.read_lag(connection, stream_id))

    async def commit_cursor(
        self, stream_name: str, consumer: str, cursor: Cursor, *, allow_backwards: bool
    ) -> ConsumerRecord:
        """See `ConsumerCatalog.commit_cursor`."""
        return await self._write(
            lambda connection: consumer_transactions.commit_cursor(
                connection, stream_name, consumer, cursor, allow_backwards=allow_backwards
            )
        )

    async def get_consumer(self, stream_name: str, consumer: str) -> ConsumerRecord:
        """See `ConsumerCatalog.get_consumer`."""
        return await self._read(
            lambda connection: consumer_transactions.get_consumer(connection, stream_name, consumer)
        )

    async def list_consumers(self, stream_name: str) -> list[ConsumerRecord]:
        """See `ConsumerCatalog.list_consumers`."""
        return await self._read(
            lambda connection: consumer_transactions.list_consumers(connection, stream_name)
        )

    async def delete_consumer(self, stream_name: str, consumer: str) -> None:
        """See `ConsumerCatalog.delete_consumer`."""
        await self._write(
            lambda connection: consumer_transactions.delete_consumer(connection, stream_name, consumer)
        )
