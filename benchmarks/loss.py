"""What a distillation loss costs beside plain cross-entropy: memory and CPU time of forward and backward.

    python benchmarks/loss.py [--quick]

From float32 hidden states 576 wide and a float32 output head, k = 64, at 1,024 positions × 49,152 tokens
and 512 × 151,936. Plain cross-entropy is `F.cross_entropy(hidden @ head.T, labels).backward()`. Every way
has a process of its own for each shape; a round goes once through all of them, one after the other. Memory
is the peak of the process's resident memory in its first step over what it had before. CPU time is user and
system time of a step by the process's own clock, the least of all rounds, since other work on the machine
only adds to it. Takes about seven CPU-minutes; --quick takes half of one, with small shapes and forward KL
alone, and shows that it runs and no more. Linux only.

There are two cells for each shape, each with a cross-entropy of its own kind to compare with:

- A step's first micro-batch: there is no gradient yet, and the way hands one over. That of the head alone is
  108 and 334 MiB, 0.18 and 0.37 of plain cross-entropy's peak: whatever hands it over in float32 cannot be
  below that, and the goal of 0.35 is out of reach at 151,936 tokens.
- A later one, "accumulating": the head's gradient is there already, and is part of what the process had
  before, in either way. Autograd makes another one and adds it; `backpropagate_loss`, as the trainer uses
  it, adds each chunk's part to what is there.

The last line is JSON, about forward KL:

- `memory_vs_ce_49k`, `memory_vs_ce_152k`: its peak over plain cross-entropy's, in a first micro-batch.
- `time_vs_ce_49k`, `time_vs_ce_152k`: its CPU-seconds over plain cross-entropy's, likewise.
- `memory_vs_ce_49k_accumulating` and so on: the same in a later one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

WIDTH, TOP_K = 576, 64
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    positions: int
    vocab_size: int


WHOLE = (Shape("49k", 1024, 49_152), Shape("152k", 512, 151_936))
QUICK = (Shape("49k", 256, 6144), Shape("152k", 128, 18_992))

ACCUMULATING = ", accumulating"
PLAIN, OURS = "cross-entropy, plain", "forward-kl"
PLAIN_ACCUMULATING, OURS_ACCUMULATING = PLAIN + ACCUMULATING, OURS + ACCUMULATING
OTHERS = (
    "forward-kl:0.9 cross-entropy:0.1",
    "reverse-kl",
    "jsd@0.5",
    "skew-kl@0.1",
    "skew-reverse-kl@0.1",
    "sampled-kd",
    "cross-entropy",
    "forward-kl T=2",
    "forward-kl bf16",
)
GOALS = {
    "memory_vs_ce_49k": "<= 0.35",
    "memory_vs_ce_152k": "<= 0.35, below the head's gradient itself, which is 0.37",
    "time_vs_ce_49k": "<= 1.1",
    "time_vs_ce_152k": "<= 1.1",
    "memory_vs_ce_49k_accumulating": "<= 0.35",
    "memory_vs_ce_152k_accumulating": "<= 0.35",
    "time_vs_ce_49k_accumulating": "<= 1.1",
    "time_vs_ce_152k_accumulating": "<= 1.1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, one round")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], Shape("", int(options.worker[1]), int(options.worker[2])))
        return
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    figures: dict[str, float] = {}
    for shape in QUICK if options.quick else WHOLE:
        ways = [PLAIN, OURS, PLAIN_ACCUMULATING, OURS_ACCUMULATING]
        costs = measure(ways, shape, rounds=1 if options.quick else 6)
        for way in () if options.quick else OTHERS:
            # One at a time: all of them at once would need 10 GB.
            costs |= measure([way], shape, rounds=2)
        print_costs(shape, costs)
        figures |= compare(shape, costs)
    print(f"load average {os.getloadavg()[0]:.1f}")
    for name, goal in GOALS.items():
        print(f"{name:32}{figures[name]:6.2f}   goal {goal}")
    print(json.dumps({name: round(figure, 3) for name, figure in figures.items()}))


@dataclass(frozen=True, slots=True)
class Cost:
    peak_mib: float
    cpu_seconds: float


def measure(ways: list[str], shape: Shape, *, rounds: int) -> dict[str, Cost]:
    """Peak and least CPU time of each way, whose processes take turns."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", way, str(shape.positions), str(shape.vocab_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in ways
    ]
    try:
        peaks = [ask(worker) for worker in workers]
        seconds: list[list[float]] = [[] for _ in ways]
        for _ in range(rounds):
            for worker, one in zip(workers, seconds, strict=True):
                one.append(ask(worker))
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return {way: Cost(peak, min(one)) for way, peak, one in zip(ways, peaks, seconds, strict=True)}


