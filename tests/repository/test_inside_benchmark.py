"""The benchmark of what a look inside costs runs on a tiny model, and says what its readers parse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models.tiny_llama import build_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
LOOKS = ("bf16", "fp8", "stats_every_step", "stats_one_in_8")


@pytest.mark.slow
def test_inside_overhead_benchmark_ends_with_its_figures_as_json(tmp_path: Path) -> None:
    model = build_tiny_llama(tmp_path / "tiny")
    arguments = ("--batch", "4", "--tokens", "3", "--rounds", "1", "--layers", "0,-1,norm")
    output = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "inside_overhead.py"), str(model), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    ).stdout
    figures = json.loads(output.splitlines()[-1])
    costs = {f"{name}_cpu_ms_per_token" for name in ("plain", *LOOKS)}
    assert set(figures) == costs | {f"{name}_overhead" for name in LOOKS}
    assert all(figures[name] > 0 for name in costs)
