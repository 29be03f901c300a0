from __future__ import annotations

import dataclasses
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard

from lynearm.wire.blocks import BlockHeader, checksum, join_block, split_block
from lynearm.wire.codec import MAX_BLOCK_ENTRIES, decode_block, encode_block
from lynearm.wire.columns import OPTIONAL_FROM, Column, Encoding
from lynearm.wire.errors import CodecError, CorruptBlockError, UnsupportedFormatError
from lynearm.wire.integers import MAX_NUMBER, decode_numbers, encode_numbers
from lynearm.wire.metadata import FINISH_REASON_CODES, MAX_BLOCK_ITEMS, SPAN_KIND_CODES
from lynearm.wire.quantise import MAX_LEVEL, MAX_STEP, STEP_SCALE, from_levels, to_levels
from lynearm.wire.specs import CODEC_MODES, CodecMode
from lynearm.wire.traces import (
    FINISH_REASONS,
    SPAN_KINDS,
    FinishReason,
    SamplingParams,
    TokenSpan,
    TopK,
    Trace,
)

VOCAB_SIZE = 49_152
MODES = pytest.mark.parametrize("mode", CODEC_MODES)


def build_trace(
    seed: int = 0,
    *,
    positions: int = 24,
    k: int = 16,
    prompt: int = 7,
    vocab_size: int = VOCAB_SIZE,
    slope: float = 1.0,
    **overrides: Any,
) -> Trace:
    """Softmax rows over some of the vocabulary, about as peaked as a language model's, and samples."""
    rng = np.random.default_rng(seed)
    token_ids = np.zeros((positions, k), np.int32)
    logprobs = np.zeros((positions, k), np.float32)
    tail_mass = np.zeros(positions, np.float32)
    sampled = np.zeros(positions, np.int32)
    sampled_logprobs = np.zeros(positions, np.float32)
    for t in range(positions):
        likely = rng.choice(min(vocab_size, 2048), 512 if vocab_size > 512 else vocab_size, replace=False)
        likely = likely * (vocab_size // 2048 or 1)
        zipf = rng.uniform(1, 5) * np.log1p(np.arange(likely.size))
        logits = rng.normal(0, 0.7, likely.size) - slope * zipf
        row = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-row, kind="stable")
        token_ids[t], logprobs[t] = likely[order[:k]], row[order[:k]]
        tail_mass[t] = np.exp(row[order[k:]]).sum()
        drawn = rng.choice(likely.size, p=np.exp(row))
        sampled[t], sampled_logprobs[t] = likely[drawn], row[drawn]
    fields: dict[str, Any] = {
        "prompt_id": f"prompt-{seed}",
        "prompt_token_ids": rng.integers(0, vocab_size, prompt).astype(np.int32),
        "completion_token_ids": sampled,
        "sampled_logprobs": sampled_logprobs,
        "top_k": TopK(token_ids, logprobs, tail_mass),
        "finish_reason": "stop",
    }
    return Trace(**{**fields, **overrides})


def build_rows(logprobs: npt.ArrayLike, token_ids: npt.ArrayLike, **overrides: Any) -> Trace:
    """A trace whose rows are given; the sampled token is the first entry of each row."""
    rows = np.atleast_2d(np.asarray(logprobs, np.float32))
    ids = np.atleast_2d(np.asarray(token_ids, np.int32))
    tail = np.maximum(0, 1 - np.exp(rows.astype(np.float64)).sum(axis=1)).astype(np.float32)
    fields: dict[str, Any] = {
        "prompt_id": "rows",
        "prompt_token_ids": np.zeros(0, np.int32),
        "completion_token_ids": ids[:, 0].copy(),
        "sampled_logprobs": rows[:, 0].copy(),
        "top_k": TopK(ids, rows, tail),
        "finish_reason": "stop",
    }
    return Trace(**{**fields, **overrides})


