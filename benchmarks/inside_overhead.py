"""What a look inside costs a teacher: CPU-seconds a token with and without it, in turns of one run.

    python benchmarks/inside_overhead.py MODEL_DIR [--batch 64] [--tokens 8] [--rounds 4]

One engine generates the same completions again and again: plain, with the hidden states of three layers as
bf16 and as fp8, and with all layers measured in every step and in one of eight. What counts is the least CPU
time of each over the rounds: what else a machine does only adds to it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.inside_options import HiddenCapture, LayerStats, parse_capture

_PROMPT_TOKENS = 32


def main() -> None:
    """Measure, print a table, and end with JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="directory in the transformers layout")
    parser.add_argument("--batch", type=int, default=64, help="completions at once")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each completion")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", default="4,-1,norm", help="layers to capture")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    config = TeachConfig(
        model=options.model,
        prompts=Path("none"),
        stream="none",
        license="unknown",
        max_batch=options.batch,
        max_tokens=options.tokens,
        max_model_len=_PROMPT_TOKENS + options.tokens + 8,
        threads=options.threads,
        # As every look asks for it: then the turns differ in nothing else.
        stats="layers",
    )
    engine = TeacherEngine(config)
    capture = parse_capture(f"hidden:layers={options.layers}")
    if capture is None:
        raise SystemExit("name layers")
    looks: dict[str, tuple[HiddenCapture | None, LayerStats | None]] = {
        "plain": (None, None),
        "bf16": (capture, None),
        "fp8": (replace(capture, dtype="fp8"), None),
        "stats_every_step": (None, LayerStats(1)),
        "stats_one_in_8": (None, LayerStats(8)),
    }
    generate(engine, options.batch, options.tokens)  # the first one compiles and allocates
    seconds: dict[str, list[float]] = {name: [] for name in looks}
    for _ in range(options.rounds):
        for name, (states, stats) in looks.items():
            engine.look_inside(states, stats)
            seconds[name].append(generate(engine, options.batch, options.tokens))
    figures: dict[str, float] = {}
    for name, each in seconds.items():
        milliseconds = 1e3 * min(each)
        overhead = min(each) / min(seconds["plain"]) - 1
        print(f"{name:18s} {milliseconds:8.3f} CPU-ms a token   {overhead:+7.1%}")
        figures[f"{name}_cpu_ms_per_token"] = round(milliseconds, 4)
        if name != "plain":
            figures[f"{name}_overhead"] = round(overhead, 4)
    print(json.dumps(figures))


def generate(engine: TeacherEngine, batch: int, tokens: int) -> float:
    """CPU-seconds a token of one batch."""
    prompts = np.random.default_rng(0).integers(5, engine.vocab_size, (batch, _PROMPT_TOKENS))
    generated = 0
    started = time.process_time()
    for number, prompt in enumerate(prompts.tolist()):
        sampling = engine.sampling(str(number), 0, len(prompt))
        engine.add(str(number), prompt, replace(sampling, max_tokens=tokens))
    while engine.unfinished:
        generated += sum(completion.token_ids.size for completion in engine.step())
    return (time.process_time() - started) / generated


if __name__ == "__main__":
    main()
