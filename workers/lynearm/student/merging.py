"""Adds an adapter to its base: a plain checkpoint that needs neither the base nor peft."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from lynearm.student.adapters import find_base, load_adapter
from lynearm.student.card import write_card
from lynearm.student.checkpoint import save_model
from lynearm.student.evaluation import HELD_OUT_PATTERN
from lynearm.student.lineage import read_lineage, write_lineage
from lynearm.student.model import load_causal_lm
from lynearm.student.run_directory import is_adapter, resolve_checkpoint
from lynearm.wire.errors import CheckpointError


def merge_student(directory: Path, out: Path) -> Path:
    """Write a plain checkpoint out of an adapter and its base.

    Args:
        directory: An adapter, or a run that trained one: its newest is taken.
        out: Must not exist, or be empty.

    Returns:
        The adapter that was merged.

    Raises:
        CheckpointError: if it is no adapter, cannot be loaded with its base, or `out` is in use.
        MissingDependencyError: if peft is not installed.
    """
    found = resolve_checkpoint(directory)
    if not is_adapter(found):
        raise CheckpointError(f"{found} is no adapter", "use it as it is: there is nothing to merge")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is in use", "name a new directory for the merged student")
    base = find_base(found)
    model = load_adapter(load_causal_lm(base), found, base=base).merge()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        unfinished.chmod(0o755)  # mkdtemp makes it private; a model is not
        try:
            save_model(model, unfinished, tokenizer_from=found)
            lineage = read_lineage(found)
            lineage["adapter"] = {**lineage.get("adapter", {}), "merged": True}
            write_lineage(unfinished, lineage)
            write_card(unfinished, lineage)
            # Exports are calibrated on them.
            for path in found.glob(HELD_OUT_PATTERN):
                shutil.copyfile(path, unfinished / path.name)
            os.replace(unfinished, out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error}", "make room") from error
    return found
