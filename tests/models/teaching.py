"""Settings of a tiny teacher, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lynearm.teacher.config import TeachConfig


def teach_config(model: Path, **overrides: Any) -> TeachConfig:
    values: dict[str, Any] = {
        "model": str(model),
        "prompts": Path("prompts.jsonl"),
        "stream": "lessons",
        "license": "Apache-2.0",
        "top_k": 16,
        "max_tokens": 24,
        "max_model_len": 128,
        "max_batch": 40,
        "threads": 1,
        "completions": 2,
        "flush_seconds": 0.2,
    }
    return TeachConfig(**(values | overrides))
