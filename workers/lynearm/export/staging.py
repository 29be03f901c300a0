"""Writing an export so that it is seen whole or not at all, and never over someone else's files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from lynearm.wire.errors import InvalidInputError, StorageError

MARKER_FILE = "lynearm_export.json"
"""Says that lynearm wrote a directory, from what and how well; its presence permits replacement."""


@contextlib.contextmanager
def staged_directory(target: Path, *, overwrite: bool) -> Generator[Path]:
    """A temporary directory beside the target that takes its name when the block ends without an error.

    Args:
        target: The directory to create; parents are made.
        overwrite: Replace an existing directory even if lynearm did not write it.

    Raises:
        InvalidInputError: if the target exists and may not be replaced.
        StorageError: if it cannot be created or renamed.
    """
    _check_replaceable(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        staging.chmod(0o755)
    except OSError as error:
        raise StorageError(f"cannot write beside {target}: {error}", "choose a writable folder") from error
    try:
        yield staging
        # Checked again: another export may have finished meanwhile.
        _check_replaceable(target, overwrite=overwrite)
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object with sorted keys and a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def directory_size_bytes(path: Path) -> int:
    """Sum of the sizes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _check_replaceable(target: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise InvalidInputError(f"{target} exists and is not a directory", "choose another output directory")
    empty = not any(target.iterdir())
    if not (overwrite or empty or (target / MARKER_FILE).is_file()):
        raise InvalidInputError(
            f"{target} exists and was not written by lynearm", "choose another directory, or set overwrite"
        )


def _publish(staging: Path, target: Path) -> None:
    retired = staging.with_name(staging.name + ".old")
    try:
        if target.exists():
            target.rename(retired)
        staging.rename(target)
    except OSError as error:
        if retired.exists() and not target.exists():
            retired.rename(target)
        raise StorageError(
            f"cannot move the export to {target}: {error}", "check the folder and retry"
        ) from error
    shutil.rmtree(retired, ignore_errors=True)
