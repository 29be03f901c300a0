"""The SQL of leases: handing out units of work, renewing, and taking back.

Rows that are read to be changed are locked, always in the order jobs, leases; of one table, ascending by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from lynearm.traces import job_transactions
from lynearm.traces.job_records import (
    LEASE_BYTES,
    MAX_OPEN_LEASES,
    MAX_UNITS,
    FindSilent,
    Grant,
    WorkRequest,
)
from lynearm.traces.packing import unpack, unpack_compressed
from lynearm.traces.schema import job_prompts, jobs, leases
from lynearm.traces.statements import MAX_INTEGER, chunks, inserted_key
from lynearm.traces.transactions import get_stream
from lynearm.traces.work_transactions import find_finished, find_samples, select_prompts
from lynearm.wire.errors import JobIncompleteError, LeaseLimitError
from lynearm.wire.work import JobPrompt, LeasedPrompt, LeaseKey

_MAX_PASSES = 8
"""Pieces of work that one transaction may find done by others before it lets other transactions in."""

_PROMPT_OVERHEAD_BYTES = 32
"""Of a prompt in a message, beyond its id and content."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive units that may be handed out."""

    first_unit: int
    done: bytes
    """A byte for each: 1 when it is done."""
    lease: RowMapping | None
    """The row that they come from; None for units that were never handed out."""


def lease_prompts(connection: Connection, request: WorkRequest, find_silent: FindSilent) -> Grant:
    """See `QueueCatalog.lease_prompts`."""
    job = job_transactions.lock_job(connection, request.stream_name, request.job_name)
    job_transactions.check_not_cancelled(job)
    if job["stored_prompt_count"] < job["prompt_count"]:
        raise JobIncompleteError(
            f"job {request.job_name!r} has {job['stored_prompt_count']} of {job['prompt_count']} prompts",
            "wait until whoever creates it has added them",
        )
    free = _lock_free(connection, job["id"], request, find_silent)
    nothing_else = bool(request.predecessor)
    key: LeaseKey | None = None
    prompts: tuple[LeasedPrompt, ...] = ()
    max_units = request.max_units
    piece: _Piece | None = None
    for _ in range(_MAX_PASSES):
        piece = None if nothing_else and not free else _next_piece(connection, job, free, max_units)
        if piece is None:
            break
        key, prompts = _hand_out(connection, job, piece, request)
        if key is not None:
            break
        # All of it was done by others: look further in larger steps.
        job, max_units = (
            job_transactions.lock_job(connection, request.stream_name, request.job_name),
            MAX_UNITS,
        )
    record = job_transactions.get_job(connection, request.stream_name, request.job_name)
    return Grant(record, key, prompts, passed_over=piece is not None and key is None)


def renew_leases(connection: Connection, stream_name: str, keys: Sequence[LeaseKey]) -> list[LeaseKey]:
    """See `QueueCatalog.renew_leases`."""
    held = _lock_held(connection, stream_name, keys)
    for chunk in chunks(sorted(key.lease_id for key in held)):
        connection.execute(update(leases).where(leases.c.id.in_(chunk)).values(news=leases.c.news + 1))
    return [key for key in keys if key not in held]


def release_leases(connection: Connection, stream_name: str, keys: Sequence[LeaseKey]) -> None:
    """See `QueueCatalog.release_leases`."""
    held = _lock_held(connection, stream_name, keys)
    for chunk in chunks(sorted(key.lease_id for key in held)):
        connection.execute(update(leases).where(leases.c.id.in_(chunk)).values(holder=""))


def _lock_held(connection: Connection, stream_name: str, keys: Sequence[LeaseKey]) -> set[LeaseKey]:
    """Those of the keys that are valid, their rows locked."""
    stream_id = get_stream(connection, stream_name).stream_id
    of_stream = leases.c.job_id.in_(select(jobs.c.id).where(jobs.c.stream_id == stream_id))
    valid: set[LeaseKey] = set()
    for chunk in chunks(sorted({key.lease_id for key in keys if key.lease_id <= MAX_INTEGER})):
        columns = (leases.c.id, leases.c.generation)
        held = leases.c.id.in_(chunk) & of_stream & (leases.c.holder != "")
        rows = connection.execute(select(*columns).where(held).order_by(leases.c.id).with_for_update())
        valid.update(LeaseKey(lease_id, generation) for lease_id, generation in rows)
    return valid & set(keys)


