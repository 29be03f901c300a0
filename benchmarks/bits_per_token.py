"""Bits per generated token, added KL and speed of the codec, on a corpus of real top-k rows.

    python benchmarks/bits_per_token.py --corpus teacher_topk256.npz

The corpus is an .npz with one row per generated token: `ids` [N, 256], `logprobs` [N, 256] float32,
sorted, descending, `tail_mass` [N], `sampled_id` [N], `sampled_logprob` [N], and `seq` [N], which numbers
the completion that the row belongs to. Bits are those of whole blocks, headers included, divided by
generated tokens; prompts are left out, since their share depends on the job. KL and total variation
are over the kept entries and the tail as one bucket, against the unquantised same. Speed is of one
thread; the best of three runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import zstandard

from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.specs import CODEC_MODES, CodecMode
from lynearm.wire.traces import TopK, Trace

VOCAB_SIZE = 49_152
"""Of the corpus's teacher, SmolLM2."""

Corpus = dict[str, npt.NDArray[np.generic]]
FloatArray = npt.NDArray[np.float64]
_Result = TypeVar("_Result")


def main() -> int:
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "teacher_topk256.npz"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=default)
    parser.add_argument("--top-k", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--block-tokens", type=int, nargs="+", default=[256, 4096])
    arguments = parser.parse_args()
    if not arguments.corpus.is_file():
        print(f"no corpus at {arguments.corpus}: name one with --corpus", file=sys.stderr)
        return 2
    with np.load(arguments.corpus) as archive:
        corpus: Corpus = {name: archive[name] for name in archive.files if name != "prompts"}
    print(f"{'format':<28}{'k':>4}{'tokens/block':>14}{'bits/token':>12}", end="")
    print(f"{'added KL':>10}{'p99.9':>9}{'TV':>9}{'encode/s':>10}{'decode/s':>10}")
    for k in arguments.top_k:
        traces = build_traces(corpus, k)
        for block_tokens in arguments.block_tokens:
            blocks = list(group_traces(traces, block_tokens))
            report_float16(blocks, k, block_tokens)
            for mode in CODEC_MODES:
                report_codec(blocks, k, block_tokens, mode)
    return 0


def build_traces(corpus: Corpus, k: int) -> list[Trace]:
    """The corpus as traces of its k likeliest entries, without prompts."""
    logprobs = corpus["logprobs"].astype(np.float64)
    tail_mass = corpus["tail_mass"].astype(np.float64) + np.exp(logprobs[:, k:]).sum(axis=1)
    starts = np.flatnonzero(np.diff(corpus["seq"].astype(np.int64), prepend=-1))
    ends = [*starts[1:].tolist(), len(logprobs)]
    return [
        Trace(
            prompt_id=f"prompt-{index}",
            prompt_token_ids=np.zeros(0, np.int32),
            completion_token_ids=corpus["sampled_id"][start:end].astype(np.int32),
            sampled_logprobs=corpus["sampled_logprob"][start:end].astype(np.float32),
            top_k=TopK(
                token_ids=corpus["ids"][start:end, :k].astype(np.int32),
                logprobs=corpus["logprobs"][start:end, :k].astype(np.float32),
                tail_mass=tail_mass[start:end].astype(np.float32),
            ),
            finish_reason="stop",
        )
        for index, (start, end) in enumerate(zip(starts.tolist(), ends, strict=True))
    ]


def group_traces(traces: Sequence[Trace], block_tokens: int) -> Iterator[list[Trace]]:
    """Whole traces until a group has at least `block_tokens` tokens; the rest as a last group."""
    group: list[Trace] = []
    for trace in traces:
        group.append(trace)
        if count_tokens(group) >= block_tokens:
            yield group
            group = []
    if group:
        yield group


def count_tokens(traces: Sequence[Trace]) -> int:
    return sum(trace.completion_token_ids.size for trace in traces)


def report_codec(blocks: Sequence[list[Trace]], k: int, block_tokens: int, mode: CodecMode) -> None:
    encoded, encode_seconds = best_time(
        lambda: [encode_block(block, mode=mode, vocab_size=VOCAB_SIZE) for block in blocks]
    )
    decoded, decode_seconds = best_time(lambda: [decode_block(data) for data in encoded])
    tokens = sum(map(count_tokens, blocks))
    divergence, variation = distances(
        [trace for block in blocks for trace in block], [trace for block in decoded for trace in block]
    )
    print(
        f"{'lynearm ' + mode:<28}{k:>4}{block_tokens:>14}{sum(map(len, encoded)) * 8 / tokens:>12.1f}"
        f"{divergence.mean():>10.1e}{np.quantile(divergence, 0.999):>9.1e}{variation.mean():>9.1e}"
        f"{tokens / encode_seconds:>10.0f}{tokens / decode_seconds:>10.0f}",
        flush=True,
    )


def report_float16(blocks: Sequence[list[Trace]], k: int, block_tokens: int) -> None:
    """A plain baseline: 16-bit ids and float16, columns byte-shuffled, zstd-3."""
    compressor = zstandard.ZstdCompressor(level=3)
    size_bytes = 0
    for block in blocks:
        ids = np.concatenate(
            [np.c_[trace.completion_token_ids, trace.top_k.token_ids] for trace in block]
        ).T.astype("<u2")
        columns = [
            np.c_[trace.sampled_logprobs, trace.top_k.tail_mass, trace.top_k.logprobs] for trace in block
        ]
        values = np.concatenate(columns).T.astype("<f2")
        size_bytes += len(compressor.compress(shuffle_bytes(ids) + shuffle_bytes(values)))
    tokens = sum(map(count_tokens, blocks))
    print(f"{'16-bit ids + float16, zstd-3':<28}{k:>4}{block_tokens:>14}{size_bytes * 8 / tokens:>12.1f}")


def shuffle_bytes(array: npt.NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def distances(given: Sequence[Trace], returned: Sequence[Trace]) -> tuple[FloatArray, FloatArray]:
    """KL divergence (nats) and total variation of what came back, one element per position."""
    divergences: list[FloatArray] = []
    variations: list[FloatArray] = []
    for before, after in zip(given, returned, strict=True):
        order = np.argsort(before.top_k.token_ids, axis=1)
        order_after = np.argsort(after.top_k.token_ids, axis=1)
        p, q = normalise(before.top_k, order), normalise(after.top_k, order_after)
        divergences.append((p * (np.log(p) - np.log(q))).sum(axis=1))
        variations.append(0.5 * np.abs(p - q).sum(axis=1))
    return np.concatenate(divergences), np.concatenate(variations)


def normalise(top_k: TopK, order: npt.NDArray[np.intp]) -> FloatArray:
    kept = np.exp(np.take_along_axis(top_k.logprobs, order, axis=1).astype(np.float64))
    tail = np.maximum(top_k.tail_mass.astype(np.float64), 1e-12)
    joined: FloatArray = np.c_[kept, tail]
    total: FloatArray = joined.sum(axis=1, keepdims=True)
    return joined / total


def best_time(work: Callable[[], _Result]) -> tuple[_Result, float]:
    """What the work returns, and the CPU seconds of the fastest of three runs."""
    runs = [time_once(work) for _ in range(3)]
    return runs[0][0], min(seconds for _, seconds in runs)


def time_once(work: Callable[[], _Result]) -> tuple[_Result, float]:
    start = time.thread_time()
    result = work()
    return result, time.thread_time() - start


if __name__ == "__main__":
    sys.exit(main())
