"""Which checkpoints a run's directory holds: the newest, the best, and those that stay. Loads no torch.

    OUT/LATEST    name of the newest checkpoint
    OUT/BEST      name of the one with the lowest held-out KL, among those that were measured
    OUT/step-*    checkpoints, each complete

Invariant: a pointer is replaced only after the checkpoint that it names is in place, and a checkpoint that a
pointer names is not removed.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from lynearm.student.progress import EvaluationRecord
from lynearm.wire.errors import CheckpointError

LATEST_FILE = "LATEST"
BEST_FILE = "BEST"
UNFINISHED_PREFIX = ".unfinished-"
EARLIER_CHECKPOINT = f"write the name of an earlier step-* directory into {LATEST_FILE}, and resume"
"""What to do about a checkpoint that cannot be read."""

ADAPTER_CONFIG_FILE = "adapter_config.json"

_STEP_NAME = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Name of a checkpoint's directory."""
    return f"step-{step:08d}"


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of a run; None if there is none.

    Raises:
        CheckpointError: if LATEST names a directory that is not there.
    """
    return _follow(out / LATEST_FILE)


def best_checkpoint(out: Path) -> Path | None:
    """The checkpoint of a run with the lowest held-out KL; None if none was measured.

    Raises:
        CheckpointError: if BEST names a directory that is not there.
    """
    return _follow(out / BEST_FILE)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter without the model that it changes."""
    return (directory / ADAPTER_CONFIG_FILE).is_file() and not (directory / "config.json").is_file()


def find_adapter(directory: Path) -> Path | None:
    """The adapter that a directory is, or that the run in it saved last; None where that is no adapter.

    Raises:
        CheckpointError: if LATEST names a directory that is not there.
    """
    found = directory if is_adapter(directory) else latest_checkpoint(directory)
    return found if found is not None and is_adapter(found) else None


def resolve_checkpoint(directory: Path) -> Path:
    """The directory itself where it is a model or an adapter, else the newest checkpoint of a run.

    Raises:
        CheckpointError: if it is neither.
    """
    if (directory / "config.json").is_file() or is_adapter(directory):
        return directory
    found = latest_checkpoint(directory)
    if found is None:
        raise CheckpointError(
            f"{directory} is neither a checkpoint nor a run: it has no config.json and no {LATEST_FILE}",
            "name a directory that lynearm train or lynearm student cut wrote",
        )
    return found


def point_to_latest(out: Path, name: str) -> None:
    """Make a checkpoint that is in place the latest."""
    _write_pointer(out / LATEST_FILE, name)


def point_to_best(out: Path, evaluations: Sequence[EvaluationRecord]) -> None:
    """Make the measured checkpoint with the lowest held-out KL the best; the earlier one of equals.

    Args:
        out: Directory of the run.
        evaluations: Of the whole run.
    """
    measured = [
        (record.kl, record.step)
        for record in evaluations
        if math.isfinite(record.kl) and (out / step_name(record.step)).is_dir()
    ]
    if measured:
        name = step_name(min(measured)[1])
        if not (out / BEST_FILE).is_file() or (out / BEST_FILE).read_text(encoding="utf-8").strip() != name:
            _write_pointer(out / BEST_FILE, name)


def remove_old(out: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best, and what killed runs left unfinished.

    Those after the latest stay: a run that was led back to an earlier one replaces them as it comes by.
    """
    best, latest = _read_pointer(out / BEST_FILE), _read_pointer(out / LATEST_FILE)
    found = [path for path in out.iterdir() if _STEP_NAME.fullmatch(path.name) and path.is_dir()]
    steps = sorted(path for path in found if _number(path.name) <= _number(latest))
    # A run that was killed leaves what it was writing; one run writes here, one checkpoint at a time.
    old = [path for path in steps[:-keep] if path.name != best]
    for path in (*old, *out.glob(f"{UNFINISHED_PREFIX}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _number(name: str) -> float:
    """Step of a checkpoint's name; infinite for what is none."""
    found = _STEP_NAME.fullmatch(name)
    return int(found[1]) if found else math.inf


def _read_pointer(pointer: Path) -> str:
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""


def sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _follow(pointer: Path) -> Path | None:
    if not pointer.is_file():
        return None
    name, out = pointer.read_text(encoding="utf-8").strip(), pointer.parent
    if _STEP_NAME.fullmatch(name) is None or not (out / name).is_dir():
        raise CheckpointError(
            f"{pointer} names {name!r}, which is not a checkpoint in {out}",
            "write the name of a step-* directory into it",
        )
    return out / name


def _write_pointer(pointer: Path, name: str) -> None:
    unfinished = pointer.with_name(f"{UNFINISHED_PREFIX}{pointer.name}")
    unfinished.write_text(name + "\n", encoding="utf-8")
    sync(unfinished)
    os.replace(unfinished, pointer)
    sync(pointer.parent)
