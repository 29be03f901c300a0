"""Adds an adapter to its base: a plain checkpoint that needs neither the base nor peft."""

from __future__ import annotations

import shutil
from pathlib import Path

from lynearm.student.adapters import find_base, load_adapter
from lynearm.student.card import write_card
from lynearm.student.checkpoint import save_model
from lynearm.student.evaluation import HELD_OUT_PATTERN
from lynearm.student.lineage import read_lineage, write_lineage
from lynearm.student.model import load_causal_lm
from lynearm.student.new_model import new_directory, refuse_used
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
    refuse_used(out, "merged student")
    base = find_base(found)
    model = load_adapter(load_causal_lm(base), found, base=base).merge()
    with new_directory(out, "merged student") as unfinished:
        save_model(model, unfinished, tokenizer_from=found)
        lineage = read_lineage(found)
        lineage["adapter"] = {**lineage.get("adapter", {}), "merged": True}
        write_lineage(unfinished, lineage)
        write_card(unfinished, lineage)
        # Exports are calibrated on them.
        for path in found.glob(HELD_OUT_PATTERN):
            shutil.copyfile(path, unfinished / path.name)
    return found
