"""What scoring a student's completions costs: `python benchmarks/scoring.py [--quick] [--model DIR]`.

Natural text (the prompts that the demo brings) is cut into prompts of 128 and completions of 128 tokens, and
one engine, on one thread, scores them in turns in each of these ways:

    forward         vLLM reads prompt and completion, and nothing comes out: what no way can do without
    prompt_logprobs vLLM's own: `prompt_logprobs=64`, as flat lists
    dictionaries    the same as vLLM returns it by default, and as its servers send it: one object a candidate
    gather          TeacherEngine.scoring: top 64 at completion positions
    gather chosen   and the logprobs of 64 ids that the student chose per position
    service         TeacherClient over a socket: both ends, top 64
    service chosen  and 64 chosen ids

CPU seconds are those of this process, all threads, over completion tokens; what differs between turns of the
same way is noise. Four completions of each prompt are scored too, where `gather` finds prompts in the prefix
cache. The last line is JSON: CPU microseconds above `forward` and bytes, each per completion token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np

from lynearm.client import ScoreSettings, StudentCompletion, TeacherClient
from lynearm.demo.smollm2 import default_cache_dir, prepare_smollm2
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.scoring import EngineScoring, ScoreTask
from lynearm.teacher.serving_config import ServeTeacherConfig
from lynearm.teacher.teacher_server import TeacherServer
from lynearm.v1 import teacher_service_pb2 as pb
from lynearm.wire.scoring import completion_to_proto, settings_to_proto
from lynearm.wire.traces import Int32Array

Untyped: TypeAlias = Any
"""An object of vLLM or grpc, which ship no types that a strict checker accepts."""

TOP_K = 64
CHOSEN = 64

Way: TypeAlias = Callable[[Sequence[ScoreTask]], None]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is scored."""

    prompt_tokens: int = 128
    completion_tokens: int = 128
    completions: int = 16
    """In a turn."""
    rounds: int = 2


