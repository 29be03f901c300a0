"""Tokens per second of the teacher's engine, with and without logprobs, and how long it takes to start.

    python benchmarks/teacher_throughput.py --model DIRECTORY --batch 32 64 --threads 1

Prints one line per batch size: wall and CPU time are taken over the same requests, decoded to a fixed length.
Rounds with and without logprobs alternate, so that a noisy machine treats both alike.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.engine import TeacherEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lists", action="store_true", help="read vLLM's flat lists instead of arrays")
    options = parser.parse_args()
    config = TeachConfig(
        model=options.model,
        prompts=Path("unused"),
        stream="benchmark",
        license="unused",
        top_k=options.top_k,
        threads=options.threads,
        max_batch=max(options.batch),
        max_model_len=512,
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    engine = TeacherEngine(config, arrays=not options.lists)
    print(f"start {time.perf_counter() - started:.1f} s, {time.process_time() - cpu_started:.1f} CPU-s")
    rng = np.random.default_rng(0)
    for logprobs in (None, options.top_k):
        generate(engine, rng, batch=4, tokens=2, logprobs=logprobs)
    for batch in options.batch:
        measure(engine, rng, batch, options)


def measure(engine: TeacherEngine, rng: np.random.Generator, batch: int, options: Any) -> None:
    seconds = {None: [0.0, 0.0], options.top_k: [0.0, 0.0]}
    for _ in range(options.rounds):
        for logprobs in seconds:
            wall, cpu = generate(engine, rng, batch=batch, tokens=options.tokens, logprobs=logprobs)
            seconds[logprobs][0] += wall
            seconds[logprobs][1] += cpu
    tokens = batch * options.tokens * options.rounds
    plain, kept = seconds[None], seconds[options.top_k]
    print(
        f"batch {batch}: without logprobs {tokens / plain[0]:.0f} tok/s, {tokens / plain[1]:.0f} tok/CPU-s; "
        f"k={options.top_k}: {tokens / kept[0]:.0f} tok/s, {tokens / kept[1]:.0f} tok/CPU-s; "
        f"CPU ratio {kept[1] / plain[1]:.3f}",
        flush=True,
    )


def generate(
    engine: TeacherEngine, rng: np.random.Generator, *, batch: int, tokens: int, logprobs: int | None
) -> tuple[float, float]:
    """Wall and CPU seconds for `batch` sequences of `tokens`, prefill of 16 tokens included."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # The engine underneath, since the teacher itself never generates without logprobs.
    llm_engine = engine._engine
    parameters = SamplingParams(
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    for number in range(batch):
        prompt = rng.integers(5, engine.vocab_size, 16).tolist()
        llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters.clone())
    while engine.unfinished:
        if logprobs is None:
            llm_engine.step()
        else:
            engine.step()
    return time.perf_counter() - started, time.process_time() - cpu_started


if __name__ == "__main__":
    main()
