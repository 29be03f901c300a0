"""A tiny teacher's traces, offered by a trace service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lynearm.client import TraceClient
from lynearm.student.model import StudentModel
from lynearm.wire.codec import encode_block
from lynearm.wire.specs import CodecSpec, StreamSpec, TeacherSpec
from lynearm.wire.traces import SamplingParams, TopK, Trace

TOP_K = 8


def write_traces(teacher: StudentModel, count: int, *, seed: int = 0, held_out: int = 0) -> list[Trace]:
    """Prompts of random tokens, continued by the teacher; the first ones are tagged as held out."""
    generator = torch.Generator().manual_seed(seed)
    traces: list[Trace] = []
    for number in range(count):
        prompt_tokens = int(torch.randint(2, 6, (), generator=generator))
        tokens = int(torch.randint(3, 12, (), generator=generator))
        prompt_ids = torch.randint(5, 300, (prompt_tokens,), generator=generator)
        completion_ids = torch.randint(5, 300, (tokens,), generator=generator)
        trace = judge(teacher, prompt_ids.tolist(), completion_ids.tolist(), prompt_id=f"p{number}")
        split = {"split": "held_out" if number < held_out else "train"} if held_out else {}
        traces.append(replace(trace, tags=split))
    return traces


def judge(
    teacher: StudentModel, prompt_ids: Sequence[int], completion_ids: Sequence[int], *, prompt_id: str
) -> Trace:
    """A trace of a given completion under the teacher."""
    token_ids = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.no_grad():
        logits_TV = teacher.model(input_ids=token_ids).logits[0, len(prompt_ids) - 1 : -1]
    logprobs_TV = torch.log_softmax(logits_TV.double(), -1)
    kept_TK, kept_ids_TK = logprobs_TV.topk(TOP_K, -1)
    sampled_T = logprobs_TV.gather(1, torch.tensor(completion_ids)[:, None])[:, 0]
    return Trace(
        prompt_id=prompt_id,
        prompt_token_ids=np.array(prompt_ids, np.int32),
        completion_token_ids=np.array(completion_ids, np.int32),
        sampled_logprobs=sampled_T.numpy().astype(np.float32),
        top_k=TopK(
            kept_ids_TK.numpy().astype(np.int32),
            kept_TK.numpy().astype(np.float32),
            (1.0 - kept_TK.exp().sum(-1)).clamp(0.0, 1.0).numpy().astype(np.float32),
        ),
        finish_reason="length",
        sampling=SamplingParams(max_tokens=len(completion_ids)),
    )


def make_spec(teacher: StudentModel, name: str = "lessons") -> StreamSpec:
    return StreamSpec(
        name=name,
        teacher=TeacherSpec("tiny teacher", "sha256:00", "test", "float32", teacher.vocab_size, 512),
        tokenizer=teacher.tokenizer,
        codec=CodecSpec("exact", TOP_K),
        license="Apache-2.0",
    )


def make_blocks(teacher: StudentModel, traces: Sequence[Trace], traces_per_block: int) -> list[bytes]:
    return [
        encode_block(traces[start : start + traces_per_block], codec="exact", vocab_size=teacher.vocab_size)
        for start in range(0, len(traces), traces_per_block)
    ]


def offer(
    target: str, teacher: StudentModel, traces: Sequence[Trace], *, name: str, traces_per_block: int = 7
) -> None:
    """Create a stream, publish the traces and seal it."""
    with TraceClient(target) as client:
        client.create_stream(make_spec(teacher, name))
        with client.publisher(name, "teacher") as publisher:
            for block in make_blocks(teacher, traces, traces_per_block):
                publisher.publish(block)
        client.seal_stream(name)