def _lock_free(
    connection: Connection, job_id: int, request: WorkRequest, find_silent: FindSilent
) -> list[int]:
    """Ids of the leases that may be handed out again, in the order of their units."""
    columns = (leases.c.id, leases.c.first_unit, leases.c.holder, leases.c.generation, leases.c.news)
    query = select(*columns).where(leases.c.job_id == job_id).order_by(leases.c.id).with_for_update()
    rows = connection.execute(query).all()
    if request.predecessor:
        return [
            row.id
            for row in sorted(rows, key=lambda row: row.first_unit)
            if row.holder == request.predecessor
        ]
    held = {row.id: (row.generation, row.news) for row in rows if row.holder}
    free = {row.id for row in rows if not row.holder} | find_silent(job_id, held)
    if request.restarted:
        mine = [row.id for row in rows if row.holder == request.worker]
        for chunk in chunks(mine):
            connection.execute(update(leases).where(leases.c.id.in_(chunk)).values(holder=""))
        free.update(mine)
    if len(rows) - len(free) >= MAX_OPEN_LEASES:
        raise LeaseLimitError(
            f"{len(rows) - len(free)} leases of job {request.job_name!r} are held, "
            f"at most {MAX_OPEN_LEASES} may be",
            "lease more units at a time, and publish or give back what is leased",
        )
    return [row.id for row in sorted(rows, key=lambda row: row.first_unit) if row.id in free]


def _next_piece(connection: Connection, job: RowMapping, free: list[int], max_units: int) -> _Piece | None:
    """Up to `max_units` units; takes the lease that they come from out of `free`."""
    if free:
        lease = connection.execute(select(leases).where(leases.c.id == free.pop(0))).mappings().one()
        done = bytes(lease["done"])
        first = done.index(0)
        return _Piece(lease["first_unit"] + first, _first_open(done[first:], max_units), lease)
    first_unit = int(job["next_unit"])
    count = min(max_units, job["prompt_count"] * job["samples_per_prompt"] - first_unit)
    return _Piece(first_unit, bytes(count), None) if count > 0 else None


