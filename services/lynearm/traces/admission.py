"""Decides which blocks of a group enter the catalog, and at which offsets. Pure: rows in, rows out.

The rules, in order: the stream exists; the epoch is the producer's newest; a sequence number seen before
is the same block (its first offset is the answer) or a conflict; the stream is open; the sequence number
is the next; no finished prompt of the block was finished before; its units of work are its own and not done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lynearm.traces import work_admission
from lynearm.traces.catalog import CommitOutcome, CommittedBlock, NewBlock, stream_not_found
from lynearm.traces.work_admission import WorkState
from lynearm.wire.errors import (
    LynearmError,
    ProducerFencedError,
    PromptFinishedError,
    SequenceConflictError,
    SequenceGapError,
    StreamSealedError,
)


@dataclass(slots=True)
class StreamProgress:
    """A stream's row; advanced by admission."""

    sealed: bool
    next_offset: int
    trace_count: int
    prompt_token_count: int
    completion_token_count: int
    size_bytes: int
    finished_prompt_count: int
    retained_bytes: int


@dataclass(slots=True)
class ProducerProgress:
    """A producer's row; advanced by admission."""

    epoch: int
    last_sequence: int


@dataclass(frozen=True, slots=True)
class PublishedBlock:
    """An earlier publish."""

    offset: int
    size_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class GroupState:
    """What the catalog knows that a group depends on; `admit` brings it up to date."""

    streams: dict[int, StreamProgress]
    """By stream id; a stream that is missing was deleted."""
    producers: dict[int, ProducerProgress]
    """By producer key."""
    published: dict[tuple[int, int], PublishedBlock]
    """By (producer key, sequence), newest epoch; the group's sequence numbers only."""
    finished: set[tuple[int, str]]
    """(stream id, prompt id); the group's prompts only."""
    work: WorkState = field(default_factory=WorkState)
    """Of the group's leases and prompts only."""
    admitted: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """(index in the group, offset) of each new block."""


def admit(blocks: Sequence[NewBlock], state: GroupState) -> list[CommitOutcome]:
    """The outcome of each block, in order; `state` then holds what must be written."""
    return [_admit(index, block, state) for index, block in enumerate(blocks)]


def _admit(index: int, block: NewBlock, state: GroupState) -> CommitOutcome:
    stream = state.streams.get(block.producer.stream_id)
    producer = state.producers.get(block.producer.key)
    if stream is None or producer is None:
        return stream_not_found(block.producer.stream_name)
    if block.producer.epoch != producer.epoch:
        return fenced(block.producer.producer_id, block.producer.epoch, producer.epoch)
    if block.sequence <= producer.last_sequence:
        return _seen_again(block, state)
    refusal = _refusal(block, stream, producer, state)
    if refusal is not None:
        return refusal
    offset = stream.next_offset
    _advance(stream, block)
    producer.last_sequence = block.sequence
    state.published[block.producer.key, block.sequence] = PublishedBlock(
        offset, block.facts.size_bytes, block.facts.checksum
    )
    completed = work_admission.take(block.producer.stream_id, offset, block.finished_work, state.work)
    stream.finished_prompt_count += len(completed)
    state.finished.update(
        (block.producer.stream_id, prompt_id) for prompt_id in (*block.finished_prompt_ids, *completed)
    )
    state.admitted.append((index, offset))
    return CommittedBlock(offset, is_new=True)


def _seen_again(block: NewBlock, state: GroupState) -> CommitOutcome:
    first = state.published.get((block.producer.key, block.sequence))
    facts = block.facts
    if first is not None and (first.size_bytes, first.checksum) == (facts.size_bytes, facts.checksum):
        return CommittedBlock(first.offset, is_new=False)
    return SequenceConflictError(
        f"producer {block.producer.producer_id!r} used sequence {block.sequence} for another block already",
        "resend exactly the bytes of the first attempt, or open a new epoch",
    )


def _refusal(
    block: NewBlock, stream: StreamProgress, producer: ProducerProgress, state: GroupState
) -> LynearmError | None:
    if stream.sealed:
        return sealed(block.producer.stream_name)
    if block.sequence != producer.last_sequence + 1:
        return SequenceGapError(
            f"producer {block.producer.producer_id!r} sent sequence {block.sequence}, "
            f"expected {producer.last_sequence + 1}",
            "reconnect and resend from the next_sequence that the server names",
        )
    return _finished_refusal(block, state) or work_admission.refuse(
        block.producer.stream_id, block.finished_work, state.work, state.finished
    )


def _finished_refusal(block: NewBlock, state: GroupState) -> LynearmError | None:
    whole = set(block.finished_prompt_ids)
    by_lease = {prompt.prompt_id for of_lease in block.finished_work for prompt in of_lease.prompts}
    if len(whole) < len(block.finished_prompt_ids) or not whole.isdisjoint(by_lease):
        return PromptFinishedError("a block finishes the same prompt twice", "name each prompt once")
    for prompt_id in block.finished_prompt_ids:
        known = (block.producer.stream_id, prompt_id)
        if known in state.finished or state.work.samples.get(known):
            return PromptFinishedError(
                f"prompt {prompt_id!r} is finished in stream {block.producer.stream_name!r} already",
                "drop its traces and publish the rest",
            )
    return None


def _advance(stream: StreamProgress, block: NewBlock) -> None:
    stream.next_offset += 1
    stream.trace_count += block.facts.trace_count
    stream.prompt_token_count += block.facts.prompt_token_count
    stream.completion_token_count += block.facts.completion_token_count
    stream.size_bytes += block.facts.size_bytes
    stream.retained_bytes += block.facts.size_bytes
    stream.finished_prompt_count += len(block.finished_prompt_ids)


def fenced(producer_id: str, epoch: int, newest: int) -> ProducerFencedError:
    """The error of an epoch that is no longer the newest."""
    return ProducerFencedError(
        f"epoch {epoch} of producer {producer_id!r} was fenced off by epoch {newest}",
        "another process publishes under this id: stop one of them, or use another id",
    )


def sealed(stream_name: str) -> StreamSealedError:
    """The error of a stream that takes no more blocks."""
    return StreamSealedError(f"stream {stream_name!r} is sealed", "publish to another stream")
