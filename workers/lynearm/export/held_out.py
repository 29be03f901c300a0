"""Held-out traces that a trainer left in its checkpoint: what exports are calibrated on and compared with."""

from __future__ import annotations

from pathlib import Path

from lynearm.export.parity import HeldOutSequence
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import CheckpointError, CodecError, InvalidInputError

HELD_OUT_FILE = "held_out.block"
LATEST_FILE = "LATEST"


def find_checkpoint(directory: Path) -> Path:
    """The directory itself or, for the output of a training run, the newest checkpoint in it.

    Raises:
        CheckpointError: if its LATEST names a checkpoint that is not there.
    """
    latest = directory / LATEST_FILE
    if not latest.is_file():
        return directory
    name = latest.read_text(encoding="utf-8").strip()
    checkpoint = directory / name
    if Path(name).name != name or not checkpoint.is_dir():
        raise CheckpointError(f"{latest} names {name!r}, which is not there", "name a checkpoint directory")
    return checkpoint


def read_held_out(checkpoint: Path) -> list[HeldOutSequence]:
    """Sequences of the checkpoint's held-out traces; empty where it holds none.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = checkpoint / HELD_OUT_FILE
    if not path.is_file():
        return []
    try:
        traces = decode_block(path.read_bytes())
    except (CodecError, InvalidInputError) as error:
        raise CheckpointError(f"{path}: {error}", "delete the file to compare on built-in prompts") from error
    return [
        HeldOutSequence(
            (*trace.prompt_token_ids.tolist(), *trace.completion_token_ids.tolist()),
            trace.prompt_token_ids.size,
        )
        for trace in traces
        if trace.prompt_token_ids.size and trace.completion_token_ids.size
    ]
