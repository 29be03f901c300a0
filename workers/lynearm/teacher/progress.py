"""What a teaching job says of itself: while it runs, and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lynearm.teacher.prompts import BadLine

Stage: TypeAlias = Literal["waiting", "starting", "loading", "generating", "sealing", "done"]

WorkerState: TypeAlias = Literal[
    "waiting", "loading", "generating", "retrying", "idle", "draining", "replacing", "given up"
]
"""waiting: for a place in the cluster; loading: its engine; retrying: prompts that were in an engine which
died; idle: others hold all that is left; draining: its node is to go, so that it ends what it began;
replacing: it died; given up: it died too often."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker of a job, at one moment."""

    name: str
    """Its producer id, which its successors keep."""
    state: WorkerState
    node: str = ""
    """Address of the node that it runs on; empty while it has none."""
    waiting_reason: str = ""
    """What it waits for, or what happened to it last; empty while all is well."""
    tokens_per_second: float = 0.0
    """Completion tokens, over the last 15 seconds."""
    running: int = 0
    """Completions in its engine."""
    max_batch: int = 0
    """Completions that its engine generates at once."""
    done_prompts: int = 0
    """Prompts that it and its predecessors of that name generated in this run."""
    generated_tokens: int = 0
    """Completion tokens that it and its predecessors generated in this run."""
    restarts: int = 0
    """How often it was replaced."""
    process_id: int = 0
    """Of its process, on its node; 0 while there is none."""

    @property
    def occupancy(self) -> float:
        """How full its batch is, 0 to 1."""
        return min(self.running / self.max_batch, 1.0) if self.max_batch else 0.0


@dataclass(frozen=True, slots=True)
class TeacherStatus:
    """One of several teachers, at one moment."""

    name: str
    stage: Stage
    message: str = ""
    """What a person should know now; empty while all is well."""
    prompts: int = 0
    """Prompts that are its part."""
    done_prompts: int = 0
    """Of these, as in `TeachProgress`."""
    tokens_per_second: float = 0.0
    workers: int = 0
    """That it has now."""


@dataclass(frozen=True, slots=True)
class TeachProgress:
    """How far a job is; given to `on_progress` about twice a second."""

    stage: Stage
    message: str = ""
    """What a person should know now: what is waited for, what was restarted."""
    prompts: int = 0
    """Prompts of the job, bad lines not counted."""
    done_prompts: int = 0
    """Prompts that are generated or given up, those of earlier runs and of other commands included."""
    skipped_prompts: int = 0
    """Bad lines of the input."""
    failed_prompts: int = 0
    """Prompts of the job that get no trace: the teacher cannot take them, or they end its engine."""
    generated_tokens: int = 0
    """Completion tokens generated in this run."""
    tokens_per_second: float = 0.0
    """Of all workers, over the last 15 seconds."""
    acked_blocks: int = 0
    """Blocks that are durable."""
    waiting_seconds: float = 0.0
    """How long workers waited for the service to take blocks, all together."""
    restarts: int = 0
    """Workers that died and were replaced."""
    verdicts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Completions of this run by verdict; empty without a verifier."""
    eta_seconds: float | None = None
    """Until the last prompt is done, as things go now; None while that cannot be said."""
    workers: tuple[WorkerStatus, ...] = ()
    """By name."""
    teachers: tuple[TeacherStatus, ...] = ()
    """Of a job of several, in their order: all else is then of all of them together. Empty for one."""


@dataclass(frozen=True, slots=True)
class FailedPrompt:
    """A prompt of a job that gets no trace, or fewer than were wanted."""

    prompt_id: str
    sample_indices: tuple[int, ...]
    """Those that are missing, ascending."""
    reason: str

    def __str__(self) -> str:
        return f"prompt {self.prompt_id!r}: {self.reason}"


@dataclass(frozen=True, slots=True)
class TeachReport:
    """What a job did."""

    stream: str
    job: str
    """Name of the job in the service; empty where the stream had everything already."""
    prompts: int
    """Prompts of the job, bad lines not counted."""
    finished_before: int
    """Prompts of the job that the stream had already."""
    completed: int
    """Prompts that were finished since; durable."""
    completions: int
    """Traces that the stream holds more than before."""
    empty_completions: int
    completion_tokens: int
    """Tokens of those traces."""
    prompt_tokens: int
    generated_tokens: int
    """Completion tokens that the engines made, those included that dead workers lost."""
    skipped: tuple[BadLine, ...]
    """Lines of the input that are no prompts."""
    failed: tuple[FailedPrompt, ...]
    """Prompts without a trace, of earlier runs of the same job too; at most `MAX_REPORTED_FAILURES`."""
    blocks: int
    """Blocks that the stream holds more than before."""
    size_bytes: int
    """Bytes of those blocks."""
    restarts: int
    seconds: float
    workers: int = 0
    """Workers that generated at the same time, at most."""
    failed_prompts: int = 0
    """All prompts without a trace."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Wall time of waiting, starting, loading, generating and sealing; encoding runs beside generating."""
    verdicts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Completions by verdict, those included that a dead worker lost; empty without a verifier."""
    left_out: int = 0
    """Of those, completions that were not published."""
    interrupted: bool = False
    """Stopped before the end; the same command goes on from here."""
    sealed: bool = False
    shares_stream: bool = False
    """Other teachers wrote to the stream meanwhile: what it holds more than before is theirs, too."""
