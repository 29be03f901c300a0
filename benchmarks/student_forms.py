"""What a training step costs in each form of training: everything, checkpointed, frozen, as an adapter.

    python benchmarks/student_forms.py MODEL_DIR [--tokens 256] [--rank 16]

Two optimizer steps of one trace each, prompt of 8 tokens and completion of `--tokens`, k = 8, float32 on the
CPU, in a process of its own for each form. Memory is the peak of the process's resident memory over what it
had with the model loaded: gradients, AdamW's moments and what is kept for the backward pass. CPU time is that
of the second step. Linux only. SmolLM2-135M takes about four minutes on two free cores.

The last line is JSON: `peak_mib` and `cpu_seconds` by form, and `trained`, parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lynearm.wire.traces import Trace

PROMPT_TOKENS, TOP_K = 8, 8
KIB_IN_MIB = 1024

FORMS: Mapping[str, Mapping[str, object]] = {
    "everything": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "frozen embeddings": {"freeze": ("embeddings", "head")},
    "frozen embeddings and lower half": {"freeze": ("embeddings", "head", "layers.0-HALF")},
    "lora": {"lora": "r=RANK"},
    "lora, gradient checkpointing": {"lora": "r=RANK", "gradient_checkpointing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a llama-like model in the transformers layout")
    parser.add_argument("--tokens", type=int, default=256, help="completion tokens of a step")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--form", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(work(options.model, options.form, tokens=options.tokens, rank=options.rank)))
        return
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    print(f"{'':34}{'peak MiB':>10}{'CPU-s a step':>14}{'trained':>14}")
    figures: dict[str, dict[str, float]] = {"peak_mib": {}, "cpu_seconds": {}, "trained": {}}
    for form in FORMS:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--form", form], check=True, stdout=subprocess.PIPE, text=True
        )
        cost = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{form:34}{cost['peak_mib']:10.0f}{cost['cpu_seconds']:14.2f}{cost['trained']:14,}", flush=True
        )
        for name, figure in cost.items():
            figures[name][form] = figure
    print(json.dumps(figures))


def work(model: Path, form: str, *, tokens: int, rank: int) -> dict[str, float]:
    """Peak memory and CPU time of one form, in this process."""
    import torch

    from lynearm.student.batches import Batch
    from lynearm.student.config import TrainConfig
    from lynearm.student.freezing import freeze
    from lynearm.student.lora_settings import parse_lora
    from lynearm.student.model import load_student
    from lynearm.student.optimization import Optimization

    torch.set_num_threads(1)
    half = json.loads((model / "config.json").read_text())["num_hidden_layers"] // 2 - 1
    settings = json.loads(json.dumps(FORMS[form]).replace("HALF", str(half)).replace("RANK", str(rank)))
    lora = parse_lora(settings["lora"]) if "lora" in settings else None
    student = load_student(model, device="cpu", lora=lora)
    freeze(student, settings.get("freeze", ()))
    if settings.get("gradient_checkpointing"):
        student.checkpoint_gradients()
    student.train(True)
    config = TrainConfig(
        student=model, packing="off", micro_batch_tokens=tokens + 8, max_sequence_tokens=tokens + 8
    )
    optimization = Optimization(student, config)
    batch = Batch((make_trace(tokens, student.vocab_size),))
    baseline = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    optimization.step(batch, 1)
    begun = time.process_time()
    optimization.step(batch, 2)
    cpu_seconds = time.process_time() - begun
    return {
        "peak_mib": (read_status("VmHWM") - baseline) / KIB_IN_MIB,
        "cpu_seconds": cpu_seconds,
        "trained": sum(parameter.numel() for parameter in student.trainable_parameters().values()),
    }


def read_status(name: str) -> int:
    """A size of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def make_trace(tokens: int, vocab_size: int) -> Trace:
    """A trace of random tokens under a random teacher."""
    import numpy as np

    from lynearm.wire.traces import TopK, Trace

    random = np.random.default_rng(0)
    kept_ids = np.stack([random.choice(vocab_size, TOP_K, replace=False) for _ in range(tokens)])
    kept = np.log(np.sort(random.dirichlet(np.ones(TOP_K), tokens) * 0.9, 1)[:, ::-1])
    return Trace(
        prompt_id="p",
        prompt_token_ids=random.integers(0, vocab_size, PROMPT_TOKENS).astype(np.int32),
        completion_token_ids=random.integers(0, vocab_size, tokens).astype(np.int32),
        sampled_logprobs=np.full(tokens, -1.0, np.float32),
        top_k=TopK(kept_ids.astype(np.int32), kept.astype(np.float32), np.full(tokens, 0.1, np.float32)),
        finish_reason="length",
    )


if __name__ == "__main__":
    main()
