"""Whether exact mode finds the logit grid of logprobs that a GPU computed, and what that saves.

    python benchmarks/exact_on_gpu.py [--device cuda]

A teacher in bf16 or fp16 computes logits in that type, and vLLM takes their log-softmax in float32 on the
same device. Exact mode rests on how that rounds: (x − max) − log Σ. This makes such logits with a random
head of a real size (no weights needed), takes the log-softmax as vLLM's sampler does, keeps the top 64, and
encodes: the scale that was found, bits per token, and whether every float32 came back.

On an NVIDIA H200 (torch 2.11): both grids are found, every float32 comes back; 1,212 bits a token for bf16,
1,391 for fp16, 2,282 for float32 (a random head repeats itself less than a language model).
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.grids import LogitGrid
from lynearm.wire.logit_grids import find_logit_grid
from lynearm.wire.traces import TopK, Trace

VOCAB_SIZE, HIDDEN_SIZE, POSITIONS, TOP_K = 128_256, 2048, 4096, 64
"""A vocabulary and width of Llama 3.2 1B."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--positions", type=int, default=POSITIONS)
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {arguments.positions} positions, V = {VOCAB_SIZE}, k = {TOP_K}"
    )
    failed = False
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        trace = make_trace(dtype, arguments.device, arguments.positions)
        kept = np.full(arguments.positions, TOP_K, np.uint32)
        found = find_logit_grid(trace.top_k.logprobs, kept)
        block = encode_block([trace], codec="exact", vocab_size=VOCAB_SIZE)
        (decoded,) = decode_block(block)
        same = np.array_equal(decoded.top_k.logprobs.view(np.uint32), trace.top_k.logprobs.view(np.uint32))
        grid = f"grid of {found.grid.mantissa_bits} mantissa bits" if found else "none: plain float32"
        name = str(dtype).removeprefix("torch.")
        bits = len(block) * 8 / arguments.positions
        verdict = "yes" if same else "NO"
        print(f"{name:<9} scale: {grid:<25} {bits:7.1f} bits/token   bit-identical: {verdict}")
        expected = {torch.bfloat16: LogitGrid(7), torch.float16: LogitGrid(10)}.get(dtype)
        failed |= not same or (found.grid if found else None) != expected
    return 1 if failed else 0


def make_trace(dtype: torch.dtype, device: str, positions: int) -> Trace:
    """Positions of a random teacher whose logits are peaked about as much as a language model's."""
    generator = torch.Generator(device).manual_seed(0)
    head = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator, device=device)
    # Common tokens: a few per cent of the rows are longer, and so win more often.
    head *= 0.05 * torch.rand(VOCAB_SIZE, 1, generator=generator, device=device) ** 4 + 0.03
    head = head.to(dtype)
    ids, logprobs, sampled, sampled_logprobs = [], [], [], []
    for start in range(0, positions, 256):
        count = min(256, positions - start)
        hidden = (torch.randn(count, HIDDEN_SIZE, generator=generator, device=device) * 1.5).to(dtype)
        logits = hidden @ head.T
        logprobs_NV = logits.log_softmax(dim=-1, dtype=torch.float32)
        top = logprobs_NV.topk(TOP_K, dim=-1)
        drawn = torch.multinomial(logprobs_NV.exp(), 1, generator=generator)
        ids.append(top.indices.to(torch.int32).cpu().numpy())
        logprobs.append(top.values.cpu().numpy())
        sampled.append(drawn[:, 0].to(torch.int32).cpu().numpy())
        sampled_logprobs.append(logprobs_NV.gather(1, drawn)[:, 0].cpu().numpy())
    kept = np.concatenate(logprobs)
    tail = np.clip(1.0 - np.exp(kept.astype(np.float64)).sum(axis=1), 0, 1).astype(np.float32)
    return Trace(
        prompt_id="random",
        prompt_token_ids=np.zeros(0, np.int32),
        completion_token_ids=np.concatenate(sampled),
        sampled_logprobs=np.concatenate(sampled_logprobs),
        top_k=TopK(np.concatenate(ids), kept, tail),
        finish_reason="length",
    )


if __name__ == "__main__":
    sys.exit(main())