def ask(worker: subprocess.Popen[str]) -> float:
    """Let a worker take a step; the number that it answers with."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def work(way: str, shape: Shape) -> None:
    """Take a step for each line read: the first answers its peak in MiB, the others their CPU-seconds."""
    step = make_step(way, shape)
    ctypes.CDLL(None).malloc_trim(0)
    for number, _ in enumerate(sys.stdin):
        before_mib = memory_mib("VmRSS")
        reset_peak()
        started = time.process_time()
        step()
        seconds = time.process_time() - started
        print(seconds if number else memory_mib("VmHWM") - before_mib, flush=True)


def make_step(way: str, shape: Shape) -> Callable[[], object]:
    """Inputs, made without large temporaries, whose freed memory the step would use unseen."""
    import torch
    from torch.nn import functional

    from lynearm.student.losses import Targets, backpropagate_loss, distillation_loss
    from lynearm.student.objective import Objective, parse_terms

    torch.manual_seed(0)
    hidden_NH = torch.empty(shape.positions, WIDTH).normal_().requires_grad_()
    head_VH = torch.empty(shape.vocab_size, WIDTH).normal_().mul_(0.05).requires_grad_()
    first_N1 = torch.randint(0, shape.vocab_size, (shape.positions, 1))
    token_ids_NK = (first_N1 + 61 * torch.arange(TOP_K)) % shape.vocab_size
    logprobs_NB = torch.log_softmax(3 * torch.randn(shape.positions, TOP_K + 1), 1)
    targets = Targets(
        token_ids_NK, logprobs_NB[:, :-1].contiguous(), logprobs_NB[:, -1].exp(), token_ids_NK[:, 0]
    )
    accumulating = way.endswith(ACCUMULATING)
    if accumulating:
        head_VH.grad = torch.empty_like(head_VH).fill_(0.0)
    # The library of matrix products takes memory for its threads at its first call.
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    temperature = 2.0 if "T=2" in way else 1.0
    terms = way.removesuffix(ACCUMULATING).removesuffix(" T=2").removesuffix(" bf16").split()
    objective = (
        Objective()
        if "plain" in way
        else Objective(parse_terms(terms), temperature=temperature, teacher_temperature=temperature)
    )

    def step() -> object:
        hidden_NH.grad = None
        if not accumulating:
            head_VH.grad = None
        if "plain" in way:
            logits_loss = functional.cross_entropy(hidden_NH @ head_VH.T, targets.sampled_ids_N)
            return torch.autograd.backward(logits_loss)
        if accumulating:
            return backpropagate_loss(hidden_NH, head_VH, targets, objective=objective)
        with torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bf16")):
            loss = distillation_loss(hidden_NH, head_VH, targets, objective=objective).loss
        return torch.autograd.backward(loss)

    return step


def memory_mib(field: str) -> float:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(float(line.split()[1]) for line in status if line.startswith(field)) * 1024 / MIB


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def print_costs(shape: Shape, costs: dict[str, Cost]) -> None:
    print(
        f"\n{shape.positions} × {shape.vocab_size}{'':24}{'peak MiB':>10}{'CPU-s':>8}{'memory':>9}{'time':>7}"
    )
    plain = costs[PLAIN]
    for way, cost in costs.items():
        ratios = f"{cost.peak_mib / plain.peak_mib:9.2f}{cost.cpu_seconds / plain.cpu_seconds:7.2f}"
        print(f"{way:36}{cost.peak_mib:10.0f}{cost.cpu_seconds:8.2f}{ratios}")


def compare(shape: Shape, costs: dict[str, Cost]) -> dict[str, float]:
    """The figures of one shape, as the module says."""
    figures: dict[str, float] = {}
    for suffix, ours, plain in (("", OURS, PLAIN), ("_accumulating", OURS_ACCUMULATING, PLAIN_ACCUMULATING)):
        figures[f"memory_vs_ce_{shape.name}{suffix}"] = costs[ours].peak_mib / costs[plain].peak_mib
        figures[f"time_vs_ce_{shape.name}{suffix}"] = costs[ours].cpu_seconds / costs[plain].cpu_seconds
    return figures


if __name__ == "__main__":
    main()