def assert_same_bits(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def assert_same_metadata(actual: Trace, expected: Trace) -> None:
    for name in ("prompt_id", "finish_reason", "sample_index", "spans", "sampling", "completion_text"):
        assert getattr(actual, name) == getattr(expected, name), name
    assert dict(actual.tags) == dict(expected.tags)
    assert list(actual.tags) == list(expected.tags)
    assert_same_bits(actual.prompt_token_ids, expected.prompt_token_ids)
    assert_same_bits(actual.completion_token_ids, expected.completion_token_ids)


def assert_equal_exactly(actual: Trace, expected: Trace) -> None:
    assert_same_metadata(actual, expected)
    assert_same_bits(actual.sampled_logprobs, expected.sampled_logprobs)
    for name in ("token_ids", "logprobs", "tail_mass"):
        assert_same_bits(getattr(actual.top_k, name), getattr(expected.top_k, name))


def half_step(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Largest error of the standard mode in nats: half a step, and 2 % since the step is not constant."""
    likely = np.exp(np.maximum(logprobs.astype(np.float64), -20) / 2)
    return 0.51 * np.minimum(MAX_STEP, STEP_SCALE / likely) + 1e-6


def assert_close(actual: Trace, expected: Trace) -> None:
    """Within half a step, entry by entry, matched by token id."""
    assert_same_metadata(actual, expected)
    by_id = np.argsort(actual.top_k.token_ids, axis=1, kind="stable")
    by_id_before = np.argsort(expected.top_k.token_ids, axis=1, kind="stable")
    np.testing.assert_array_equal(
        np.take_along_axis(actual.top_k.token_ids, by_id, 1),
        np.take_along_axis(expected.top_k.token_ids, by_id_before, 1),
    )
    after = np.take_along_axis(actual.top_k.logprobs, by_id, 1)
    before = np.take_along_axis(expected.top_k.logprobs, by_id_before, 1)
    np.testing.assert_array_equal(np.isinf(after), np.isinf(before))
    kept = ~np.isinf(before)
    assert (np.abs(after[kept] - before[kept]) <= half_step(before[kept])).all()
    sampled = expected.sampled_logprobs
    finite = sampled > -np.inf
    np.testing.assert_array_equal(actual.sampled_logprobs[~finite], sampled[~finite])
    error = np.abs(actual.sampled_logprobs[finite] - sampled[finite])
    assert (error <= half_step(sampled[finite])).all()
    tail, tail_before = actual.top_k.tail_mass, expected.top_k.tail_mass
    np.testing.assert_array_equal(tail == 0, tail_before == 0)
    some = tail_before > 0
    tail_error = np.abs(np.log(tail[some]) - np.log(tail_before[some]))
    assert (tail_error <= half_step(np.log(tail_before[some]))).all()


def assert_round_trip(traces: list[Trace], mode: CodecMode, vocab_size: int = VOCAB_SIZE) -> None:
    decoded = decode_block(encode_block(traces, mode=mode, vocab_size=vocab_size))
    assert len(decoded) == len(traces)
    for actual, expected in zip(decoded, traces, strict=True):
        (assert_equal_exactly if mode == "exact" else assert_close)(actual, expected)


@MODES
def test_everything_a_trace_says_comes_back(mode: CodecMode) -> None:
    reasons: tuple[FinishReason, ...] = ("length", "abort", "stop")
    traces = [
        build_trace(
            index,
            positions=5 + index,
            prompt_id=f"frage-{index}-ä😀",
            finish_reason=reason,
            sample_index=index,
            spans=(TokenSpan("reasoning", 0, 3), TokenSpan("answer", 3 + index, 5 + index)),
            sampling=SamplingParams(0.1 + index, 0.95, 40, 0.05, 512, (None, -(2**63), 2**63 - 1)[index]),
            tags={"source": "тест", "": "empty key", "z": ""} if index else {},
            completion_text="日本語 \x00 \r\n" * index,
        )
        for index, reason in enumerate(reasons)
    ]
    assert_round_trip(traces, mode)


@MODES
@pytest.mark.parametrize("k", [1, 2, 64])
def test_rows_come_back(mode: CodecMode, k: int) -> None:
    assert_round_trip([build_trace(seed, k=k) for seed in range(3)], mode)


@MODES
def test_no_kept_entries_leave_sampled_tokens_and_tails(mode: CodecMode) -> None:
    assert_round_trip([build_trace(k=0)], mode)


@MODES
def test_empty_completions_and_prompts_come_back_between_full_ones(mode: CodecMode) -> None:
    empty = build_trace(1, positions=0)
    assert_round_trip([empty], mode)
    assert_round_trip([empty, build_trace(2, prompt=0), empty, build_trace(3, positions=1), empty], mode)


@MODES
def test_traces_of_different_widths_share_a_block(mode: CodecMode) -> None:
    assert_round_trip([build_trace(seed, k=k) for seed, k in enumerate((16, 0, 3, 16))], mode)


@MODES
def test_padding_comes_back_as_padding(mode: CodecMode) -> None:
    inf = -np.inf
    trace = build_rows(
        [[-0.1, -3.0, inf, inf], [0.0, inf, inf, inf], [-1.0, -1.1, -2.0, -3.0], [inf] * 4],
        [[5, 7, 0, 0], [9, 0, 0, 0], [4, 3, 2, 1], [0, 0, 0, 0]],
    )
    assert_round_trip([trace], mode)


@MODES
def test_ids_under_padding_are_cleared(mode: CodecMode) -> None:
    trace = build_rows([[-0.1, -np.inf]], [[5, VOCAB_SIZE + 7]])
    (decoded,) = decode_block(encode_block([trace], mode=mode, vocab_size=VOCAB_SIZE))
    assert decoded.top_k.token_ids.tolist() == [[5, 0]]


@MODES
def test_exact_ties_keep_their_ids(mode: CodecMode) -> None:
    ids = np.random.default_rng(0).permutation(VOCAB_SIZE)[:64].reshape(2, 32)
    assert_round_trip([build_rows(np.full((2, 32), np.log(1 / 32)), ids)], mode)


@MODES
@pytest.mark.parametrize("vocab_size", [1, 2, 1 << 16, (1 << 16) + 1, 1 << 20])
def test_ids_reach_the_end_of_the_vocabulary(mode: CodecMode, vocab_size: int) -> None:
    last = vocab_size - 1
    prompt = np.array([0, last], np.int32)
    inside = build_rows([[0.0]], [[last]], prompt_token_ids=prompt)
    outside = build_rows([[-0.5]], [[0]], completion_token_ids=np.array([last], np.int32))
    assert_round_trip([inside, outside], mode, vocab_size)


@MODES
def test_sampled_tokens_outside_the_rows_come_back_exactly(mode: CodecMode) -> None:
    trace = build_trace(
        completion_token_ids=np.full(24, VOCAB_SIZE - 1, np.int32),
        sampled_logprobs=np.linspace(-40, -9, 24, dtype=np.float32),
    )
    (decoded,) = decode_block(encode_block([trace], mode=mode, vocab_size=VOCAB_SIZE))
    outside = ~(trace.top_k.token_ids == VOCAB_SIZE - 1).any(axis=1)
    assert outside.sum() > 20
    np.testing.assert_array_equal(decoded.completion_token_ids, trace.completion_token_ids)
    np.testing.assert_array_equal(decoded.sampled_logprobs[outside], trace.sampled_logprobs[outside])


@MODES
def test_a_sampled_logprob_that_contradicts_its_entry_comes_back_exactly(mode: CodecMode) -> None:
    trace = build_rows([[-0.1, -3.0]], [[5, 7]], sampled_logprobs=np.array([-0.7], np.float32))
    (decoded,) = decode_block(encode_block([trace], mode=mode, vocab_size=VOCAB_SIZE))
    assert_same_bits(decoded.sampled_logprobs, trace.sampled_logprobs)


def test_exact_mode_keeps_every_bit_of_odd_floats() -> None:
    rows = np.array([[1.2e-4, 0.0, -0.0, -1e-45, -103.0, -9999.0, -3.4e38, -np.inf]], np.float32)
    top_k = TopK(np.arange(8, dtype=np.int32)[None] * (rows > -np.inf), rows, np.array([1e-45], np.float32))
    trace = build_rows(rows, top_k.token_ids, top_k=top_k)
    assert_round_trip([trace], "exact")


@pytest.mark.parametrize(
    ("slope", "bound"),
    [
        pytest.param(1.0, 1e-4, id="language model"),
        # Whatever the distribution: p · step² / 24 nats for each entry come to at most MAX_STEP² / 24.
        pytest.param(0.3, 5.1e-4, id="flat"),
        pytest.param(0.0, 5.1e-4, id="flatter"),
    ],
)
def test_standard_mode_adds_little_divergence(slope: float, bound: float) -> None:
    traces = [build_trace(seed, positions=40, k=64, slope=slope) for seed in range(4)]
    decoded = decode_block(encode_block(traces, vocab_size=VOCAB_SIZE))
    divergences = np.concatenate([divergence(a, b) for a, b in zip(traces, decoded, strict=True)])
    assert 1e-6 < divergences.mean() <= bound
    assert divergences.max() <= 10 * bound


def divergence(before: Trace, after: Trace) -> npt.NDArray[np.float64]:
    """KL over kept entries and tail, nats, shape [T]."""
    p, q = (bucketed(trace) for trace in (before, after))
    result: npt.NDArray[np.float64] = (p * np.log(p / q)).sum(axis=1)
    return result


def bucketed(trace: Trace) -> npt.NDArray[np.float64]:
    by_id = np.argsort(trace.top_k.token_ids, axis=1)
    kept = np.exp(np.take_along_axis(trace.top_k.logprobs, by_id, 1).astype(np.float64))
    joined: npt.NDArray[np.float64] = np.c_[kept, trace.top_k.tail_mass.astype(np.float64)]
    total: npt.NDArray[np.float64] = joined.sum(axis=1, keepdims=True)
    return joined / total


def test_standard_mode_needs_far_fewer_bits_than_float16_columns() -> None:
    traces = [build_trace(seed, positions=60, k=32) for seed in range(4)]
    float16 = sum(trace.completion_token_ids.size for trace in traces) * (2 + 2 + 2 + 32 * 4)
    assert len(encode_block(traces, vocab_size=VOCAB_SIZE)) < 0.8 * float16


def test_standard_rows_stay_sorted_and_repeat_bit_for_bit() -> None:
    once = decode_block(encode_block([build_trace()], vocab_size=VOCAB_SIZE))
    assert (np.diff(once[0].top_k.logprobs, axis=1) <= 0).all()
    twice = decode_block(encode_block(once, vocab_size=VOCAB_SIZE))
    inside = (once[0].top_k.token_ids == once[0].completion_token_ids[:, None]).any(axis=1)
    np.testing.assert_array_equal(twice[0].top_k.logprobs, once[0].top_k.logprobs)
    np.testing.assert_array_equal(twice[0].sampled_logprobs[inside], once[0].sampled_logprobs[inside])


@MODES
def test_encoding_is_deterministic(mode: CodecMode) -> None:
    first, second = (encode_block([build_trace()], mode=mode, vocab_size=VOCAB_SIZE) for _ in range(2))
    assert first == second


def test_levels_cover_every_probability() -> None:
    logprobs = -np.concatenate([[0.0], np.geomspace(1e-6, 7000, 5000)]).astype(np.float32)
    levels = to_levels(logprobs)
    assert (np.diff(levels) >= 0).all()
    assert (np.abs(from_levels(levels) - logprobs) <= half_step(logprobs) + 1e-6 * np.abs(logprobs)).all()
    every = np.arange(MAX_LEVEL + 1)
    np.testing.assert_array_equal(to_levels(from_levels(every)), every)
    assert to_levels(np.array([1e-4, -np.inf, -1e30], np.float32)).tolist() == [0, MAX_LEVEL, MAX_LEVEL]


def test_numbers_of_every_size_come_back() -> None:
    powers = 2 ** np.arange(33, dtype=np.int64)
    values = np.concatenate([np.arange(4096), powers[:-1], powers - 1, powers[:-1] * 2 - 2])
    data = encode_numbers(values)
    np.testing.assert_array_equal(decode_numbers(memoryview(data), values.size), values)
    with pytest.raises(CodecError):
        encode_numbers(np.array([MAX_NUMBER + 1]))
    with pytest.raises(CorruptBlockError):
        decode_numbers(memoryview(data + b"\0"), values.size)
    with pytest.raises(CorruptBlockError):
        decode_numbers(memoryview(b"\xf0"), 1)


def replace_top_k(trace: Trace, **arrays: npt.NDArray[Any]) -> Trace:
    return dataclasses.replace(trace, top_k=dataclasses.replace(trace.top_k, **arrays))


BAD_TRACES: dict[str, tuple[Callable[[Trace], Trace], str]] = {
    "prompt id too long": (lambda t: dataclasses.replace(t, prompt_id="é" * 129), "256 bytes"),
    "id beyond the vocabulary": (
        lambda t: replace_top_k(t, token_ids=t.top_k.token_ids + np.int32(VOCAB_SIZE)),
        "top_k.token_ids",
    ),
    "negative prompt id": (
        lambda t: dataclasses.replace(t, prompt_token_ids=np.array([-1], np.int32)),
        "prompt_token_ids",
    ),
    "unsorted rows": (
        lambda t: replace_top_k(t, logprobs=np.ascontiguousarray(t.top_k.logprobs[:, ::-1])),
        "sorted",
    ),
    "logits, not logprobs": (
        lambda t: replace_top_k(t, logprobs=t.top_k.logprobs + np.float32(20)),
        "at most 0",
    ),
    "tail above 1": (lambda t: replace_top_k(t, tail_mass=t.top_k.tail_mass + np.float32(1.5)), "tail_mass"),
    "infinite sampled logprob": (
        lambda t: dataclasses.replace(t, sampled_logprobs=np.full(24, np.inf, np.float32)),
        "sampled_logprobs",
    ),
    "lone surrogate": (lambda t: dataclasses.replace(t, completion_text="\ud800"), "Unicode"),
    "seed of 70 bits": (lambda t: dataclasses.replace(t, sampling=SamplingParams(seed=1 << 70)), "SEEDS"),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_what_is_no_trace_is_refused(name: str) -> None:
    spoil, message = BAD_TRACES[name]
    with pytest.raises(CodecError, match=message):
        encode_block([build_trace(1), spoil(build_trace(2))], vocab_size=VOCAB_SIZE)


def test_no_traces_and_bad_arguments_are_refused() -> None:
    with pytest.raises(CodecError, match="0 traces"):
        encode_block([], vocab_size=VOCAB_SIZE)
    with pytest.raises(CodecError, match="vocab_size"):
        encode_block([build_trace()], vocab_size=(1 << 20) + 1)
    with pytest.raises(CodecError, match="mode"):
        encode_block([build_trace()], mode="lossless", vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]  # wrong on purpose


def test_too_much_for_one_block_is_refused_with_the_way_out() -> None:
    rng = np.random.default_rng(0)
    text = "".join(map(chr, rng.integers(32, 0xD000, 3 << 19)))
    with pytest.raises(CodecError, match="fewer traces"):
        encode_block([build_trace(completion_text=text)], vocab_size=VOCAB_SIZE)
    positions = MAX_BLOCK_ENTRIES // 1024 + 1
    wide = build_rows(np.full((positions, 1024), -np.inf), np.zeros((positions, 1024), np.int32))
    with pytest.raises(CodecError, match="fewer traces"):
        encode_block([wide], vocab_size=VOCAB_SIZE)


def test_codes_name_every_reason_and_span_kind_once() -> None:
    for codes, names in ((FINISH_REASON_CODES, FINISH_REASONS), (SPAN_KIND_CODES, SPAN_KINDS)):
        assert set(codes) == set(names)
        assert len(set(codes.values())) == len(names)
        assert 0 not in codes.values()


def unwrap(block: bytes) -> tuple[BlockHeader, bytes]:
    header, payload = split_block(block)
    return header, zstandard.ZstdDecompressor().decompress(payload)


def wrap(header: BlockHeader, content: bytes) -> bytes:
    """A block around any content, with the sizes and the checksum that the content needs."""
    payload = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(content)
    return rejoin(dataclasses.replace(header, uncompressed_size_bytes=len(content)), payload)


def rejoin(header: BlockHeader, payload: bytes) -> bytes:
    return join_block(dataclasses.replace(header, payload_xxh3=checksum(payload)), payload)


def small_block(mode: CodecMode) -> bytes:
    traces = [
        build_trace(
            seed,
            positions=4,
            k=3,
            vocab_size=300,
            spans=(TokenSpan("answer", 1, 3),),
            tags={"a": "b"},
            sampling=SamplingParams(seed=seed),
            completion_text="text",
        )
        for seed in range(2)
    ]
    return encode_block(traces, mode=mode, vocab_size=300)


def mutations(content: bytes, count: int) -> Iterator[bytes]:
    """Bit flips, overwritten and inserted bytes and truncations; the same ones each time."""
    rng = random.Random(7)
    for index in range(len(content)):
        yield content[:index] + bytes([content[index] ^ 1 << rng.randrange(8)]) + content[index + 1 :]
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(changed))
            kind = rng.randrange(4)
            if kind == 0:
                changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xEF, 0xFF))
            elif kind == 1:
                changed[place : place + 4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1)))
            elif kind == 2:
                del changed[place : place + rng.randint(1, 8)]
            else:
                changed[place:place] = rng.randbytes(rng.randint(1, 8))
        yield bytes(changed)


@MODES
def test_a_changed_content_is_refused_or_still_traces(mode: CodecMode) -> None:
    header, content = unwrap(small_block(mode))
    refused = 0
    for changed in mutations(content, 1500):
        try:
            traces = decode_block(wrap(header, changed))
        except (CorruptBlockError, UnsupportedFormatError):
            refused += 1
        else:
            assert len(traces) == header.trace_count
            for trace in traces:
                assert trace.top_k.token_ids.size == 0 or trace.top_k.token_ids.min() >= 0
                assert trace.top_k.token_ids.size == 0 or trace.top_k.token_ids.max() < 1 << 20
    assert refused > 1000


@MODES
def test_a_changed_frame_is_refused(mode: CodecMode) -> None:
    block = small_block(mode)
    header, payload = split_block(block)
    original = decode_block(block)
    for changed in mutations(bytes(payload), 300):
        if not changed:
            continue
        try:
            traces = decode_block(rejoin(header, changed))
        except (CorruptBlockError, UnsupportedFormatError):
            continue
        # Bits of the frame that say nothing about its content may change; the content may not.
        for actual, expected in zip(traces, original, strict=True):
            assert_equal_exactly(actual, expected)


@MODES
@pytest.mark.parametrize("field", ["trace_count", "prompt_token_count", "completion_token_count"])
@pytest.mark.parametrize("change", [-1, 1, 1 << 15])
def test_a_header_that_counts_wrong_is_refused(mode: CodecMode, field: str, change: int) -> None:
    header, content = unwrap(small_block(mode))
    with pytest.raises(CorruptBlockError):
        decode_block(wrap(dataclasses.replace(header, **{field: getattr(header, field) + change}), content))


def test_a_flipped_bit_is_found_by_the_checksum() -> None:
    block = bytearray(small_block("standard"))
    block[-9] ^= 4
    with pytest.raises(CorruptBlockError, match="XXH3"):
        decode_block(bytes(block))


def test_a_frame_that_hides_or_lies_about_its_size_is_refused() -> None:
    header, content = unwrap(small_block("exact"))
    stream = zstandard.ZstdCompressor().compressobj()
    with pytest.raises(CorruptBlockError, match="declares"):
        decode_block(rejoin(header, stream.compress(content) + stream.flush()))
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(256 << 20))
    assert len(bomb) < 1 << 16
    with pytest.raises(CorruptBlockError, match="declares"):
        decode_block(rejoin(header, bomb))
    two_frames = zstandard.ZstdCompressor().compress(content) * 2
    with pytest.raises(CorruptBlockError, match="decompress"):
        decode_block(rejoin(header, two_frames))


def rebuild(content: bytes, replacements: dict[int, tuple[int, int, bytes]]) -> bytes:
    """The content with some columns, (encoding, count, bytes) each, replaced or added."""
    (count,) = struct.unpack_from("<I", content)
    columns: dict[int, tuple[int, int, bytes]] = {}
    position = 4 + 12 * count
    for index in range(count):
        number, encoding, elements, size = struct.unpack_from("<HHII", content, 4 + 12 * index)
        columns[number] = (encoding, elements, content[position : position + size])
        position += size
    columns |= replacements
    table = [
        struct.pack("<HHII", number, encoding, elements, len(data))
        for number, (encoding, elements, data) in columns.items()
    ]
    return b"".join([struct.pack("<I", len(columns)), *table, *(data for *_, data in columns.values())])


def numbers(*values: int) -> tuple[int, int, bytes]:
    return Encoding.NUMBERS, len(values), encode_numbers(np.array(values, np.int64))


TWO_ROWS = build_rows([[-0.1, -3.0], [-0.2, -2.0]], [[5, 7], [7, 9]])
"""Its dictionary is 7, 5, 9."""

LIES: dict[str, tuple[CodecMode, dict[int, tuple[int, int, bytes]]]] = {
    "no vocabulary": ("exact", {Column.VOCAB_SIZE: (Encoding.UINT32, 1, bytes(4))}),
    "vocabulary below its ids": ("exact", {Column.VOCAB_SIZE: (Encoding.UINT32, 1, struct.pack("<I", 9))}),
    "width beyond any": ("exact", {Column.TOP_K_WIDTHS: numbers(1025)}),
    "width below the rows": ("exact", {Column.TOP_K_WIDTHS: numbers(1)}),
    "positions without bytes": ("exact", {Column.KEPT: (Encoding.NUMBERS, 2, b"")}),
    "rows kept beyond the width": ("standard", {Column.KEPT: numbers(3, 1)}),
    "sampled beyond the row": ("standard", {Column.SAMPLED_RANKS: numbers(1, 3)}),
    "outside tokens missing": ("exact", {Column.SAMPLED_RANKS: numbers(1, 0)}),
    "entry behind the dictionary": ("exact", {Column.ENTRY_TOKENS: numbers(0, 1, 2, 3)}),
    "entry far behind the dictionary": ("standard", {Column.ENTRY_TOKENS: numbers(MAX_NUMBER, 1, 1, 1)}),
    "dictionary beyond the vocabulary": ("exact", {Column.DICTIONARY_TOKENS: numbers(7, 5, VOCAB_SIZE)}),
    "dictionary groups too large": ("exact", {Column.DICTIONARY_SIZES: numbers(1, 3)}),
    "dictionary group empty": ("exact", {Column.DICTIONARY_SIZES: numbers(1, 0, 2)}),
    "level too high": ("standard", {Column.ENTRY_LOGPROBS: numbers(MAX_LEVEL, 0, 1, 0)}),
    "tail level too high": ("standard", {Column.TAIL_MASS: numbers(MAX_LEVEL + 2, 0)}),
    "NaN": (
        "exact",
        {Column.ENTRY_LOGPROBS: (Encoding.FLOAT32_PLANES, 4, b"\xff" * 16)},
    ),
    "finish reason 0": ("exact", {Column.FINISH_REASONS: (Encoding.UINT8, 1, b"\0")}),
    "seed flag 2": ("exact", {Column.SEEDED: (Encoding.UINT8, 1, b"\2")}),
    "span past the end": (
        "exact",
        {
            Column.SPAN_COUNTS: numbers(1),
            Column.SPAN_KINDS: (Encoding.UINT8, 1, b"\1"),
            Column.SPAN_BOUNDS: numbers(1, 3),
        },
    ),
    "same tag twice": (
        "exact",
        {
            Column.TAG_COUNTS: numbers(2),
            Column.TAG_STRINGS: (Encoding.STRINGS, 4, struct.pack("<4I", 1, 1, 1, 1) + b"abac"),
        },
    ),
    "text that is not UTF-8": ("exact", {Column.PROMPT_IDS: (Encoding.STRINGS, 1, b"\1\0\0\0\xff")}),
    "text of another size": ("exact", {Column.PROMPT_IDS: (Encoding.STRINGS, 1, b"\2\0\0\0a")}),
    "text without sizes": ("exact", {Column.PROMPT_IDS: (Encoding.STRINGS, 1, b"\2")}),
    "table beyond the content": ("exact", {}),
}


@pytest.mark.parametrize("name", LIES)
def test_a_column_that_lies_is_refused(name: str) -> None:
    mode, replacements = LIES[name]
    block = encode_block([TWO_ROWS], mode=mode, vocab_size=VOCAB_SIZE)
    header, content = unwrap(block)
    assert decode_block(wrap(header, rebuild(content, {})))[0].prompt_id == "rows"
    changed = rebuild(content, replacements) if replacements else b"\xff" * 4 + content[4:]
    with pytest.raises(CorruptBlockError):
        decode_block(wrap(header, changed))


@pytest.mark.parametrize("positions", [MAX_NUMBER, MAX_BLOCK_ENTRIES // 2])
def test_claimed_positions_without_bytes_take_no_memory(positions: int) -> None:
    header, content = unwrap(encode_block([TWO_ROWS], mode="exact", vocab_size=VOCAB_SIZE))
    claims: dict[int, tuple[int, int, bytes]] = {
        Column.COMPLETION_LENGTHS: numbers(positions),
        Column.TOP_K_WIDTHS: numbers(1),
        Column.KEPT: (Encoding.NUMBERS, positions, bytes(2)),
    }
    claimed = wrap(dataclasses.replace(header, completion_token_count=positions), rebuild(content, claims))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptBlockError):
            decode_block(claimed)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_more_spans_than_a_block_may_hold_are_refused() -> None:
    header, content = unwrap(encode_block([TWO_ROWS], mode="exact", vocab_size=VOCAB_SIZE))
    many = MAX_BLOCK_ITEMS + 1
    claims: dict[int, tuple[int, int, bytes]] = {
        Column.SPAN_COUNTS: numbers(many),
        Column.SPAN_KINDS: (Encoding.UINT8, many, b"\1" * many),
    }
    with pytest.raises(CorruptBlockError, match="spans or tags"):
        decode_block(wrap(header, rebuild(content, claims)))


def test_unknown_columns_are_skipped_when_optional_and_refused_otherwise() -> None:
    block = small_block("exact")
    header, content = unwrap(block)
    unknown = (1, 4, b"abcd")
    skipped = decode_block(wrap(header, rebuild(content, {OPTIONAL_FROM + 999: unknown})))
    for actual, expected in zip(skipped, decode_block(block), strict=True):
        assert_equal_exactly(actual, expected)
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        decode_block(wrap(header, rebuild(content, {999: unknown})))


def test_a_column_that_is_there_twice_is_refused() -> None:
    header, content = unwrap(small_block("exact"))
    entries = content[4:16] + content[4:-1]
    doubled = struct.pack("<I", struct.unpack_from("<I", content)[0] + 1) + entries + content[-1:]
    with pytest.raises(CorruptBlockError, match="twice"):
        decode_block(wrap(header, doubled))


def test_an_unknown_encoding_is_refused() -> None:
    header, content = unwrap(small_block("exact"))
    with pytest.raises(UnsupportedFormatError, match="KEPT has encoding 77"):
        decode_block(wrap(header, rebuild(content, {Column.KEPT: (77, 8, bytes(8))})))


GOLDEN_BLOCKS: dict[CodecMode, str] = {
    "standard": """
    0a160801100218012002280230c9033948a70f554fbdede612ea0128b52ffd64c900e5060012ca1d26804bd21af38019
    850cccc09a686703dc9801201e65f00cd24cc3b1352d2281e2de64ef2d650a11c84fbbbbc5e1d030c7ee010225756651
    61116d228302e3c7ee297b6c3c34242eeeeec8132ec28101c3d58e2705b5595890b7e0caca10a8038b221070e6170578
    f3332d54d9e4c97a493d47b7a7bd212e209082b13a797d92950abfa02961119203f00c0c05db06760b0406d613b79202
    02bacbc2616d7ebcdfe009b39f33390add932f333b519b7fdc471626336c80ebccdde6c4b8e12c7cc49c6a6edf301a71
    a2f5bf3b7b580031dcc11c76cc03feea614e1bde31
    """,
    "exact": """
    0a160801100118012002280230d50339153ba6e1b17fd49d12f70128b52ffd64d5004d0700d2891e27804bd21af38019
    8544923003bb17375ca1c50c0034b503013aba8eaea3ebe83adabd37d95bca140df3d3acd2543a9a990909080ec98d68
    51671716f6d028342a32ec9e5546f9a0784460dcddcd842b413898216d4815d4c9c2625e8343d648814a3000110878e4
    1705f8e4e7b25065d3d37a8b7a8e6e4fbb4332207082213af201018aa3806af208e35827c2db38611242a00cac0bb60d
    2c0b040656069b6220a0bb2d1caccd8df717b3974151b98f236c6f5634b0f45c5c6062315fbb0f11be198a81bb99a398
    23bb8108df77cecded184623ceb33e77770f1748ccee60ce3ba607fc65c2568cd73f
    """,
}
"""Written by format version 1. Never change them: what was stored once is read for ever."""


@MODES
def test_golden_blocks_are_read_for_ever(mode: CodecMode) -> None:
    (trace,) = decode_block(bytes.fromhex(GOLDEN_BLOCKS[mode]))
    assert trace.prompt_id == "p1"
    assert trace.prompt_token_ids.tolist() == [1, 300]
    assert trace.completion_token_ids.tolist() == [5, 3]
    assert trace.top_k.token_ids.tolist() == [[5, 7], [7, 9]]
    assert trace.finish_reason == "stop"
    assert trace.sample_index == 0
    assert trace.spans == (TokenSpan("answer", 0, 2),)
    assert trace.sampling == SamplingParams(temperature=0.5, seed=7, max_tokens=2)
    assert trace.tags == {"set": "a"}
    assert trace.completion_text == "hi"
    values = (trace.top_k.logprobs, trace.top_k.tail_mass, trace.sampled_logprobs)
    if mode == "exact":
        expected = ([[-0.25, -2.0], [-0.5, -1.5]], [0.0859375, np.float32(0.17)], [-0.25, -4.0])
        for actual, given in zip(values, expected, strict=True):
            np.testing.assert_array_equal(actual, np.array(given, np.float32))
        return
    # Computed by hand from docs/format.md; another platform's logarithm may differ in the last bit.
    rows = 2 * np.log(1 - np.array([[17, 90], [32, 75]]) * 0.007)
    tails = (1 - np.array([101, 84]) * 0.007) ** 2
    for actual, computed in zip(values, (rows, tails, np.array([rows[0, 0], -4.0])), strict=True):
        np.testing.assert_allclose(actual, computed, rtol=1e-6)


def test_the_worked_example_of_the_format_page_is_the_golden_block() -> None:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    block = "".join(GOLDEN_BLOCKS["standard"].split())
    assert block in page.replace("\n", "")
    _, content = unwrap(bytes.fromhex(block))
    position = 4 + 12 * content[0]
    for line in page.split("size  bytes\n")[1].split("```")[0].splitlines():
        number, name, encoding, count, size, *data = line.split()
        assert (Column[name], len(data)) == (int(number), int(size))
        assert content[position : position + len(data)] == bytes.fromhex("".join(data))
        entry = struct.pack("<HHII", int(number), Encoding[encoding], int(count), len(data))
        assert entry in content
        position += len(data)
    assert position == len(content)
