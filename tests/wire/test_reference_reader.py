"""docs/format.md suffices to read what lynearm writes: a reader written from it finds the same."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from wire import reference_reader as reference
from wire.building import draw_tails

from lynearm.wire.blocks import BlockHeader, checksum, join_block, split_block
from lynearm.wire.code_tables import SymbolCounts, build_tables
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.dictionaries import Dictionary, DictionaryReader
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.errors import CodecError, InvalidInputError, UnsupportedFormatError
from lynearm.wire.specs import CodecMode, CodecSpec
from lynearm.wire.traces import SamplingParams, TokenSpan, TopK, Trace

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "format.md").read_text()

VOCAB_SIZE = 6000
DRAWS = 64
GRID_MODES: tuple[CodecMode, ...] = ("fine", "standard", "compact")

# T = rows, K = entries, V = vocabulary
Float32Array = npt.NDArray[np.float32]
Teacher = Callable[[np.random.Generator, int], Float32Array]


def float32_logits(rng: np.random.Generator, rows: int) -> Float32Array:
    slope = rng.uniform(1, 4, (rows, 1))
    logits = rng.normal(0, 1, (rows, VOCAB_SIZE)) - slope * np.log1p(rng.permutation(VOCAB_SIZE))
    return logits.astype(np.float32)


def bf16_logits(rng: np.random.Generator, rows: int) -> Float32Array:
    bits = (float32_logits(rng, rows) + np.float32(9)).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def fp16_logits(rng: np.random.Generator, rows: int) -> Float32Array:
    return (float32_logits(rng, rows) + np.float32(9)).astype(np.float16).astype(np.float32)


def log_softmax(logits_TV: Float32Array) -> Float32Array:
    below_top = logits_TV - logits_TV.max(axis=1, keepdims=True)
    return (below_top - np.log(np.exp(below_top).sum(axis=1, keepdims=True))).astype(np.float32)


def keep(logprobs_TV: Float32Array, k: int) -> TopK:
    ids = np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :k].astype(np.int32)
    kept = np.take_along_axis(logprobs_TV, ids, axis=1)
    tail = 1 - np.exp(kept.astype(np.float64)).sum(axis=1)
    return TopK(ids, kept, np.maximum(tail, 0).astype(np.float32))


def keep_draws(rng: np.random.Generator, logprobs_TV: Float32Array) -> TopK:
    shape = (len(logprobs_TV), DRAWS)
    ids, logprobs = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
    for t, row in enumerate(np.exp(logprobs_TV.astype(np.float64))):
        counts = rng.multinomial(DRAWS, row / row.sum())
        drawn = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        ids[t, : drawn.size], logprobs[t, : drawn.size] = drawn, np.log(counts[drawn] / DRAWS)
    return TopK(ids, logprobs, np.zeros(len(ids), np.float32))


def build_trace(
    seed: int,
    rows: int,
    k: int,
    *,
    mode: CodecMode = "standard",
    teacher: Teacher = float32_logits,
    prompt: int = 5,
    scored: bool = False,
    **overrides: Any,
) -> Trace:
    """A teacher's rows over the whole vocabulary; sampled tokens often lie outside the kept ones."""
    rng = np.random.default_rng(seed)
    prompt_ids = rng.integers(0, VOCAB_SIZE, prompt).astype(np.int32)

    def score(count: int, ids: npt.NDArray[np.int32] | None = None) -> tuple[TopK, Any, Float32Array]:
        logprobs = log_softmax(teacher(rng, count))
        if ids is None:
            ids = np.array([rng.choice(VOCAB_SIZE, p=p / p.sum()) for p in np.exp(logprobs)], np.int32)
        top_k = keep_draws(rng, logprobs) if mode == "sampled" else keep(logprobs, k)
        return top_k, ids, np.take_along_axis(logprobs, ids[:, None], axis=1)[:, 0]

    top_k, sampled, sampled_logprobs = score(rows)
    fields: dict[str, Any] = {
        "prompt_id": f"prompt-{seed}",
        "prompt_token_ids": prompt_ids,
        "completion_token_ids": sampled,
        "sampled_logprobs": sampled_logprobs,
        "top_k": top_k,
        "finish_reason": "stop",
    }
    if scored:
        prompt_top_k, _, prompt_logprobs = score(prompt - 1, prompt_ids[1:])
        fields |= {"prompt_top_k": prompt_top_k, "prompt_logprobs": prompt_logprobs}
    return Trace(**{**fields, **overrides})


