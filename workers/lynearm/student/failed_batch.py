"""The traces of a batch that could not be trained on, as a file for who looks for the cause. Loads no torch.

    OUT/failed-step-00000012.json

One JSON object: the step, what went wrong, and the batch's traces in their order, each with the name of its
stream, its prompt id, sample, tags, and numbers of tokens; no text. The next try of the step replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lynearm.student.run_directory import step_name
from lynearm.wire.errors import CheckpointError
from lynearm.wire.traces import Trace


def failed_batch_path(out: Path, step: int) -> Path:
    """Where the batch of a step is written."""
    return out / f"failed-{step_name(step)}.json"


def write_failed_batch(path: Path, traces: Sequence[tuple[str, Trace]], *, step: int, reason: str) -> None:
    """Write the traces of a batch.

    Args:
        path: From `failed_batch_path`.
        traces: Each with the name of its stream.
        step: That could not be made.
        reason: What went wrong.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    listed = [
        {
            "stream": stream,
            "prompt_id": trace.prompt_id,
            "sample_index": trace.sample_index,
            "prompt_tokens": len(trace.prompt_token_ids),
            "completion_tokens": len(trace.completion_token_ids),
            "finish_reason": trace.finish_reason,
            "tags": dict(trace.tags),
        }
        for stream, trace in traces
    ]
    text = json.dumps({"step": step, "reason": reason, "traces": listed}, indent=1, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}", "make room, and resume") from error
