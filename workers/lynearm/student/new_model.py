"""A directory for a model that is made here: there as a whole, or not at all. Loads no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lynearm.wire.errors import CheckpointError


def refuse_used(out: Path, what: str) -> None:
    """Leave alone what is there.

    Args:
        out: Must not exist, or be an empty directory.
        what: Is to be written, for people.

    Raises:
        CheckpointError: if it is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is in use", f"name a new directory for the {what}")


@contextmanager
def new_directory(out: Path, what: str) -> Generator[Path]:
    """A directory beside another, whose name it takes when the block ends without an error.

    Args:
        out: As for `refuse_used`; parents are made.
        what: Is written, for people.

    Raises:
        CheckpointError: if the system refuses anything in the block, or the new name.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            unfinished.chmod(0o755)  # mkdtemp makes it private; a model is not
            yield unfinished
            os.replace(unfinished, out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # a full disk is the latter to safetensors
        raise CheckpointError(f"{what} {out} could not be written: {error}", "make room") from error
