"""Short runs of the tiny student, and what its weights are before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from models.service_process import ServiceProcess

from lynearm.student.config import TrainConfig
from lynearm.student.model import load_student

Configure = Callable[..., TrainConfig]
"""A configuration by the name of its directory, and other fields."""


def short_run(
    service: ServiceProcess, student_dir: Path, streams: Sequence[str], out: Path, /, **overrides: object
) -> TrainConfig:
    """A run of few steps on a CPU that measures and saves at its end only, but for what is said."""
    config = TrainConfig(
        student=student_dir,
        streams=tuple(streams),
        service=service.target,
        out=out,
        learning_rate=3e-3,
        warmup_steps=2,
        batch_sequences=4,
        held_out_traces=8,
        eval_every_steps=0,
        checkpoint_every_steps=0,
        device="cpu",
        threads=1,
    )
    return replace(config, **overrides)  # type: ignore[arg-type]  # fields by name


def configure_runs(service: ServiceProcess, student_dir: Path, stream: str, directory: Path) -> Configure:
    """A function that makes configurations of runs on one stream."""

    def make(out: str = "run", **overrides: object) -> TrainConfig:
        return short_run(
            service, student_dir, (stream,), directory / out, **({"held_out_traces": 4} | overrides)
        )

    return make


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint's model, by name."""
    return dict(load_student(directory, device="cpu").model.state_dict())


def digests(directory: Path) -> dict[str, tuple[str, int]]:
    """Contents and time of change of every file in a directory."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(directory.iterdir())
    }
