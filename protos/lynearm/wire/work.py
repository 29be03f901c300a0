"""Units of work of the prompt queue, as they travel with a publish.

A unit is one completion wanted of one prompt: a (prompt id, sample index). A worker holds units by lease, and
says with each block which of them it finishes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from google.protobuf.message import DecodeError

from lynearm.v1 import prompt_queue_pb2 as pb
from lynearm.wire.errors import InvalidInputError

MAX_PROMPT_ID_BYTES = 256

MAX_SAMPLES = 1 << 16
"""Completions of one prompt."""

MAX_REASON_BYTES = 1000
"""Of a prompt that is given up."""

DIGEST_OF_NOTHING = bytes(32)
"""What `extend_digest` begins with."""


@dataclass(frozen=True, slots=True)
class LeaseKey:
    """A lease as one worker holds it; of two generations, the later supersedes the earlier for ever."""

    lease_id: int
    generation: int


@dataclass(frozen=True, slots=True)
class JobPrompt:
    """A prompt of a job."""

    prompt_id: str
    """1 to 256 bytes of UTF-8. One that the stream has finished already is not handed out."""
    content: bytes
    """What a worker needs to answer it; opaque to the service, at most 1 MiB."""


@dataclass(frozen=True, slots=True)
class LeasedPrompt:
    """A prompt of a lease."""

    prompt_index: int
    """In the job, from 0."""
    prompt_id: str
    content: bytes
    """As it was when the job was created."""
    sample_indices: tuple[int, ...]
    """The completions wanted, ascending."""


@dataclass(frozen=True, slots=True)
class FinishedSamples:
    """Samples of one prompt whose traces are in a block."""

    prompt_id: str
    sample_indices: tuple[int, ...]
    """Ascending, at least one."""


@dataclass(frozen=True, slots=True)
class FinishedWork:
    """The units of one lease that a block finishes."""

    lease: LeaseKey
    prompts: tuple[FinishedSamples, ...]


@dataclass(frozen=True, slots=True)
class FailedSamples:
    """Samples of a prompt that get no trace."""

    prompt_id: str
    sample_indices: tuple[int, ...]
    """Ascending, at least one."""
    reason: str
    """Why, for people; 1 to `MAX_REASON_BYTES` bytes of UTF-8."""


def extend_digest(digest: bytes, prompt_id: str, content: bytes) -> bytes:
    """The digest of a list of prompts that is longer by one; 32 bytes.

    A chain, so that whoever receives the list in parts keeps nothing but the last digest.

    Args:
        digest: Of the list before; `DIGEST_OF_NOTHING` of the empty one.
        prompt_id: The prompt's id.
        content: The prompt's content.
    """
    encoded = prompt_id.encode()
    return hashlib.sha256(b"".join((digest, len(encoded).to_bytes(4, "little"), encoded, content))).digest()


def finished_work_to_proto(work: FinishedWork) -> pb.FinishedWork:
    """The message of finished work."""
    key = pb.LeaseKey(lease_id=work.lease.lease_id, generation=work.lease.generation)
    prompts = [
        pb.FinishedSamples(prompt_id=prompt.prompt_id, sample_indices=prompt.sample_indices)
        for prompt in work.prompts
    ]
    return pb.FinishedWork(lease=key, prompts=prompts)


def parse_finished_work(data: bytes) -> FinishedWork:
    """The finished work in a serialised message.

    Raises:
        InvalidInputError: if it is no such message, or names nothing, or something twice.
    """
    try:
        message = pb.FinishedWork.FromString(data)
    except DecodeError as error:
        raise InvalidInputError("PublishBlock.finished_work is not a FinishedWork") from error
    prompts = tuple(
        FinishedSamples(check_prompt_id(prompt.prompt_id), _ascending(prompt.sample_indices))
        for prompt in message.prompts
    )
    if not prompts or len({prompt.prompt_id for prompt in prompts}) < len(prompts):
        raise InvalidInputError("finished work names no prompt, or one twice", "name each prompt once")
    return FinishedWork(LeaseKey(message.lease.lease_id, message.lease.generation), prompts)


def check_prompt_id(prompt_id: str) -> str:
    """The prompt id, unchanged.

    Raises:
        InvalidInputError: if it is empty, too long, or nothing that every database stores.
    """
    try:
        size_bytes = len(prompt_id.encode())
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"prompt id {prompt_id!r} holds half a character") from error
    if not 0 < size_bytes <= MAX_PROMPT_ID_BYTES:
        raise InvalidInputError(f"a prompt id of {size_bytes} bytes, expected 1 to {MAX_PROMPT_ID_BYTES}")
    if "\0" in prompt_id:
        raise InvalidInputError(f"prompt id {prompt_id!r} holds the character NUL")
    return prompt_id


def check_reason(reason: str) -> str:
    """The reason, unchanged.

    Raises:
        InvalidInputError: if it is empty, too long, or nothing that every database stores.
    """
    size_bytes = len(reason.encode(errors="replace"))
    if not 0 < size_bytes <= MAX_REASON_BYTES or "\0" in reason:
        raise InvalidInputError(
            f"a reason of {size_bytes} bytes, expected 1 to {MAX_REASON_BYTES} without NUL", "shorten it"
        )
    return reason


def check_sample_indices(indices: Iterable[int]) -> tuple[int, ...]:
    """The indices, which have to ascend.

    Raises:
        InvalidInputError: if they do not, or there is none.
    """
    return _ascending(indices)


def _ascending(indices: Iterable[int]) -> tuple[int, ...]:
    found = tuple(indices)
    if not found or any(later <= earlier for earlier, later in pairwise(found)):
        raise InvalidInputError("sample indices of finished work are none, or do not ascend")
    return found