def _hand_out(
    connection: Connection, job: RowMapping, piece: _Piece, request: WorkRequest
) -> tuple[LeaseKey | None, tuple[LeasedPrompt, ...]]:
    """Lease a piece, but for what the stream has already; (None, ()) when it has all."""
    samples = int(job["samples_per_prompt"])
    prompts = _read_prompts(connection, job, piece)
    end = min(len(piece.done), (max(prompts) + 1) * samples - piece.first_unit)
    done = _mark_done(connection, job, piece, prompts)[:end]
    passed = done.find(0)
    if passed < 0:
        passed = end
    done = done[:passed] + _first_open(done[passed:], request.max_units)
    _count_done(connection, job, done.count(1) - piece.done[: len(done)].count(1))
    key = _store(connection, job, piece, done, passed, request.worker)
    wanted: dict[int, list[int]] = {}
    for unit, is_done in enumerate(done, piece.first_unit):
        if not is_done:
            wanted.setdefault(unit // samples, []).append(unit % samples)
    return key, tuple(
        LeasedPrompt(index, prompts[index].prompt_id, prompts[index].content, tuple(sample_indices))
        for index, sample_indices in wanted.items()
    )


def _first_open(done: bytes, count: int) -> bytes:
    """Units up to the first `count` that are not done, and no more than one lease may have."""
    end = -1
    for _ in range(count):
        end = done.find(0, end + 1)
        if end < 0:
            return done[:MAX_UNITS]
    return done[: min(end + 1, MAX_UNITS)]


def _read_prompts(connection: Connection, job: RowMapping, piece: _Piece) -> dict[int, JobPrompt]:
    """The prompts of a piece by number; the first ones only, where all would not fit into a message."""
    samples = int(job["samples_per_prompt"])
    first, last = piece.first_unit // samples, (piece.first_unit + len(piece.done) - 1) // samples
    found: dict[int, JobPrompt] = {}
    size_bytes = 0
    columns = (job_prompts.c.prompt_ids, job_prompts.c.contents)
    query = select_prompts(*columns, job_id=job["id"], first=first, end=last + 1)
    with connection.execute(query) as rows:
        for row in rows:
            pairs = zip(unpack(row.prompt_ids), unpack_compressed(row.contents), strict=True)
            for index, (prompt_id, content) in enumerate(pairs, row.first_prompt):
                if size_bytes >= LEASE_BYTES:
                    return found
                if first <= index <= last:
                    found[index] = JobPrompt(prompt_id.decode(), content)
                    size_bytes += len(prompt_id) + len(content) + _PROMPT_OVERHEAD_BYTES
    return found


def _mark_done(
    connection: Connection, job: RowMapping, piece: _Piece, prompts: dict[int, JobPrompt]
) -> bytes:
    """What is done of a piece, counting what came into the stream by another way.

    Of prompts of one id, those behind the first have nothing to be done: the job has the first's units too.
    """
    samples = int(job["samples_per_prompt"])
    first_indices: dict[str, int] = {}
    for index in prompts:
        first_indices.setdefault(prompts[index].prompt_id, index)
    finished = find_finished(connection, job["stream_id"], first_indices)
    in_stream = find_samples(connection, job["stream_id"], first_indices.keys() - finished)
    done = bytearray(piece.done)
    if not finished and not in_stream and len(first_indices) == len(prompts):
        return bytes(done)
    for place, unit in enumerate(range(piece.first_unit, piece.first_unit + len(done))):
        prompt = prompts.get(unit // samples)
        if prompt is None:
            break
        is_repeated = first_indices[prompt.prompt_id] < unit // samples
        in_other_block = unit % samples in in_stream.get(prompt.prompt_id, ())
        if is_repeated or in_other_block or prompt.prompt_id in finished:
            done[place] = 1
    return bytes(done)


def _count_done(connection: Connection, job: RowMapping, count: int) -> None:
    if count:
        grown = {"done_count": jobs.c.done_count + count}
        connection.execute(update(jobs).where(jobs.c.id == job["id"]).values(grown))


def _store(
    connection: Connection, job: RowMapping, piece: _Piece, done: bytes, passed: int, worker: str
) -> LeaseKey | None:
    """Give the units behind the first `passed` to a worker; None where there are none."""
    first_unit, end_unit = piece.first_unit + passed, piece.first_unit + len(done)
    row = {
        "job_id": job["id"],
        "first_unit": first_unit,
        "done": done[passed:],
        "open_count": done[passed:].count(0),
        "holder": worker,
    }
    if piece.lease is None:
        connection.execute(update(jobs).where(jobs.c.id == job["id"]).values(next_unit=end_unit))
        if passed == len(done):
            return None
        new = insert(leases).values(row | {"generation": 1, "news": 1}).returning(leases.c.id)
        return LeaseKey(inserted_key(connection, new), 1)
    _put_back(connection, piece.lease, end_unit)
    this = leases.c.id == piece.lease["id"]
    if passed == len(done):
        connection.execute(delete(leases).where(this))
        return None
    generation = int(piece.lease["generation"]) + 1
    handed = row | {"generation": generation, "news": piece.lease["news"] + 1}
    connection.execute(update(leases).where(this).values(handed))
    return LeaseKey(piece.lease["id"], generation)


def _put_back(connection: Connection, lease: RowMapping, first_unit: int) -> None:
    """Make a lease of its own, which nobody holds, of the units of another from `first_unit` on."""
    done = bytes(lease["done"])[first_unit - lease["first_unit"] :]
    if not done.count(0):
        return
    row = {
        "job_id": lease["job_id"],
        "first_unit": first_unit,
        "done": done,
        "open_count": done.count(0),
        "holder": "",
        "generation": 0,
        "news": 0,
    }
    connection.execute(insert(leases).values(row))