def build_block(
    seed: int, rows: int, *, mode: CodecMode, teacher: Teacher = float32_logits, k: int = 12
) -> list[Trace]:
    """Traces of every kind, `rows` rows or a few more in all."""

    def build(number: int, rows: int, k: int, **overrides: Any) -> Trace:
        return build_trace(seed * 100 + number, rows, k, mode=mode, teacher=teacher, **overrides)

    sampling = SamplingParams(temperature=0.7, top_p=0.9, min_p=0.01, top_k=5, max_tokens=99, seed=-3)
    described: dict[str, Any] = {"tags": {"set": "α", "b": ""}, "completion_text": "Grüße", "sample_index": 3}
    penalised = SamplingParams(
        presence_penalty=0.5,
        frequency_penalty=-2.0,
        repetition_penalty=1.25,
        min_tokens=2,
        stop=("\n\n", "Ende."),
        stop_token_ids=(0, 11),
    )
    return [
        build(0, rows - 12, k, sampling=sampling, spans=(TokenSpan("answer", 0, 1),), **described),
        build(1, 0, k, sampling=sampling, finish_reason="abort"),
        build(2, 5, k + 3, scored=True, prompt=4, finish_reason="length"),
        build(3, 2, 0, prompt=0),
        build(4, 2, 1, sampling=SamplingParams(temperature=0.0)),
        build(5, 2, 1, sampling=penalised, finish_reason="stop", stop_string="Ende."),
    ]


def ulps(ours: float, theirs: float) -> float:
    """Distance in units of the last place of a float32; 0 and −0 are one."""
    if ours == theirs:
        return 0.0
    spacing = float(np.spacing(np.float32(max(abs(ours), abs(theirs)))))
    return abs(ours - theirs) / spacing


def assert_same(ours: Trace, theirs: reference.Trace, *, mode: CodecMode) -> None:
    said = theirs.metadata
    assert (ours.prompt_id, ours.sample_index, ours.completion_text) == (
        said.prompt_id,
        said.sample_index,
        said.completion_text,
    )
    assert ours.tags == {tag.key: tag.value for tag in said.tags}
    assert [(span.start, span.end) for span in ours.spans] == [
        (span.start, span.start + span.length) for span in said.spans
    ]
    # As text, since NaN, which a damaged block may say, is not equal to itself.
    assert repr(ours.sampling) == repr(
        SamplingParams(
            temperature=said.sampling.temperature,
            top_p=said.sampling.top_p,
            min_p=said.sampling.min_p,
            top_k=said.sampling.top_k,
            max_tokens=said.sampling.max_tokens,
            seed=said.sampling.seed if said.sampling.HasField("seed") else None,
            presence_penalty=said.sampling.presence_penalty,
            frequency_penalty=said.sampling.frequency_penalty,
            repetition_penalty=said.sampling.repetition_penalty or 1.0,
            min_tokens=said.sampling.min_tokens,
            stop=tuple(said.sampling.stop),
            stop_token_ids=tuple(said.sampling.stop_token_ids),
        )
    )
    assert ours.stop_string == ("", *ours.sampling.stop)[said.stop_number]
    assert ["stop", "length", "abort"].index(ours.finish_reason) + 1 == said.finish_reason
    assert ours.prompt_token_ids.tolist() == theirs.prompt_token_ids
    assert ours.completion_token_ids.tolist() == theirs.completion_token_ids
    assert_same_rows(ours.top_k, ours.sampled_logprobs, theirs.completion_rows, mode)
    if ours.prompt_top_k is None or ours.prompt_logprobs is None:
        assert theirs.prompt_rows == []
    else:
        assert_same_rows(ours.prompt_top_k, ours.prompt_logprobs, theirs.prompt_rows, mode)


def assert_same_rows(
    top_k: TopK, sampled_logprobs: Float32Array, rows: Sequence[reference.Row], mode: CodecMode
) -> None:
    logprob_ulps, tail_ulps = (0, 0) if mode == "exact" else (1, 4 if mode in GRID_MODES else 0)
    assert top_k.positions == len(rows)
    for t, row in enumerate(rows):
        padding = top_k.k - len(row.token_ids)
        assert top_k.token_ids[t].tolist() == row.token_ids + [0] * padding
        pairs = list(zip(top_k.logprobs[t].tolist(), row.logprobs + [-math.inf] * padding, strict=True))
        pairs.append((float(sampled_logprobs[t]), row.sampled_logprob))
        assert all(ulps(a, b) <= logprob_ulps for a, b in pairs)
        if mode == "exact":
            assert all(math.copysign(1, a) == math.copysign(1, b) for a, b in pairs)
        assert ulps(float(top_k.tail_mass[t]), row.tail_mass) <= tail_ulps
        assert (top_k.tail_draws is None) == (row.tail_draws is None)
        if top_k.tail_draws is not None:
            assert top_k.tail_draws[t].tolist() == (row.tail_draws or [-1] * top_k.tail_draw_count)


