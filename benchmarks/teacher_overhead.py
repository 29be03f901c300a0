"""What it costs a teacher to record its distributions and publish them, beside plain generation in vLLM.

    python benchmarks/teacher_overhead.py [--quick] [--only MODEL] [--device auto|cpu|cuda] [--tail-draws N]

Takes about ten minutes on two cores. --quick takes one, with the tiny model alone and no server, and shows
that it runs and no more. With --tail-draws the worker's rows have N draws from their tails: compare with one
without. Linux only. SmolLM2-135M comes from the package of the demo.

Each engine runs in a process of its own, with one CPU thread, and answers the same prompts with the same
seeds in every way, so that all generate the same tokens. The ways of a process take turns, in rounds of a few
seconds, and the median of the rounds counts: on a machine with other work a round says little, and several
say more. On a CPU overhead is counted in CPU-seconds per token, of all threads and processes of the engine;
on a GPU (`--device auto` finds one) in seconds. The trace service and clients stand beside, in
CPU-microseconds per token.

- worker: all of `TeacherWorker`: capture, encoding on its thread, publishing over a socket until all is
  durable.
- vLLM's flat lists, vLLM's dictionaries: what `LLMEngine` returns with `logprobs=k`, once without and once
  with the text of each candidate, as it does unless told otherwise; nothing is encoded or sent.
- vLLM's server: its OpenAI chat completions with `top_logprobs=k`, against the same server without logprobs.

The last line is JSON. MODEL is `smollm2` or `tiny` (two layers of random weights, 384 tokens: what remains
when the model costs next to nothing), bB the batch, kK the entries kept:

- `MODEL_bB_kK_overhead`: of the worker, as a fraction.
- `MODEL_bB_kK_{flat_lists,dictionaries,server}_overhead`: of the others.
- `MODEL_bB_kK_service_us`, `_bytes_per_token`: the trace service's CPU time per token, and what it stored.
- `MODEL_bB_kK_server_client_us`, `_server_bytes_per_token`: of a client that reads the server's JSON.
- `MODEL_bB_plain_us`: of plain generation.
- `max_abs_logprob_error`: of captured logprobs, against transformers in float32, over both models.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import teacher_overhead_engines as engines
import teacher_overhead_server as servers
from teacher_overhead_turns import Cell, Clock, Comparison
from transport_processes import ServerProcess, Worker

from lynearm.demo.smollm2 import default_cache_dir, prepare_smollm2
from lynearm.teacher import Prompt
from lynearm.traces.config import ServeConfig

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"smollm2_b64_k64_overhead": 0.06, "max_abs_logprob_error": 1e-3}

_SHORT_NAMES = {
    "worker": "",
    "vLLM's flat lists": "flat_lists_",
    "vLLM's dictionaries": "dictionaries_",
    "vLLM's server": "server_",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured with one model."""

    name: str
    tokens: int
    """Longest completion, tokens."""
    worker: tuple[Cell, ...]
    lists: tuple[Cell, ...]
    server: tuple[Cell, ...] = ()


WHOLE = (
    Plan(
        "smollm2",
        tokens=24,
        worker=(
            Cell(64, 64, 12),
            Cell(64, 0, 4),
            Cell(64, 16, 4),
            Cell(64, 256, 4),
            Cell(16, 64, 6),
            Cell(1, 64, 6),
        ),
        lists=(Cell(64, 20, 3), Cell(64, 64, 3)),
        server=(Cell(64, 20, 6), Cell(64, 64, 6)),
    ),
    Plan("tiny", tokens=96, worker=(Cell(64, 64, 12), Cell(1, 64, 6)), lists=(Cell(64, 64, 6),)),
)
QUICK = (Plan("tiny", tokens=16, worker=(Cell(8, 16, 1),), lists=(Cell(8, 16, 1),)),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=["smollm2", "tiny"], help="leave the other model out")
    parser.add_argument("--quick", action="store_true", help="little, once")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where it computes")
    parser.add_argument("--tail-draws", type=int, default=0, help="of each row of the worker's")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    clock = choose_clock(options.device)
    print(
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; counted in {clock} time", flush=True
    )
    figures: dict[str, float] = {}
    errors: list[float] = []
    with tempfile.TemporaryDirectory(prefix="lynearm-overhead-") as directory:
        for plan in QUICK if options.quick else WHOLE:
            if options.only not in (None, plan.name):
                continue
            comparisons, error = measure(plan, Path(directory), clock, options.tail_draws)
            print_rows(plan.name, comparisons)
            figures |= name_figures(plan.name, comparisons)
            errors.append(error)
    figures["max_abs_logprob_error"] = max(errors)
    print(f"load average {os.getloadavg()[0]:.1f}")
    for name, goal in GOALS.items():
        if name in figures:
            print(f"{name:34}{figures[name]:10.4f}   goal <= {goal}")
    print(json.dumps({name: float(f"{figure:.4g}") for name, figure in figures.items()}))


