"""What a launcher of several processes says to each of them; read without torch, by the command line too.

The one place where the student reads these variables, which torchrun sets and Ray Train sets as well.
"""

from __future__ import annotations

import os


def launched_world_size() -> int:
    """Processes of the run; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def launched_rank() -> int:
    """This process's number, from 0."""
    return _number("RANK", 0)


def launched_local_rank() -> int:
    """This process's number on its machine, from 0."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