def assert_both_read(block: bytes, *, mode: CodecMode, dictionary: Dictionary | None = None) -> None:
    find = (lambda digest: dictionary.encoded) if dictionary is not None else None
    ours = decode_block(block, dictionaries=DictionaryReader(find))
    theirs = reference.read_block(block, find)
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert_same(our, their, mode=mode)


KINDS = pytest.mark.parametrize(
    ("mode", "teacher"),
    [
        ("exact", float32_logits),
        ("exact", bf16_logits),
        ("exact", fp16_logits),
        ("fine", float32_logits),
        ("standard", float32_logits),
        ("compact", float32_logits),
        ("sampled", float32_logits),
    ],
    ids=["exact", "exact-bf16", "exact-fp16", "fine", "standard", "compact", "sampled"],
)


def codec(mode: CodecMode, min_probability: float = 0.0, tail_draws: int = 0) -> CodecSpec:
    draws = DRAWS if mode == "sampled" else 0
    return CodecSpec(mode, min_probability=min_probability, draws=draws, tail_draws=tail_draws)


@KINDS
@pytest.mark.parametrize("rows", [20, 70], ids=["one-lane", "four-lanes"])
@pytest.mark.parametrize("with_dictionary", [False, True], ids=["own-tables", "dictionary"])
def test_both_readers_find_the_same(
    mode: CodecMode, teacher: Teacher, rows: int, with_dictionary: bool
) -> None:
    spec = codec(mode)
    dictionary = None
    if with_dictionary:
        dictionary = train_dictionary(
            [build_block(1, 40, mode=mode, teacher=teacher)], codec=spec, vocab_size=VOCAB_SIZE
        )
    traces = build_block(2, rows, mode=mode, teacher=teacher)
    block = encode_block(traces, codec=spec, vocab_size=VOCAB_SIZE, dictionary=dictionary)
    assert_both_read(block, mode=mode, dictionary=dictionary)


@KINDS
def test_both_readers_find_the_same_in_a_short_block(mode: CodecMode, teacher: Teacher) -> None:
    spec = codec(mode)
    dictionary = train_dictionary(
        [build_block(1, 40, mode=mode, teacher=teacher)], codec=spec, vocab_size=VOCAB_SIZE
    )
    # So few rows train them no better than the first codes, which here know nothing.
    unknowing = build_tables(
        SymbolCounts.zeros(), merge=0, level_rule=dictionary.tables.level_rule, with_escapes=True
    )
    dictionary = dataclasses.replace(dictionary, tables=unknowing)
    traces = build_block(2, 16, mode=mode, teacher=teacher)[:1]
    block = encode_block(traces, codec=spec, vocab_size=VOCAB_SIZE, dictionary=dictionary)
    assert split_block(block)[1][flags_at(block)] & 64
    assert_both_read(block, mode=mode, dictionary=dictionary)


@KINDS
@pytest.mark.parametrize("with_dictionary", [False, True], ids=["own-order", "order-of-dictionary"])
def test_both_readers_find_the_same_in_a_large_block_of_adaptive_rows(
    mode: CodecMode, teacher: Teacher, with_dictionary: bool
) -> None:
    """With a dictionary too, the block has tables of its own."""
    spec = codec(mode, 1e-4)
    dictionary = None
    if with_dictionary:
        dictionary = train_dictionary(
            [build_block(1, 40, mode=mode, teacher=teacher)], codec=spec, vocab_size=VOCAB_SIZE
        )
    traces = build_block(3, 160, mode=mode, teacher=teacher, k=80)
    block = encode_block(traces, codec=spec, vocab_size=VOCAB_SIZE, dictionary=dictionary)
    assert_both_read(block, mode=mode, dictionary=dictionary)