def choose_clock(device: str) -> Clock:
    """The clock of the device that vLLM will use; hides GPUs from it where the CPU is wanted."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "wall"
    if device == "cuda":
        sys.exit("no CUDA device: use --device cpu")
    return "cpu"


def measure(plan: Plan, directory: Path, clock: Clock, tail_draws: int) -> tuple[list[Comparison], float]:
    """All comparisons of a plan, and the largest error of a logprob."""
    model = find_model(plan.name, directory)
    prompts = load_prompts()
    with ServerProcess(ServeConfig(data_dir=directory / f"{plan.name}-traces", port=0)) as service:
        task = engines.Task(
            model,
            prompts,
            plan.tokens,
            plan.worker,
            plan.lists,
            service.address,
            service.process_id,
            clock,
            tail_draws,
        )
        with Worker() as worker:
            comparisons, error = worker.run(engines.measure_engine, task).result
    if plan.server:
        with Worker() as worker:
            server_task = servers.ServerTask(model, prompts, plan.tokens, plan.server, clock)
            comparisons += worker.run(servers.measure_server, server_task).result
    return comparisons, error


def find_model(name: str, directory: Path) -> Path:
    """A directory with the model, made if need be."""
    if name == "smollm2":
        return prepare_smollm2(default_cache_dir())
    sys.path.insert(0, str(ROOT / "tests"))
    from models.tiny_llama import build_tiny_llama

    return build_tiny_llama(directory / name)


def load_prompts() -> tuple[Prompt, ...]:
    """The demo's."""
    lines = (ROOT / "clients" / "lynearm" / "demo" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Prompt(line["id"], line["prompt"]) for line in map(json.loads, lines))


def print_rows(model: str, comparisons: Sequence[Comparison]) -> None:
    """A table of them."""
    print(
        f"{model:10}{'batch':>6}{'k':>5}  {'':22}{'plain us/token':>15}{'overhead':>10}"
        f"{'beside us':>11}{'bytes/token':>13}"
    )
    for row in comparisons:
        costs = f"{1e6 * row.plain_seconds_per_token:15.0f}{100 * row.overhead:9.1f}%"
        beside = f"{1e6 * row.beside_seconds_per_token:11.1f}{row.bytes_per_token:13.0f}"
        setting = f"{'':10}{row.cell.batch:6}{row.cell.top_k:5}  {row.way:22}"
        print(f"{setting}{costs}{beside}", flush=True)


def name_figures(model: str, comparisons: Sequence[Comparison]) -> dict[str, float]:
    """The figures of a model, as the module says."""
    figures: dict[str, float] = {}
    for row in comparisons:
        name = f"{model}_b{row.cell.batch}_k{row.cell.top_k}_{_SHORT_NAMES[row.way]}"
        figures[f"{name}overhead"] = row.overhead
        if row.way == "worker":
            plain = f"{model}_b{row.cell.batch}_plain_us"
            figures[plain] = min(figures.get(plain, math.inf), 1e6 * row.plain_seconds_per_token)
            figures[f"{name}service_us"] = 1e6 * row.beside_seconds_per_token
            figures[f"{name}bytes_per_token"] = row.bytes_per_token
        if row.way == "vLLM's server":
            figures[f"{name}client_us"] = 1e6 * row.beside_seconds_per_token
            figures[f"{name}bytes_per_token"] = row.bytes_per_token
    return figures


if __name__ == "__main__":
    main()
