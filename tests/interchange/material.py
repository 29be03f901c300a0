"""Traces, streams and commands for the tests of exports and imports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from typer.testing import CliRunner

from lynearm.cli.main import app
from lynearm.client import TraceClient
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.specs import CodecMode, CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec
from lynearm.wire.traces import SamplingParams, TokenSpan, TopK, Trace

VOCAB_SIZE = 512
K = 6


def make_spec(name: str, mode: CodecMode = "exact", tail_draws: int = 0) -> StreamSpec:
    return StreamSpec(
        name=name,
        teacher=TeacherSpec("teacher", "sha256:00", "test 1.0", "float32", VOCAB_SIZE, 4096, "raw", 1.0),
        tokenizer=TokenizerSpec("tok", bytes(range(32)), b"", VOCAB_SIZE, (0, 2)),
        codec=CodecSpec(mode, K, tail_draws=tail_draws),
        license="CC-BY-4.0",
        labels={"purpose": "tests"},
    )


def make_trace(prompt_id: str, seed: int = 0, *, positions: int = 5, k: int = K, **overrides: Any) -> Trace:
    """Rows of different lengths, some empty, with everything else that a trace can have."""
    rng = np.random.default_rng(seed)
    token_ids = np.zeros((positions, k), np.int32)
    logprobs = np.full((positions, k), -np.inf, np.float32)
    tail_mass = np.zeros(positions, np.float32)
    for t in range(positions):
        kept = int(rng.integers(0, k + 1))
        row = np.sort(rng.dirichlet(np.full(kept + 1, 0.5)))[::-1].astype(np.float32)
        token_ids[t, :kept] = rng.choice(VOCAB_SIZE, kept, replace=False)
        logprobs[t, :kept] = np.log(np.maximum(row[:kept], np.float32(1e-30)))
        tail_mass[t] = row[kept]
    fields: dict[str, Any] = {
        "prompt_id": prompt_id,
        "prompt_token_ids": rng.integers(0, VOCAB_SIZE, 7).astype(np.int32),
        "completion_token_ids": rng.integers(0, VOCAB_SIZE, positions).astype(np.int32),
        "sampled_logprobs": -rng.exponential(2, positions).astype(np.float32),
        "top_k": TopK(token_ids, logprobs, tail_mass),
        "finish_reason": "stop",
        "spans": (TokenSpan("reasoning", 0, 2), TokenSpan("answer", 2, positions)) if positions > 2 else (),
        "sampling": SamplingParams(
            temperature=0.7,
            top_p=0.9,
            top_k=40,
            min_p=0.01,
            max_tokens=99,
            seed=seed,
            presence_penalty=0.5,
            frequency_penalty=-0.25,
            repetition_penalty=1.1,
            min_tokens=1,
            stop=("\n\n", "東京"),
            stop_token_ids=(3, 5),
        ),
        "tags": {"split": "train", "Grüße": "東京"},
        "completion_text": f"text of {prompt_id} – 東京",
    }
    return Trace(**{**fields, **overrides})


def make_traces() -> list[Trace]:
    """Prompts in which every field once is at its edge."""
    return [
        make_trace("q1", 1, stop_string="東京"),
        make_trace("q2", 2, sample_index=0, finish_reason="length"),
        make_trace("q2", 3, sample_index=1, finish_reason="abort", tags={}, spans=()),
        make_trace("empty", 4, positions=0, completion_text=""),
        make_trace("no-entries", 5, k=0),
        make_trace("plain", 6, sampling=SamplingParams(), tags={"": ""}, spans=()),
        make_trace("no-prompt", 7, prompt_token_ids=np.zeros(0, np.int32)),
        make_trace("impossible", 8, sampled_logprobs=np.full(5, -np.inf, np.float32)),
    ]


def create(target: str, spec: StreamSpec, blocks: Sequence[Sequence[Trace]]) -> None:
    """A stream with these blocks."""
    with TraceClient(target) as client:
        client.create_stream(spec)
        with client.publisher(spec.name, "tests") as publisher:
            for traces in blocks:
                block = encode_block(traces, codec=spec.codec.mode, vocab_size=spec.teacher.vocab_size)
                publisher.publish(block, sorted({trace.prompt_id for trace in traces}))


def read(target: str, stream: str) -> list[Trace]:
    """All traces of a stream."""
    with TraceClient(target) as client, client.subscribe(stream, follow=False) as subscription:
        return [trace for received in subscription for trace in decode_block(received.block)]


def spec_of(target: str, stream: str) -> StreamSpec:
    with TraceClient(target) as client:
        return client.get_stream(stream).spec


def exists(target: str, stream: str) -> bool:
    with TraceClient(target) as client:
        return stream in {info.spec.name for info in client.list_streams()}


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, [*map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def assert_same(actual: Sequence[Trace], expected: Sequence[Trace]) -> None:
    """Equal bit for bit; ids of padding are 0."""
    assert [trace.prompt_id for trace in actual] == [trace.prompt_id for trace in expected]
    for one, other in zip(actual, expected, strict=True):
        for name in ("finish_reason", "sample_index", "spans", "sampling", "completion_text", "stop_string"):
            assert getattr(one, name) == getattr(other, name), (one.prompt_id, name)
        assert list(one.tags.items()) == list(other.tags.items())
        _assert_bits(one.prompt_token_ids, other.prompt_token_ids)
        _assert_bits(one.completion_token_ids, other.completion_token_ids)
        _assert_bits(one.sampled_logprobs, other.sampled_logprobs)
        _assert_bits(one.top_k.logprobs, other.top_k.logprobs)
        _assert_bits(one.top_k.tail_mass, other.top_k.tail_mass)
        kept = other.top_k.logprobs > -np.inf
        _assert_bits(one.top_k.token_ids, np.where(kept, other.top_k.token_ids, 0).astype(np.int32))
        _assert_draws(one.top_k, other.top_k)


def _assert_draws(actual: TopK, expected: TopK) -> None:
    """Draws may change places; of no positions there are none, whatever their number."""
    draws, others = actual.tail_draws, expected.tail_draws
    if expected.positions:
        assert (draws is None) == (others is None)
    if draws is not None and others is not None:
        _assert_bits(np.sort(draws, axis=1), np.sort(others, axis=1))


def _assert_bits(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()
