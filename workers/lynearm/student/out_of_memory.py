"""Says of memory that ran out which settings need less of it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch

from lynearm.student.config import TrainConfig
from lynearm.wire.errors import TrainingError

Part: TypeAlias = Literal["loading", "training", "measuring", "saving"]
"""What a run was at."""


@contextmanager
def explain_out_of_memory(config: TrainConfig, part: Part) -> Generator[None]:
    """Within the block, memory that runs out becomes an error that says what to set.

    Args:
        config: Of the run.
        part: What the block does.

    Raises:
        TrainingError: if memory, of the machine or of a GPU, could not be had.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"out of memory while {part} ({first_line})", _remedy(config, part)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or numpy says that memory could not be had."""
    # On a CPU torch raises a plain RuntimeError, which only its text tells from others.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _remedy(config: TrainConfig, part: Part) -> str:
    fewer_tokens = f"micro_batch_tokens below {config.micro_batch_tokens}"
    if part == "loading":
        return "its weights take 4 bytes a parameter: take a smaller student, or a device with more memory"
    if part == "measuring":
        return f"resume with {fewer_tokens}"
    if part == "saving":
        return "resume with async_checkpoints=false, which needs no copy of weights and optimizer state"
    ways = [
        fewer_tokens,
        *([] if config.gradient_checkpointing else ["--gradient-checkpointing"]),
        *([] if config.sharding == "full" else ["--sharding full on several devices"]),
    ]
    # A resumed run has to keep to what decides on its batches and on what is trained.
    return (
        f"resume with {', or '.join(ways)}; or begin anew with max_sequence_tokens below "
        f"{config.max_sequence_tokens}, or a part of the student trained (--freeze, --lora)"
    )
