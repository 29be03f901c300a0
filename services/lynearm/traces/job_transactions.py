"""The SQL of jobs: announcing them, storing their prompts, describing them.

Rows that are read to be changed are locked, always in the order streams, jobs, leases.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from sqlalchemy import ColumnElement, Connection, RowMapping, delete, func, insert, select, update

from lynearm.traces.job_records import JobRecord, NewJob, NewPrompts, PromptLocation, job_not_found
from lynearm.traces.packing import BLOCK_BYTES, BLOCK_PROMPTS, pack, pack_compressed, unpack_indices
from lynearm.traces.schema import finished_prompts, finished_samples, job_prompts, jobs, leases
from lynearm.traces.statements import chunks
from lynearm.traces.transactions import get_stream, lock_stream
from lynearm.wire.errors import (
    InvalidInputError,
    JobCancelledError,
    JobExistsError,
    JobIncompleteError,
    PreconditionError,
)
from lynearm.wire.work import DIGEST_OF_NOTHING, JobPrompt, extend_digest


def create_job(connection: Connection, job: NewJob) -> JobRecord:
    """See `QueueCatalog.create_job`."""
    stream_id = get_stream(connection, job.stream_name).stream_id
    announced = {
        "samples_per_prompt": job.samples_per_prompt,
        "prompt_count": job.prompt_count,
        "content_sha256": job.content_sha256,
    }
    row = _find_job(connection, stream_id, job.name)
    if row is None:
        # Of two that announce the same job, the second finds it; and the stream may be gone by now.
        stream_id = lock_stream(connection, job.stream_name).stream_id
        row = _find_job(connection, stream_id, job.name)
    if row is None:
        created = {"stream_id": stream_id, "name": job.name, "created_unix_nano": time.time_ns()}
        connection.execute(insert(jobs).values(created | announced | _NOTHING_STORED))
    elif any(row[column] != value for column, value in announced.items()):
        if row["cancelled"] or row["stored_prompt_count"] == row["prompt_count"]:
            raise JobExistsError(
                f"job {job.name!r} of stream {job.stream_name!r} exists with other prompts or samples",
                "choose another name",
            )
        # Nothing of it was handed out: whoever announced it changed their mind before it was complete.
        _forget_prompts(connection, row["id"])
        connection.execute(update(jobs).where(jobs.c.id == row["id"]).values(announced))
    return get_job(connection, job.stream_name, job.name)


_NOTHING_STORED = {
    "stored_prompt_count": 0,
    "stored_sha256": DIGEST_OF_NOTHING,
    "next_unit": 0,
    "done_count": 0,
    "cancelled": False,
    "failed_count": 0,
}


def add_prompts(connection: Connection, added: NewPrompts) -> int | InvalidInputError:
    """See `QueueCatalog.add_prompts`; an error that is returned comes with changes to be committed."""
    job = lock_job(connection, added.stream_name, added.job_name)
    check_not_cancelled(job)
    if job["content_sha256"] != added.content_sha256:
        raise PreconditionError(
            f"job {added.job_name!r} was announced anew, with other prompts",
            "does another process create a job of this name? choose another name",
        )
    stored, wanted = int(job["stored_prompt_count"]), int(job["prompt_count"])
    if added.first_prompt > stored:
        raise JobIncompleteError(
            f"job {added.job_name!r} has {stored} prompts, and those that came begin at {added.first_prompt}",
            f"add the prompts from {stored} on",
        )
    new = added.prompts[stored - added.first_prompt :]
    if stored + len(new) > wanted:
        raise InvalidInputError(f"job {added.job_name!r} was announced with {wanted} prompts, and more came")
    digest = bytes(job["stored_sha256"])
    for prompt in new:
        digest = extend_digest(digest, prompt.prompt_id, prompt.content)
    if stored + len(new) == wanted and digest != added.content_sha256:
        _forget_prompts(connection, int(job["id"]))
        return InvalidInputError(
            f"the prompts of job {added.job_name!r} have digest {digest.hex()[:12]}, "
            f"announced was {added.content_sha256.hex()[:12]}",
            "create the job anew, with the digest of the prompts that are sent",
        )
    _insert_prompts(connection, int(job["id"]), stored, new)
    advanced = {"stored_prompt_count": stored + len(new), "stored_sha256": digest}
    connection.execute(update(jobs).where(jobs.c.id == job["id"]).values(advanced))
    return stored + len(new)


def get_job(connection: Connection, stream_name: str, job_name: str) -> JobRecord:
    """See `QueueCatalog.get_job`."""
    stream_id = get_stream(connection, stream_name).stream_id
    found = _list_jobs(connection, stream_name, (jobs.c.stream_id == stream_id) & (jobs.c.name == job_name))
    if not found:
        raise job_not_found(stream_name, job_name)
    return found[0]


def list_jobs(connection: Connection, stream_name: str) -> list[JobRecord]:
    """See `QueueCatalog.list_jobs`."""
    return _list_jobs(
        connection, stream_name, jobs.c.stream_id == get_stream(connection, stream_name).stream_id
    )


def cancel_job(connection: Connection, stream_name: str, job_name: str) -> JobRecord:
    """See `QueueCatalog.cancel_job`."""
    job = lock_job(connection, stream_name, job_name)
    if job["done_count"] < job["prompt_count"] * job["samples_per_prompt"]:
        for table in (leases, job_prompts):
            connection.execute(delete(table).where(table.c.job_id == job["id"]))
        connection.execute(update(jobs).where(jobs.c.id == job["id"]).values(cancelled=True))
    return get_job(connection, stream_name, job_name)


def locate_prompts(
    connection: Connection, stream_name: str, prompt_ids: Sequence[str]
) -> list[PromptLocation]:
    """See `QueueCatalog.locate_prompts`."""
    stream_id = get_stream(connection, stream_name).stream_id
    whole: list[PromptLocation] = []
    parts: list[PromptLocation] = []
    for chunk in chunks(set(prompt_ids)):
        columns = (finished_samples.c.prompt_id, finished_samples.c.offset, finished_samples.c.sample_indices)
        of_chunk = (finished_samples.c.stream_id == stream_id) & finished_samples.c.prompt_id.in_(chunk)
        for prompt_id, offset, indices in connection.execute(select(*columns).where(of_chunk)):
            parts.append(PromptLocation(prompt_id, offset, unpack_indices(indices)))
        of_chunk = (finished_prompts.c.stream_id == stream_id) & finished_prompts.c.prompt_id.in_(chunk)
        found = select(finished_prompts.c.prompt_id, finished_prompts.c.offset).where(of_chunk)
        whole += [PromptLocation(prompt_id, offset, ()) for prompt_id, offset in connection.execute(found)]
    in_parts = {location.prompt_id for location in parts}
    parts += [location for location in whole if location.prompt_id not in in_parts]
    return sorted(parts, key=lambda location: (location.prompt_id, location.offset))


def lock_job(connection: Connection, stream_name: str, job_name: str) -> RowMapping:
    """A job's row, locked until the transaction ends.

    Raises:
        StreamNotFoundError, JobNotFoundError: there is no such stream or job.
    """
    stream_id = get_stream(connection, stream_name).stream_id
    job = _find_job(connection, stream_id, job_name)
    if job is None:
        raise job_not_found(stream_name, job_name)
    return job


def check_not_cancelled(job: RowMapping) -> None:
    """Let pass a job that nobody ended.

    Raises:
        JobCancelledError: somebody did.
    """
    if job["cancelled"]:
        raise JobCancelledError(
            f"job {job['name']!r} was cancelled",
            "to answer its prompts after all, create a job of another name: what is done stays done",
        )


def _find_job(connection: Connection, stream_id: int, job_name: str) -> RowMapping | None:
    query = select(jobs).where(jobs.c.stream_id == stream_id, jobs.c.name == job_name)
    return connection.execute(query.with_for_update()).mappings().one_or_none()


def _list_jobs(connection: Connection, stream_name: str, condition: ColumnElement[bool]) -> list[JobRecord]:
    held = select(func.coalesce(func.sum(leases.c.open_count), 0)).where(
        leases.c.job_id == jobs.c.id, leases.c.holder != ""
    )
    query = select(jobs, held.scalar_subquery().label("leased_count")).where(condition)
    found = [_record(stream_name, row) for row in connection.execute(query).mappings()]
    # Not in the query: databases order text by the customs of some country.
    return sorted(found, key=lambda record: record.name)


def _record(stream_name: str, row: RowMapping) -> JobRecord:
    return JobRecord(
        stream_name=stream_name,
        name=row["name"],
        samples_per_prompt=row["samples_per_prompt"],
        prompt_count=row["prompt_count"],
        content_sha256=bytes(row["content_sha256"]),
        stored_prompt_count=row["stored_prompt_count"],
        created_unix_nano=row["created_unix_nano"],
        done_count=row["done_count"],
        leased_count=int(row["leased_count"]),  # PostgreSQL gives sums as decimals
        is_cancelled=bool(row["cancelled"]),
        failed_count=row["failed_count"],
    )


def _forget_prompts(connection: Connection, job_id: int) -> None:
    connection.execute(delete(job_prompts).where(job_prompts.c.job_id == job_id))
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(_NOTHING_STORED))


def _insert_prompts(
    connection: Connection, job_id: int, first_prompt: int, prompts: Sequence[JobPrompt]
) -> None:
    for block in _blocks(prompts):
        row = {
            "job_id": job_id,
            "first_prompt": first_prompt,
            "prompt_count": len(block),
            "prompt_ids": pack([prompt.prompt_id.encode() for prompt in block]),
            "contents": pack_compressed([prompt.content for prompt in block]),
        }
        connection.execute(insert(job_prompts).values(row))
        first_prompt += len(block)


def _blocks(prompts: Sequence[JobPrompt]) -> Iterator[list[JobPrompt]]:
    block: list[JobPrompt] = []
    size_bytes = 0
    for prompt in prompts:
        block.append(prompt)
        size_bytes += len(prompt.content)
        if size_bytes >= BLOCK_BYTES or len(block) == BLOCK_PROMPTS:
            yield block
            block, size_bytes = [], 0
    if block:
        yield block
