"""How weights travel from a trainer to the engine beside it: as a checkpoint that is written for one reader.

    DIRECTORY/step-00000012/
        model.safetensors                       the weights
        config.json, tokenizer.json, …          what else an engine needs to load them
        probe.npz                               what they compute (`probe`)

Invariants: a directory named `step-*` is complete, since it is written under another name and renamed. The
writer keeps what the reader has, or is about to load, and nothing else. Nothing is synced: after a crash of
the machine, the trainer writes its weights anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lynearm.rollouts.probe import Probe, load_probe, save_probe
from lynearm.wire.errors import CheckpointError

PROBE_FILE = "probe.npz"
_UNFINISHED_PREFIX = ".unfinished-"


@dataclass(frozen=True, slots=True, eq=False)
class HandedWeights:
    """What a trainer hands over."""

    step: int
    save: Callable[[Path], None]
    """Writes the model, its configuration and its tokenizer into a directory that exists."""
    probe: Probe


def handover_name(step: int) -> str:
    """Name of the directory of a step's weights."""
    return f"step-{step:08d}"


def write_handover(directory: Path, weights: HandedWeights) -> Path:
    """Write weights where the reader finds them whole, or not at all.

    Raises:
        CheckpointError: if that fails, as on a full disk; nothing is left of it then.
    """
    final = directory / handover_name(weights.step)
    unfinished = directory / f"{_UNFINISHED_PREFIX}{final.name}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        weights.save(unfinished)
        save_probe(unfinished / PROBE_FILE, weights.probe)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(unfinished, final)
    except Exception as error:
        # safetensors and transformers raise classes of their own for a full disk.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"weights of step {weights.step} cannot be handed over in {directory}: {error}",
            "make room, or name another place with --set rollout_weights=DIR",
        ) from error
    return final


def keep_only(directory: Path, *steps: int) -> None:
    """Remove all weights but those of these steps, and what was left unfinished."""
    kept = {handover_name(step) for step in steps}
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name not in kept and (path.name.startswith(("step-", _UNFINISHED_PREFIX))):
                shutil.rmtree(path, ignore_errors=True)


def read_probe(directory: Path) -> Probe:
    """The probe beside weights.

    Raises:
        CheckpointError: if it is not there, or damaged.
    """
    return load_probe(directory / PROBE_FILE)
