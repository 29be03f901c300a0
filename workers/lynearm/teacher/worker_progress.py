"""What a worker is given to do for others, and what it says of itself: plain data, which Ray carries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lynearm.wire.work import LeasedPrompt, LeaseKey


@dataclass(frozen=True, slots=True)
class LeasedWork:
    """Some prompts of a lease that somebody else holds, to be answered for them."""

    key: LeaseKey
    prompts: tuple[LeasedPrompt, ...]


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """How far a worker is, since it was made."""

    generated_tokens: int = 0
    """Completion tokens, those of unfinished completions included."""
    prompt_tokens: int = 0
    """Tokens of the prompts that it started on."""
    generated_prompts: int = 0
    """Prompts whose completions are all generated; they may not be durable yet."""
    running: int = 0
    """Completions in the engine."""
    empty_completions: int = 0
    """Completions in which the model said nothing before its end token; recorded like any other."""
    acked_blocks: int = 0
    """Blocks of this worker that are durable."""
    waiting_seconds: float = 0.0
    """How long blocks waited for a service that did not take them."""
    waiting_reason: str = ""
    """Why nothing can be published right now; empty while all is well."""
    encode_seconds: float = 0.0
    """Time spent on encoding blocks, beside the engine."""
    process_id: int = 0
    """Of the worker's process."""
    verdicts: Counter[str] = field(default_factory=Counter[str])
    """How many completions got each verdict; empty without a verifier."""
    left_out: int = 0
    """Completions that were judged and not published."""
    failed_prompts: int = 0
    """Prompts that the teacher cannot take."""
    job_done_units: int = 0
    """Units of the whole job that were done when it leased last."""
