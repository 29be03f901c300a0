"""What transformers computes in float32, to compare with."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lynearm.teacher.scoring import ScoreTask


@cache
def _load(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def reference_distributions(directory: Path, task: ScoreTask) -> npt.NDArray[np.float64]:
    """Logprobs over the whole vocabulary at each completion position, shape [T, V]."""
    import torch

    token_ids = [*task.prompt_token_ids.tolist(), *task.completion_token_ids.tolist()]
    with torch.no_grad():
        logits = _load(directory)(torch.tensor([token_ids])).logits[0].double() / task.temperature
    rows = torch.log_softmax(logits, dim=-1)[task.prompt_token_ids.size - 1 : -1]
    return np.asarray(rows.numpy())
