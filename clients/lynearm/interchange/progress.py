"""What exports and imports say while they work, and what they come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class ExportProgress:
    """How far an export is; given after each block."""

    traces: int
    total_traces: int
    """What the stream held when the export began."""
    tokens: int
    """Completion tokens."""
    size_bytes: int
    """Encoded blocks that were read."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote."""

    stream: str
    path: Path
    traces: int
    tokens: int
    """Completion tokens."""
    blocks: int
    next_offset: int
    """Where the stream ended: the first block that is not in the file."""
    row_groups: int
    size_bytes: int
    """Of the file."""
    seconds: float


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A line of a batch's output that holds no completion, since the request failed."""

    where: str
    """File and line."""
    reason: str


ImportStage: TypeAlias = Literal["checking", "importing", "sealing"]


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """How far an import is; given after each block, and twice a second where prompts are skipped."""

    stage: ImportStage
    file: str
    """The one that is read."""
    read_bytes: int = 0
    """Of all files."""
    total_bytes: int = 0
    traces: int = 0
    """Added by this run; they may not be durable yet."""
    tokens: int = 0
    """Completion tokens of those."""
    skipped_traces: int = 0
    """Of prompts that the stream had already."""
    waiting_reason: str = ""
    """Why nothing can be published right now; empty while all is well."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did. All that it counts is durable."""

    stream: str
    files: int
    prompts: int
    """Added by this run."""
    traces: int
    """Added by this run."""
    tokens: int
    """Completion tokens of those."""
    skipped_prompts: int
    """Prompts of the files that the stream had already."""
    skipped_traces: int
    blocks: int
    """Added by this run."""
    size_bytes: int
    """Bytes of those blocks."""
    failed: tuple[FailedRequest, ...]
    """Lines that say that a request failed, the first hundred of them."""
    failed_requests: int
    """How many there were."""
    seconds: float
    interrupted: bool = False
    """Stopped before the end; the same command goes on from here."""
    sealed: bool = False


OnExportProgress: TypeAlias = Callable[[ExportProgress], None]
OnImportProgress: TypeAlias = Callable[[ImportProgress], None]
