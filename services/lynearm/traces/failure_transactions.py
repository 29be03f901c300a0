"""The SQL of units that are given up: done without a trace, with the reason beside them.

Rows that are read to be changed are locked, jobs before leases, ascending by id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from sqlalchemy import Connection, insert, select, update

from lynearm.traces.job_records import FailureRecord, GivenUp, job_not_found
from lynearm.traces.packing import pack_indices, unpack_indices
from lynearm.traces.schema import failed_prompts, jobs, leases
from lynearm.traces.statements import MAX_INTEGER, chunks
from lynearm.traces.transactions import get_stream
from lynearm.traces.work_admission import LeaseState, superseded
from lynearm.traces.work_transactions import lock_leases, write_lease
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.work import FailedSamples


def fail_prompts(connection: Connection, stream_name: str, given_up: Sequence[GivenUp]) -> None:
    """See `QueueCatalog.fail_prompts`."""
    stream_id = get_stream(connection, stream_name).stream_id
    lease_ids = {one.lease.lease_id for one in given_up if one.lease.lease_id <= MAX_INTEGER}
    states = lock_leases(connection, lease_ids)
    nobody_holds = _existing(connection, lease_ids - states.keys())
    of_leases: Counter[int] = Counter()
    for one in given_up:
        lease = states.get(one.lease.lease_id)
        if lease is None and one.lease.lease_id not in nobody_holds:
            continue  # every unit of it is done: this call is repeated, or comes too late to matter
        if lease is None or lease.generation != one.lease.generation:
            raise superseded(one.lease, None if lease is None else lease.generation)
        failed = _mark(lease, stream_id, one.samples)
        if not failed:
            continue
        of_leases[lease.lease_id] += len(failed)
        row = {
            "job_id": lease.job_id,
            "prompt_id": one.samples.prompt_id,
            "sample_indices": pack_indices(failed),
            "reason": one.samples.reason,
        }
        connection.execute(insert(failed_prompts).values(row))
    of_jobs: Counter[int] = Counter()
    for lease_id, count in sorted(of_leases.items()):
        of_jobs[states[lease_id].job_id] += count
        write_lease(connection, lease_id, bytes(states[lease_id].done))
    for job_id, count in sorted(of_jobs.items()):
        grown = {"done_count": jobs.c.done_count + count, "failed_count": jobs.c.failed_count + count}
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(grown))


def list_failures(
    connection: Connection, stream_name: str, job_name: str, after: int, count: int
) -> list[FailureRecord]:
    """See `QueueCatalog.list_failures`."""
    stream_id = get_stream(connection, stream_name).stream_id
    job = (jobs.c.stream_id == stream_id) & (jobs.c.name == job_name)
    job_id = connection.scalar(select(jobs.c.id).where(job))
    if job_id is None:
        raise job_not_found(stream_name, job_name)
    query = (
        select(failed_prompts)
        .where(failed_prompts.c.job_id == job_id, failed_prompts.c.position > after)
        .order_by(failed_prompts.c.position)
        .limit(count)
    )
    return [
        FailureRecord(
            row.position, FailedSamples(row.prompt_id, unpack_indices(row.sample_indices), row.reason)
        )
        for row in connection.execute(query)
    ]


def _existing(connection: Connection, lease_ids: Collection[int]) -> set[int]:
    found: set[int] = set()
    for chunk in chunks(lease_ids):
        found.update(connection.scalars(select(leases.c.id).where(leases.c.id.in_(chunk))))
    return found


def _mark(lease: LeaseState, stream_id: int, samples: FailedSamples) -> list[int]:
    """Note units as done; the sample indices of those that were not."""
    if lease.stream_id != stream_id:
        raise InvalidInputError(
            f"lease {lease.lease_id} is of a job of another stream", "name the job's stream"
        )
    marked: list[int] = []
    for sample_index in samples.sample_indices:
        place = lease.place(samples.prompt_id, sample_index)
        if place is None:
            raise InvalidInputError(
                f"lease {lease.lease_id} does not cover sample {sample_index} of prompt "
                f"{samples.prompt_id!r}",
                "give up what was leased",
            )
        if not lease.done[place]:
            lease.done[place] = 1
            marked.append(sample_index)
    return marked