@pytest.mark.parametrize("tail_draws", [1, 5])
@pytest.mark.parametrize("rows", [16, 70, 400], ids=["few-rows", "four-lanes", "many-rows"])
@pytest.mark.parametrize("trained_on", [None, 0, 1], ids=["own-tables", "no-codes", "codes"])
@pytest.mark.parametrize("min_probability", [0.0, 1e-3], ids=["all", "adaptive"])
def test_both_readers_find_the_same_draws_from_the_tails(
    tail_draws: int, rows: int, trained_on: int | None, min_probability: float
) -> None:
    """In draw codes, the block's or a dictionary's, or in plain bits where a dictionary has none."""
    dictionary = None
    if trained_on is not None:
        known = build_block(1, 40, mode="standard")
        spec = codec("standard", min_probability, trained_on)
        if trained_on:
            known = [draw_tails(trace, trained_on, VOCAB_SIZE) for trace in known]
        dictionary = train_dictionary([known], codec=spec, vocab_size=VOCAB_SIZE)
        assert (dictionary.tables.draw_lengths is None) == (trained_on == 0)
    traces = [draw_tails(trace, tail_draws, VOCAB_SIZE) for trace in build_block(2, rows, mode="standard")]
    spec = codec("standard", min_probability, tail_draws)
    block = encode_block(traces, codec=spec, vocab_size=VOCAB_SIZE, dictionary=dictionary)
    assert_both_read(block, mode="standard", dictionary=dictionary)


@pytest.mark.parametrize("mode", ["exact", "standard"])
def test_both_readers_find_the_same_in_rows_without_entries(mode: CodecMode) -> None:
    traces = [build_trace(4, 3, 0), build_trace(5, 0, 0)]
    for some in (traces, [draw_tails(trace, 2, VOCAB_SIZE) for trace in traces]):
        assert_both_read(encode_block(some, codec=mode, vocab_size=VOCAB_SIZE), mode=mode)


@pytest.mark.parametrize("mode", ["exact", "standard"])
def test_both_readers_find_the_same_at_the_limits_of_k_and_v(mode: CodecMode) -> None:
    rng = np.random.default_rng(6)
    ids = rng.permutation(1 << 20)[:2048].astype(np.int32).reshape(2, 1024)
    # Ties over whole octaves of ranks, and logprobs that no grid reaches.
    logprobs = -np.float32(5) - np.floor(np.arange(1024, dtype=np.float32) / 100) * np.float32(90)
    trace = Trace(
        prompt_id="limits",
        prompt_token_ids=np.array([(1 << 20) - 1], np.int32),
        completion_token_ids=np.array([1 << 19, ids[1, 1023]], np.int32),
        sampled_logprobs=np.array([-np.inf, logprobs[1023]], np.float32),
        top_k=TopK(ids, np.stack([logprobs, logprobs]), np.array([0.25, 0.0], np.float32)),
        finish_reason="length",
    )
    assert_both_read(encode_block([trace], codec=mode, vocab_size=1 << 20), mode=mode)


def test_both_readers_keep_the_sign_of_zero() -> None:
    trace = build_trace(13, 2, 1)
    certain = np.array([[-0.0], [0.0]], np.float32)
    top_k = TopK(trace.top_k.token_ids, certain, np.zeros(2, np.float32))
    block = encode_block([dataclasses.replace(trace, top_k=top_k)], codec="exact", vocab_size=VOCAB_SIZE)
    assert_both_read(block, mode="exact")
    assert [math.copysign(1, row.logprobs[0]) for row in reference.read_block(block)[0].completion_rows] == [
        -1,
        1,
    ]


def test_metadata_are_compressed_or_not() -> None:
    traces = [build_trace(7, 2, 2, completion_text="again and " * 50), build_trace(8, 2, 2)]
    for chosen in (traces, traces[1:]):
        block = encode_block(chosen, vocab_size=VOCAB_SIZE)
        assert_both_read(block, mode="standard")


def rebuild(block: bytes, payload: bytes, **overrides: Any) -> bytes:
    """The block with another payload, whose checksum holds."""
    header, _ = split_block(block)
    fields = {name: getattr(header, name) for name in BlockHeader.__dataclass_fields__}
    fields |= {"payload_xxh3": checksum(payload), **overrides}
    return join_block(BlockHeader(**fields), payload)


def flags_at(block: bytes) -> int:
    """Where the rows part begins in the payload of a block with little metadata."""
    header, payload = split_block(block)
    assert header.uncompressed_size_bytes == 0
    assert payload[0] < 128
    return 1 + payload[0]


def test_both_readers_refuse_what_is_newer() -> None:
    block = encode_block([build_trace(9, 3, 4)], vocab_size=VOCAB_SIZE)
    payload = bytearray(split_block(block)[1])
    newer_draws, newer_scale = payload.copy(), payload.copy()
    newer_draws[flags_at(block)] |= 128
    newer_draws.insert(flags_at(block) + 1, 17)
    newer_scale[flags_at(block) + 3] = 5
    for refused in (
        rebuild(block, bytes(payload), format_version=3),
        rebuild(block, bytes(newer_draws)),
        rebuild(block, bytes(newer_scale)),
    ):
        with pytest.raises(reference.NewerError):
            reference.read_block(refused)
        with pytest.raises(UnsupportedFormatError):
            decode_block(refused)


