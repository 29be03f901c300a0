"""The engines of the overhead benchmark, each function for a process of its own.

Plain generation is vLLM's own LLMEngine as the teacher loads it, given the same token ids, seeds and bounds
as the teacher's requests, and no detokenising: nothing that a user would get more cheaply.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from teacher_overhead_turns import PLAIN, Cell, Clocks, Comparison, Scale, Way, split_rounds, take_turns
from transport_processes import cpu_seconds_of

from lynearm.client import TraceClient
from lynearm.teacher import Prompt, TeachConfig, TeacherWorker
from lynearm.teacher.engine import TeacherEngine
from lynearm.wire.specs import StreamSpec

Untyped: TypeAlias = Any
"""An object of vLLM or transformers, which ship no types that a strict checker accepts."""

CHECKED_PROMPTS = 6
"""Completions that are compared with transformers."""


def make_config(
    model: Path, scale: Scale, cells: Sequence[Cell], service: str = "127.0.0.1:1"
) -> TeachConfig:
    """The teacher of a process, with one thread, and room for every cell."""
    return TeachConfig(
        model=str(model),
        prompts=Path("not-read.jsonl"),
        stream="overhead",
        license="Apache-2.0",
        service=service,
        top_k=max(cell.top_k for cell in cells),
        max_batch=max(cell.batch for cell in cells),
        max_tokens=scale.tokens,
        max_model_len=512,
        threads=1,
    )


def compare_worker(
    model: Path, prompts: Sequence[Prompt], cells: Sequence[Cell], scale: Scale, service: tuple[str, int]
) -> tuple[list[Comparison], float]:
    """The whole worker (capture, encode, publish to a service) beside plain generation.

    Returns:
        The comparisons, and the largest error of a captured logprob against transformers.
    """
    address, service_process = service
    config = make_config(model, scale, cells, address)
    loader = TeacherWorker(config)
    spec = loader.load()
    engine = _engine_of(loader)
    found: list[Comparison] = []
    with TraceClient(address) as client:
        # The first turn, which compiles what is compiled at first use, does not count.
        for number, cell in enumerate([cells[0], *cells]):
            stream = f"overhead-{number}"
            _capture(engine, cell.top_k)
            codec = replace(spec.codec, top_k=cell.top_k)
            ways = {
                PLAIN: _plain(engine, config, cell),
                "worker": _publish(
                    engine,
                    replace(config, stream=stream, top_k=cell.top_k, max_batch=cell.batch),
                    replace(spec, name=stream, codec=codec),
                ),
            }
            client.open_stream(replace(spec, name=stream, codec=codec))
            clocks = Clocks(
                beside_seconds=lambda: cpu_seconds_of(service_process),
                size_bytes=lambda stream=stream: client.get_stream(stream).size_bytes,
            )
            made = take_turns(ways, cell, split_rounds(prompts, cell.batch, scale.rounds), clocks)
            found += made if number else []
    _capture(engine, cells[0].top_k)
    return found, max_logprob_error(engine, model, prompts[:CHECKED_PROMPTS])


def compare_lists(
    model: Path, prompts: Sequence[Prompt], cells: Sequence[Cell], scale: Scale
) -> list[Comparison]:
    """What vLLM itself returns beside plain generation: dictionaries with decoded candidates, flat lists."""
    config = make_config(model, scale, cells)
    engine = TeacherEngine(config, arrays=False)
    found: list[Comparison] = []
    for number, cell in enumerate([cells[0], *cells]):
        dictionaries = {"logprobs": cell.top_k, "detokenize": True}
        flat_lists = {"logprobs": cell.top_k, "flat_logprobs": True}
        ways = {
            PLAIN: _plain(engine, config, cell),
            "flat lists": _plain(engine, config, cell, **flat_lists),
            "dictionaries": _plain(engine, config, cell, **dictionaries),
        }
        made = take_turns(ways, cell, split_rounds(prompts, cell.batch, scale.rounds), Clocks())
        found += made if number else []
    return found


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


def _publish(engine: TeacherEngine, config: TeachConfig, spec: StreamSpec) -> Way:
    def answer(prompts: Sequence[Prompt]) -> int:
        # A worker of its own for each turn, as after a restart; they share the engine, of which a process
        # takes only one. Prompts of another turn get other ids: a stream has each prompt once.
        worker = TeacherWorker(config)
        worker._engine = engine
        before = engine.generated_tokens
        worker.run(spec, prompts)
        return engine.generated_tokens - before

    return answer


def _plain(engine: TeacherEngine, config: TeachConfig, cell: Cell, **changes: object) -> Way:
    """The engine of vLLM under the teacher, which itself never generates without logprobs."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm_engine: Untyped = engine._engine

    def answer(prompts: Sequence[Prompt]) -> int:
        waiting, tokens = deque(prompts), 0
        while waiting or engine.unfinished:
            while waiting and engine.unfinished < cell.batch:
                prompt = waiting.popleft()
                token_ids = engine.tokenizer.encode(prompt)
                sampling = engine.sampling(prompt.prompt_id, 0, token_ids.size)
                parameters: dict[str, Any] = {
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "max_tokens": sampling.max_tokens,
                    "seed": sampling.seed,
                    "detokenize": False,
                    "output_kind": RequestOutputKind.FINAL_ONLY,
                }
                request = SamplingParams(**(parameters | changes))
                llm_engine.add_request(prompt.prompt_id, {"prompt_token_ids": token_ids.tolist()}, request)
            for output in llm_engine.step():
                if output.finished:
                    tokens += len(output.outputs[0].token_ids)
        return tokens

    return answer


def _capture(engine: TeacherEngine, top_k: int) -> None:
    """Make an engine keep another k than it was loaded with."""
    engine.top_k = top_k
    engine._logprob_count = top_k


def _engine_of(worker: TeacherWorker) -> TeacherEngine:
    engine = worker._engine
    if engine is None:
        raise ValueError("the worker has not loaded its engine")
    return engine
