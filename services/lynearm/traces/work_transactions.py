"""The SQL of finished work: what a commit must know of leases, and what it writes.

Rows that are read to be changed are locked, jobs before leases, ascending by id; a commit has locked its
streams and producers before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, delete, insert, select, update

from lynearm.traces.catalog import NewBlock
from lynearm.traces.packing import BLOCK_PROMPTS, pack_indices, unpack, unpack_indices
from lynearm.traces.schema import (
    failed_prompts,
    finished_prompts,
    finished_samples,
    job_prompts,
    jobs,
    leases,
)
from lynearm.traces.statements import MAX_INTEGER, chunks
from lynearm.traces.work_admission import LeaseState, WorkState


def load_work(connection: Connection, group: Sequence[NewBlock]) -> WorkState:
    """What is known of the leases and prompts that a group names; the leases are locked."""
    named = {work.lease.lease_id for block in group for work in block.finished_work}
    lease_ids = {lease_id for lease_id in named if lease_id <= MAX_INTEGER}
    state = WorkState(leases=lock_leases(connection, lease_ids) if lease_ids else {})
    for stream_id, prompt_ids in _prompts_by_stream(group).items():
        for prompt_id, sample_indices in find_samples(connection, stream_id, prompt_ids).items():
            state.samples[stream_id, prompt_id] = sample_indices
    return state


def store_work(connection: Connection, state: WorkState) -> None:
    """Write what a group's admitted blocks finish."""
    of_jobs: Counter[int] = Counter()
    for lease_id, count in sorted(state.newly_done.items()):
        lease = state.leases[lease_id]
        of_jobs[lease.job_id] += count
        write_lease(connection, lease_id, bytes(lease.done))
    for job_id, count in sorted(of_jobs.items()):
        grown = {"done_count": jobs.c.done_count + count}
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(grown))
    samples: list[dict[str, Any]] = []
    completed: list[dict[str, Any]] = []
    for row in state.rows:
        place = {"stream_id": row.stream_id, "prompt_id": row.prompt_id, "offset": row.offset}
        if not row.is_whole:
            samples.append(place | {"sample_indices": pack_indices(row.sample_indices)})
        if row.completes:
            completed.append(place)
    if samples:
        connection.execute(insert(finished_samples), samples)
    if completed:
        connection.execute(insert(finished_prompts), completed)


def write_lease(connection: Connection, lease_id: int, done: bytes) -> None:
    """Write which units of a lease are done; the row goes with the last one. Counts as news of its holder."""
    row = leases.c.id == lease_id
    open_count = done.count(0)
    if not open_count:
        connection.execute(delete(leases).where(row))
        return
    values = {"done": done, "open_count": open_count, "news": leases.c.news + 1}
    connection.execute(update(leases).where(row).values(values))


def find_samples(connection: Connection, stream_id: int, prompt_ids: Collection[str]) -> dict[str, set[int]]:
    """Samples in a stream, of those of the prompts whose samples are not in one block."""
    found: dict[str, set[int]] = {}
    for chunk in chunks(prompt_ids):
        query = select(finished_samples.c.prompt_id, finished_samples.c.sample_indices).where(
            finished_samples.c.stream_id == stream_id, finished_samples.c.prompt_id.in_(chunk)
        )
        for prompt_id, packed in connection.execute(query):
            found.setdefault(prompt_id, set()).update(unpack_indices(packed))
    return found


def find_finished(connection: Connection, stream_id: int, prompt_ids: Collection[str]) -> set[str]:
    """Those of the prompts that a stream has finished."""
    found: set[str] = set()
    for chunk in chunks(prompt_ids):
        query = select(finished_prompts.c.prompt_id).where(
            finished_prompts.c.stream_id == stream_id, finished_prompts.c.prompt_id.in_(chunk)
        )
        found.update(connection.scalars(query))
    return found


def select_prompts(*columns: ColumnElement[Any], job_id: int, first: int, end: int) -> Any:
    """A query of the blocks that hold a job's prompts from `first` to before `end`, in their order."""
    # Any, here and for the result: SQLAlchemy types a query by its columns.
    overlapping = (
        (job_prompts.c.job_id == job_id)
        & (job_prompts.c.first_prompt > first - BLOCK_PROMPTS)
        & (job_prompts.c.first_prompt < end)
    )
    return (
        select(job_prompts.c.first_prompt, *columns).where(overlapping).order_by(job_prompts.c.first_prompt)
    )


def delete_jobs(connection: Connection, stream_id: int) -> None:
    """Remove all jobs of a stream that is deleted."""
    of_stream = select(jobs.c.id).where(jobs.c.stream_id == stream_id)
    connection.execute(of_stream.order_by(jobs.c.id).with_for_update()).all()
    for table in (leases, job_prompts, failed_prompts):
        connection.execute(delete(table).where(table.c.job_id.in_(of_stream)))
    for table in (jobs, finished_samples):
        connection.execute(delete(table).where(table.c.stream_id == stream_id))


def lock_leases(connection: Connection, lease_ids: Iterable[int]) -> dict[int, LeaseState]:
    """The leases that somebody holds, of those of some ids; locked."""
    found: dict[int, LeaseState] = {}
    wanted = sorted(lease_ids)
    job_ids = {
        job_id
        for chunk in chunks(wanted)
        for job_id in connection.scalars(select(leases.c.job_id).where(leases.c.id.in_(chunk)).distinct())
    }
    of_jobs: dict[int, RowMapping] = {}
    for chunk in chunks(sorted(job_ids)):
        query = select(jobs).where(jobs.c.id.in_(chunk)).order_by(jobs.c.id).with_for_update()
        of_jobs.update((row["id"], row) for row in connection.execute(query).mappings())
    for chunk in chunks(wanted):
        held = leases.c.id.in_(chunk) & (leases.c.holder != "")
        query = select(leases).where(held).order_by(leases.c.id).with_for_update()
        for row in connection.execute(query).mappings().all():
            # One that was made since its job was looked for was named before anybody could know of it.
            if row["job_id"] in of_jobs:
                found[row["id"]] = _lease_state(connection, row, of_jobs[row["job_id"]])
    return found


def _lease_state(connection: Connection, lease: RowMapping, job: RowMapping) -> LeaseState:
    samples = int(job["samples_per_prompt"])
    done = bytearray(lease["done"])
    first, last = lease["first_unit"] // samples, (lease["first_unit"] + len(done) - 1) // samples
    indices: dict[str, int] = {}
    query = select_prompts(job_prompts.c.prompt_ids, job_id=job["id"], first=first, end=last + 1)
    for row in connection.execute(query):
        for index, prompt_id in enumerate(unpack(row.prompt_ids), row.first_prompt):
            if first <= index <= last:
                indices.setdefault(prompt_id.decode(), index)
    return LeaseState(
        lease_id=lease["id"],
        job_id=job["id"],
        stream_id=job["stream_id"],
        samples_per_prompt=samples,
        first_unit=lease["first_unit"],
        done=done,
        generation=lease["generation"],
        prompt_indices=indices,
    )


def _prompts_by_stream(group: Sequence[NewBlock]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for block in group:
        of_stream = found.setdefault(block.producer.stream_id, set())
        of_stream.update(block.finished_prompt_ids)
        of_stream.update(prompt.prompt_id for work in block.finished_work for prompt in work.prompts)
    return found