@KINDS
def test_what_the_reference_reader_accepts_both_read_alike(mode: CodecMode, teacher: Teacher) -> None:
    """Damaged blocks: the page refuses at least what lynearm refuses, and otherwise says what comes out."""
    traces = build_block(10, 20, mode=mode, teacher=teacher, k=4)
    assert_damage_is_read_alike(encode_block(traces, codec=codec(mode), vocab_size=VOCAB_SIZE), mode)


@pytest.mark.parametrize("mode", ["exact", "standard"])
def test_what_the_reference_reader_accepts_of_tail_draws_both_read_alike(mode: CodecMode) -> None:
    traces = [draw_tails(trace, 3, VOCAB_SIZE) for trace in build_block(10, 20, mode=mode, k=4)]
    spec = codec(mode, tail_draws=3)
    assert_damage_is_read_alike(encode_block(traces, codec=spec, vocab_size=VOCAB_SIZE), mode)


def assert_damage_is_read_alike(block: bytes, mode: CodecMode) -> None:
    payload = bytes(split_block(block)[1])
    chance = random.Random(11)
    accepted = 0
    for _ in range(150):
        damaged = bytearray(payload)
        damaged[chance.randrange(len(payload))] ^= 1 << chance.randrange(8)
        whole = rebuild(block, bytes(damaged))
        try:
            theirs = reference.read_block(whole)
        except (reference.CorruptError, reference.NewerError):
            continue
        accepted += 1
        for our, their in zip(decode_block(whole), theirs, strict=True):
            assert_same(our, their, mode=mode)
    assert accepted > 10


def test_lynearm_refuses_with_its_own_errors_whatever_the_reference_reader_refuses() -> None:
    block = encode_block(build_block(12, 20, mode="standard", k=4), vocab_size=VOCAB_SIZE)
    payload = bytes(split_block(block)[1])
    for size in range(1, len(payload), 7):
        cut = rebuild(block, payload[:size])
        with pytest.raises((reference.CorruptError, reference.NewerError)):
            reference.read_block(cut)
        with pytest.raises((CodecError, InvalidInputError)):
            decode_block(cut)


def fences(language: str = "") -> list[str]:
    """Code blocks of the worked example."""
    section = PAGE.split("## A worked example\n")[1]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def example_block() -> bytes:
    return bytes.fromhex(fences()[0])


def test_the_worked_example_is_what_its_script_makes_of_it() -> None:
    path = ROOT / "docs" / "examples" / "format_example.py"
    described = importlib.util.spec_from_file_location("format_example", path)
    assert described is not None
    assert described.loader is not None
    script = importlib.util.module_from_spec(described)
    described.loader.exec_module(script)
    assert PAGE.split("## A worked example\n\n")[1] == script.render(example_block())


def test_the_bytes_and_bits_of_the_worked_example_are_its_block() -> None:
    _, parts, _, stream = fences()
    block = example_block()
    assert bytes.fromhex("".join(line[:48] for line in parts.splitlines())) == block
    bits = "".join(line[:40].replace(" ", "") for line in stream.splitlines())
    assert len(bits) % 8 == 0
    assert block.endswith(bytes(int(bits[start : start + 8][::-1], 2) for start in range(0, len(bits), 8)))


def test_both_readers_find_the_values_that_the_worked_example_states() -> None:
    stated = json.loads(fences("json")[0])
    (ours,) = decode_block(example_block())
    (theirs,) = reference.read_block(example_block())
    assert_same(ours, theirs, mode="standard")
    assert ours.prompt_id == stated["prompt_id"]
    assert ours.prompt_token_ids.tolist() == stated["prompt_token_ids"]
    assert ours.completion_token_ids.tolist() == stated["completion_token_ids"]
    assert ours.sampled_logprobs.tolist() == pytest.approx(stated["sampled_logprobs"], abs=2e-7)
    assert [row.token_ids for row in theirs.completion_rows] == stated["token_ids"]
    for row, logprobs in zip(theirs.completion_rows, stated["logprobs"], strict=True):
        assert row.logprobs == pytest.approx(logprobs, abs=2e-7)
    assert ours.top_k.tail_mass.tolist() == pytest.approx(stated["tail_mass"], abs=2e-7)
    assert (ours.sampling.temperature, ours.sampling.max_tokens, ours.sampling.seed) == (
        stated["temperature"],
        stated["max_tokens"],
        stated["seed"],
    )
    assert ours.tags == stated["tags"]