QUICK = Scale(prompt_tokens=40, completion_tokens=20, completions=8, rounds=2)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a small run that shows nothing but that it runs"
    )
    parser.add_argument("--model", type=Path, help="another model than SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else Scale()
    os.environ["OMP_NUM_THREADS"] = "1"
    model = arguments.model or prepare_smollm2(default_cache_dir())
    config = ServeTeacherConfig(
        str(model), bind="127.0.0.1:0", top_k=TOP_K, max_model_len=512, max_batch=64, threads=1
    )
    engine = TeacherEngine(config.engine_config())
    texts = text_ids(Path(model))
    figures = measure(engine, config, texts, scale)
    figures |= measure_reuse(engine, texts, scale)
    print(json.dumps(figures))


def measure(
    engine: TeacherEngine, config: ServeTeacherConfig, texts: Int32Array, scale: Scale
) -> dict[str, float]:
    """CPU per token above the plain forward pass, way by way."""
    public = EngineScoring(
        engine._engine, vocab_size=engine.vocab_size, max_model_len=engine.max_model_len, gather=False
    )
    ways: dict[str, Way] = {
        "forward": lambda tasks: run_vllm(engine, tasks),
        "prompt_logprobs": lambda tasks: run_scoring(engine, public, tasks),
        "dictionaries": lambda tasks: run_vllm(engine, tasks, prompt_logprobs=TOP_K, detokenize=True),
        "gather": lambda tasks: run_scoring(engine, engine.scoring, [without_ids(task) for task in tasks]),
        "gather_chosen": lambda tasks: run_scoring(engine, engine.scoring, tasks),
    }
    sizes: dict[str, float] = {}
    cpu: dict[str, list[float]] = {}
    whole = scale
    for number in range(scale.rounds + 1):
        # The first turn, which compiles what is compiled at first use, does not count.
        scale = whole if number else replace(whole, completions=2)
        tokens = scale.completions * scale.completion_tokens
        for name, way in ways.items():
            tasks = make_tasks(texts, scale, seed=f"{name}-{number}", vocab_size=engine.vocab_size)
            if name == "prompt_logprobs":
                tasks = [without_ids(task) for task in tasks]
            begun = time.process_time()
            way(tasks)
            cpu.setdefault(name, []).append((time.process_time() - begun) / tokens)
        with serving(engine, config) as target, TeacherClient(target) as client:
            for name in ("service", "service_chosen"):
                tasks = make_tasks(texts, scale, seed=f"{name}-{number}", vocab_size=engine.vocab_size)
                if name == "service":
                    tasks = [without_ids(task) for task in tasks]
                settings = ScoreSettings(session=f"{name}-{number}".replace("_", "-"), top_k=TOP_K)
                begun = time.process_time()
                assert sum(1 for _ in client.score(completions_of(tasks), settings)) == scale.completions
                cpu.setdefault(name, []).append((time.process_time() - begun) / tokens)
                sizes[name] = response_bytes(target, tasks, settings) / tokens
    print(f"{'way':16} {'CPU us/token':>12} {'above forward':>14} {'bytes/token':>12}")
    floor = statistics.median(cpu["forward"][1:])
    figures: dict[str, float] = {"forward_cpu_us_per_token": floor * 1e6}
    for name, found in cpu.items():
        middle = statistics.median(found[1:])
        above = middle / floor - 1
        size = f"{sizes[name]:12.0f}" if name in sizes else ""
        print(f"{name:16} {middle * 1e6:12.0f} {above:14.1%} {size}")
        if name != "forward":
            figures[f"{name}_overhead"] = above
            figures[f"{name}_added_cpu_us_per_token"] = (middle - floor) * 1e6
    return figures | {f"{name}_bytes_per_token": size for name, size in sizes.items()}


def measure_reuse(engine: TeacherEngine, texts: Int32Array, scale: Scale) -> dict[str, float]:
    """Four completions of each prompt: CPU against vLLM's prompt logprobs, which read every prompt again."""
    public = EngineScoring(
        engine._engine, vocab_size=engine.vocab_size, max_model_len=engine.max_model_len, gather=False
    )
    spent: dict[str, list[float]] = {"gather": [], "prompt_logprobs": []}
    for number in range(scale.rounds):
        for name, found in spent.items():
            scoring = engine.scoring if name == "gather" else public
            tasks = make_tasks(texts, scale, seed=f"reuse-{name}-{number}", vocab_size=engine.vocab_size)
            tasks = [
                replace(without_ids(task), prompt_token_ids=tasks[index // 4 * 4].prompt_token_ids)
                for index, task in enumerate(tasks)
            ]
            begun = time.process_time()
            run_scoring(engine, scoring, tasks)
            found.append(time.process_time() - begun)
    ratio = statistics.median(spent["gather"]) / statistics.median(spent["prompt_logprobs"])
    print(f"four completions a prompt: gather takes {ratio:.2f} of the CPU of prompt_logprobs")
    return {"reuse_cpu_ratio": ratio}


def run_scoring(engine: TeacherEngine, scoring: EngineScoring, tasks: Sequence[ScoreTask]) -> None:
    """Score on this thread."""
    usual, engine.scoring = engine.scoring, scoring
    try:
        for task in tasks:
            scoring.add(task)
        while engine.unfinished:
            engine.step()
        assert len(scoring.take_finished()) == len(tasks)
    finally:
        engine.scoring = usual


def run_vllm(engine: TeacherEngine, tasks: Sequence[ScoreTask], **options: Any) -> None:
    """Let vLLM read prompts and completions."""
    from vllm import SamplingParams

    make: Untyped = SamplingParams
    for task in tasks:
        parameters = make(**({"temperature": 0.0, "max_tokens": 1, "detokenize": False} | options))
        token_ids = [*task.prompt_token_ids.tolist(), *task.completion_token_ids.tolist()]
        engine._engine.add_request(task.request_id, {"prompt_token_ids": token_ids}, parameters)
    while engine.unfinished:
        engine._engine.step()


def response_bytes(target: str, tasks: Sequence[ScoreTask], settings: ScoreSettings) -> int:
    """What the results take on the wire: asked for once more, and not computed again."""
    batch = pb.CompletionBatch(completions=[completion_to_proto(one) for one in completions_of(tasks)])
    requests = [pb.ScoreRequest(open=settings_to_proto(settings)), pb.ScoreRequest(completions=batch)]
    with grpc.insecure_channel(target) as channel:
        score: Untyped = channel.stream_stream("/lynearm.v1.TeacherService/Score")
        return sum(len(data) for data in score(iter([request.SerializeToString() for request in requests])))


def text_ids(model: Path) -> Int32Array:
    """The tokens of natural text."""
    from transformers import AutoTokenizer

    import lynearm.demo

    path = Path(lynearm.demo.__path__[0]) / "prompts.jsonl"
    text = "\n\n".join(json.loads(line)["prompt"] for line in path.read_text().splitlines())
    make: Untyped = AutoTokenizer
    return np.asarray(make.from_pretrained(model).encode(text), np.int32)


def make_tasks(texts: Int32Array, scale: Scale, *, seed: str, vocab_size: int) -> list[ScoreTask]:
    """Completions that no turn has seen before: each prompt begins with tokens of its own."""
    generator = np.random.default_rng(list(seed.encode()))
    length = scale.prompt_tokens + scale.completion_tokens
    tasks: list[ScoreTask] = []
    for number in range(scale.completions):
        begin = int(generator.integers(0, texts.size - length))
        ids = texts[begin : begin + length].copy()
        ids[:4] = generator.integers(10, vocab_size, 4)
        chosen = generator.integers(10, vocab_size, (scale.completion_tokens, CHOSEN)).astype(np.int32)
        tasks.append(
            ScoreTask(
                f"{seed}-{number}", ids[: scale.prompt_tokens], ids[scale.prompt_tokens :], TOP_K, chosen
            )
        )
    return tasks


def without_ids(task: ScoreTask) -> ScoreTask:
    """The task with nothing chosen."""
    return replace(task, chosen_ids=None)


def completions_of(tasks: Sequence[ScoreTask]) -> list[StudentCompletion]:
    """What a client sends."""
    return [
        StudentCompletion(task.request_id, task.prompt_token_ids, task.completion_token_ids, task.chosen_ids)
        for task in tasks
    ]


@contextmanager
def serving(engine: TeacherEngine, config: ServeTeacherConfig) -> Iterator[str]:
    """Serve an engine from another thread; host:port."""
    addresses: list[str] = []
    ready, stop = threading.Event(), threading.Event()
    close, engine.close = engine.close, lambda: None  # type: ignore[method-assign]  # it is used again

    async def serve() -> None:
        async with TeacherServer(config, lambda: engine) as server:
            addresses.append(server.address)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait()
    try:
        yield addresses[0]
    finally:
        stop.set()
        thread.join()
        engine.close = close  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
