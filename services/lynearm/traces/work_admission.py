"""Decides whether a block may finish the units of work that it names. Pure: rows in, rows out.

A block is admitted with its work whole, or refused whole. The rules: the lease is open and the generation its
newest; it covers every unit; no unit is done; and no sample of a prompt is in the stream already, whoever
brought it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lynearm.wire.errors import InvalidInputError, LeaseSupersededError, LynearmError, PromptFinishedError
from lynearm.wire.work import FinishedSamples, FinishedWork, LeaseKey


@dataclass(slots=True)
class LeaseState:
    """A lease's row; advanced by admission."""

    lease_id: int
    job_id: int
    stream_id: int
    samples_per_prompt: int
    first_unit: int
    done: bytearray
    """A byte for each unit: 1 when it is done."""
    generation: int
    prompt_indices: Mapping[str, int]
    """Of the prompts that the lease touches: their numbers in the job."""

    def place(self, prompt_id: str, sample_index: int) -> int | None:
        """Where a unit stands in `done`; None when the lease does not cover it."""
        prompt_index = self.prompt_indices.get(prompt_id)
        if prompt_index is None or sample_index >= self.samples_per_prompt:
            return None
        place = prompt_index * self.samples_per_prompt + sample_index - self.first_unit
        return place if 0 <= place < len(self.done) else None


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """Samples of one prompt that one block brings."""

    stream_id: int
    prompt_id: str
    offset: int
    sample_indices: tuple[int, ...]
    is_whole: bool
    """The block brings every sample of the prompt."""
    completes: bool
    """With this block, every sample is there."""


@dataclass(slots=True)
class WorkState:
    """What the catalog knows of the work that a group finishes; `take` brings it up to date."""

    leases: dict[int, LeaseState] = field(default_factory=dict[int, LeaseState])
    """By lease id; one that is missing is over."""
    samples: dict[tuple[int, str], set[int]] = field(default_factory=dict[tuple[int, str], set[int]])
    """By (stream id, prompt id): samples in the stream, of the group's prompts that are not finished."""
    newly_done: dict[int, int] = field(default_factory=dict[int, int])
    """By lease id: units that the group finishes."""
    rows: list[FinishedRow] = field(default_factory=list[FinishedRow])


def refuse(
    stream_id: int, work: Sequence[FinishedWork], state: WorkState, finished: set[tuple[int, str]]
) -> LynearmError | None:
    """Why a block may not finish the units that it names; None when it may.

    Args:
        stream_id: Of the block.
        work: What the block finishes.
        state: What is known.
        finished: (stream id, prompt id) of prompts of which every sample is there.
    """
    named: set[tuple[str, int]] = set()
    for of_lease in work:
        lease = state.leases.get(of_lease.lease.lease_id)
        if lease is None or lease.generation != of_lease.lease.generation:
            return superseded(of_lease.lease, None if lease is None else lease.generation)
        if lease.stream_id != stream_id:
            return InvalidInputError(
                f"lease {lease.lease_id} is of a job of another stream", "publish to the job's stream"
            )
        for prompt in of_lease.prompts:
            refusal = _refuse_prompt(prompt, lease, state, finished)
            units = {(prompt.prompt_id, sample_index) for sample_index in prompt.sample_indices}
            if refusal is None and not named.isdisjoint(units):  # under leases of two jobs
                refusal = _is_done(*min(named & units))
            if refusal is not None:
                return refusal
            named |= units
    return None


def _refuse_prompt(
    prompt: FinishedSamples, lease: LeaseState, state: WorkState, finished: set[tuple[int, str]]
) -> LynearmError | None:
    known = (lease.stream_id, prompt.prompt_id)
    in_stream = state.samples.get(known, set())
    for sample_index in prompt.sample_indices:
        place = lease.place(prompt.prompt_id, sample_index)
        if place is None:
            return InvalidInputError(
                f"lease {lease.lease_id} does not cover sample {sample_index} of prompt {prompt.prompt_id!r}",
                "finish what was leased",
            )
        if lease.done[place] or known in finished or sample_index in in_stream:
            return _is_done(prompt.prompt_id, sample_index)
    return None


def take(stream_id: int, offset: int, work: Sequence[FinishedWork], state: WorkState) -> list[str]:
    """Note the units that an admitted block finishes; the prompts that it completes.

    Args:
        stream_id: Of the block.
        offset: Of the block.
        work: What it finishes; `refuse` found nothing against it.
        state: Brought up to date.
    """
    brought: dict[str, set[int]] = {}
    wanted: dict[str, int] = {}
    for of_lease in work:
        lease = state.leases[of_lease.lease.lease_id]
        for prompt in of_lease.prompts:
            for sample_index in prompt.sample_indices:
                place = lease.place(prompt.prompt_id, sample_index)
                if place is not None:
                    lease.done[place] = 1
            brought.setdefault(prompt.prompt_id, set()).update(prompt.sample_indices)
            wanted[prompt.prompt_id] = max(lease.samples_per_prompt, wanted.get(prompt.prompt_id, 0))
            count = state.newly_done.get(lease.lease_id, 0)
            state.newly_done[lease.lease_id] = count + len(prompt.sample_indices)
    completed: list[str] = []
    for prompt_id, sample_indices in brought.items():
        in_stream = state.samples.setdefault((stream_id, prompt_id), set())
        in_stream |= sample_indices
        row = FinishedRow(
            stream_id,
            prompt_id,
            offset,
            tuple(sorted(sample_indices)),
            is_whole=_has_all(sample_indices, wanted[prompt_id]),
            completes=_has_all(in_stream, wanted[prompt_id]),
        )
        state.rows.append(row)
        if row.completes:
            completed.append(prompt_id)
    return completed


def superseded(key: LeaseKey, newest: int | None) -> LeaseSupersededError:
    """The error of a lease that is not its holder's any more."""
    why = "is over" if newest is None else f"was given to another as generation {newest}"
    return LeaseSupersededError(
        f"generation {key.generation} of lease {key.lease_id} {why}",
        "drop what was made for it, and lease other work; renew in time to keep a lease",
    )


def _has_all(sample_indices: set[int], wanted: int) -> bool:
    # Another job may have brought samples beyond those that this one wants.
    return sum(sample_index < wanted for sample_index in sample_indices) == wanted


def _is_done(prompt_id: str, sample_index: int) -> PromptFinishedError:
    return PromptFinishedError(
        f"sample {sample_index} of prompt {prompt_id!r} is in the stream already",
        "drop its trace and publish the rest",
    )
