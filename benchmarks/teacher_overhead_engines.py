"""The in-process ways of the overhead benchmark: everything that shares one engine.

Plain generation is vLLM's own LLMEngine as the teacher loads it, given the same token ids, seeds and bounds
as the teacher's requests, with nothing detokenised: vLLM does not get cheaper than that.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from teacher_overhead_turns import PLAIN, Cell, Clock, Comparison, Meters, Way, take_turns
from transport_processes import cpu_seconds_of

from lynearm.client import TraceClient
from lynearm.teacher import Prompt, TeachConfig, TeacherWorker
from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.prompt_content import encode_prompt
from lynearm.wire.specs import StreamSpec

Untyped: TypeAlias = Any
"""An object of vLLM or transformers, which ship no types that a strict checker accepts."""

CHECKED_PROMPTS = 6
"""Completions that are compared with transformers."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one process measures."""

    model: Path
    prompts: tuple[Prompt, ...]
    tokens: int
    """Longest completion, tokens."""
    cells: tuple[Cell, ...]
    """For the worker."""
    list_cells: tuple[Cell, ...]
    """For what vLLM itself returns."""
    service: str
    """Address of a trace service."""
    service_process_id: int
    clock: Clock
    tail_draws: int = 0
    """Of each row of the worker's."""

    def config(self) -> TeachConfig:
        """The teacher as a user would run it, with one thread, and room for every cell."""
        cells = (*self.cells, *self.list_cells)
        return TeachConfig(
            model=str(self.model),
            prompts=Path("not-read.jsonl"),
            stream="overhead",
            license="Apache-2.0",
            service=self.service,
            top_k=max(cell.top_k for cell in cells),
            max_batch=max(cell.batch for cell in cells),
            max_tokens=self.tokens,
            max_model_len=512,
            threads=1,
            tail_draws=self.tail_draws,
        )


def measure_engine(task: Task) -> tuple[list[Comparison], float]:
    """Everything that is measured in one process.

    Returns:
        The comparisons, and the largest error of a captured logprob against transformers.
    """
    config = task.config()
    loader = TeacherWorker(config)
    spec = loader.load()
    # Whatever else the worker is, it owns one engine, and a process takes no second one.
    engine = loader._engine
    if engine is None:
        raise ValueError("the worker has not loaded its engine")
    found: list[Comparison] = []
    streams = itertools.count()
    with TraceClient(task.service) as client:
        meters = Meters(
            beside_seconds=lambda: cpu_seconds_of(task.service_process_id),
            size_bytes=lambda: sum(stream.size_bytes for stream in client.list_streams()),
        )
        for cell in task.cells:
            _keep(engine, cell.top_k)
            worker_config = replace(config, top_k=cell.top_k, max_batch=cell.batch)
            worker_spec = replace(spec, codec=replace(spec.codec, top_k=cell.top_k))
            ways = {
                PLAIN: plain(engine, cell.batch),
                "worker": whole_worker(client, engine, worker_config, worker_spec, streams.__next__),
            }
            found += take_turns(ways, cell, task.prompts, meters, task.clock)
    _keep(engine, config.top_k)
    error = max_logprob_error(engine, task.model, task.prompts[:CHECKED_PROMPTS])
    engine.close()  # From here on vLLM is as its makers left it.
    for cell in task.list_cells:
        ways = {
            PLAIN: plain(engine, cell.batch),
            "vLLM's flat lists": plain(engine, cell.batch, logprobs=cell.top_k, flat_logprobs=True),
            "vLLM's dictionaries": plain(engine, cell.batch, logprobs=cell.top_k, detokenize=True),
        }
        found += take_turns(ways, cell, task.prompts, Meters(), task.clock)
    return found, error


def whole_worker(
    client: TraceClient,
    engine: TeacherEngine,
    config: TeachConfig,
    spec: StreamSpec,
    next_stream: Callable[[], int],
) -> Way:
    """Lease, capture, encode, publish, and wait until all is durable: to a new stream each time."""

    def answer(prompts: Sequence[Prompt]) -> int:
        stream = f"overhead-{next_stream()}"
        client.create_stream(replace(spec, name=stream))
        client.jobs.create(stream, "overhead", list(map(encode_prompt, prompts)))
        worker = TeacherWorker(replace(config, stream=stream))
        worker._engine = engine
        before = engine.generated_tokens
        worker.connect(replace(spec, name=stream), "overhead")
        worker.run()
        worker.disconnect()
        return engine.generated_tokens - before

    return answer


def plain(engine: TeacherEngine, batch: int, **changes: object) -> Way:
    """The engine of vLLM under the teacher, fed as the worker feeds it; `changes` of sampling parameters."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm_engine: Untyped = engine._engine
    fixed = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}

    def answer(prompts: Sequence[Prompt]) -> int:
        waiting, tokens = deque(prompts), 0
        while waiting or engine.unfinished:
            while waiting and engine.unfinished < batch:
                prompt = waiting.popleft()
                token_ids = engine.tokenizer.encode(prompt)
                sampling = engine.sampling(prompt.prompt_id, 0, token_ids.size)
                parameters: dict[str, Any] = {
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "max_tokens": sampling.max_tokens,
                    "seed": sampling.seed,
                }
                request = SamplingParams(**(parameters | fixed | changes))
                llm_engine.add_request(prompt.prompt_id, {"prompt_token_ids": token_ids.tolist()}, request)
            for output in llm_engine.step():
                if output.finished:
                    tokens += len(output.outputs[0].token_ids)
        return tokens

    return answer


def max_logprob_error(engine: TeacherEngine, model: Path, prompts: Sequence[Prompt]) -> float:
    """Largest difference between captured logprobs and those of transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    auto_model: Untyped = AutoModelForCausalLM
    reference: Untyped = auto_model.from_pretrained(model, dtype=torch.float32).eval()
    token_ids = {prompt.prompt_id: engine.tokenizer.encode(prompt) for prompt in prompts}
    for prompt_id, ids in token_ids.items():
        engine.add(prompt_id, ids.tolist(), engine.sampling(prompt_id, 0, ids.size))
    worst = 0.0
    while engine.unfinished:
        for completion in engine.step():
            prompt_ids = token_ids[completion.request_id]
            whole = np.concatenate([prompt_ids, completion.token_ids]).tolist()
            with torch.inference_mode():
                logits = reference(torch.tensor([whole])).logits[0, prompt_ids.size - 1 : -1].double()
            expected = torch.log_softmax(logits, dim=-1).numpy()
            kept = np.take_along_axis(expected, completion.top_k.token_ids.astype(np.int64), axis=1)
            sampled = expected[np.arange(expected.shape[0]), completion.token_ids]
            worst = max(
                worst,
                float(np.abs(completion.top_k.logprobs - kept).max(initial=0.0)),
                float(np.abs(completion.sampled_logprobs - sampled).max(initial=0.0)),
            )
    return worst


def _keep(engine: TeacherEngine, top_k: int) -> None:
    """Make an engine keep another k than it was loaded with."""
    engine.top_k = min(top_k, engine.vocab_size)
    engine._logprob_count = engine.top_k + engine._config.tail_draws
