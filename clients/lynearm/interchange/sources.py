"""What an import reads: prompts with all their traces, from a file of any format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lynearm.interchange.progress import FailedRequest
from lynearm.wire.traces import Trace


@dataclass(frozen=True, slots=True)
class PromptTraces:
    """Every trace of one prompt; they go into one block, which marks the prompt as finished."""

    prompt_id: str
    traces: tuple[Trace, ...]
    where: str
    """File and row or line, for messages."""


class TraceSource(Protocol):
    """A file that is read from its beginning to its end, in batches of bounded size.

    Every error that its methods raise names the file and the place in it.
    """

    path: Path
    size_bytes: int
    """Of the file."""

    @property
    def read_bytes(self) -> int:
        """How much of the file was read."""
        ...

    def prompts(self) -> Iterator[PromptTraces | FailedRequest]:
        """Its prompts in order.

        Raises:
            InvalidInputError: if a row or line is none.
        """
        ...
