"""What is no trace is not encoded, and what another version may write is refused politely."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from wire.building import VOCAB_SIZE, build_rows, build_sampled_trace, build_trace, replace_top_k
from wire.mutation import put_together, rejoin, take_apart

from lynearm.v1 import trace_pb2
from lynearm.wire.blocks import MAX_BLOCK_ENTRIES, checksum, join_block, split_block, verify_block
from lynearm.wire.codec import decode_block, decode_rows, encode_block
from lynearm.wire.errors import CodecError, CorruptBlockError, InvalidInputError, UnsupportedFormatError
from lynearm.wire.row_layout import TAIL_DRAWS
from lynearm.wire.specs import CODEC_MODES, MAX_TAIL_DRAWS, MAX_TOP_K, CodecSpec
from lynearm.wire.traces import SamplingParams, TokenSpan, TopK, Trace


def repeat_first_id(trace: Trace) -> Trace:
    token_ids = trace.top_k.token_ids.copy()
    token_ids[3, 9] = token_ids[3, 0]
    return replace_top_k(trace, token_ids=token_ids)


def repeat_id_on_its_level(trace: Trace) -> Trace:
    token_ids, logprobs = trace.top_k.token_ids.copy(), trace.top_k.logprobs.copy()
    token_ids[3, 9], logprobs[3, 9] = token_ids[3, 8], logprobs[3, 8]
    return replace_top_k(trace, token_ids=token_ids, logprobs=logprobs)


def full(value: float) -> Any:
    return np.full(24, value, np.float32)


BAD_SAMPLING = {
    r"presence_penalty -2\.5 is outside -2\.\.2": SamplingParams(presence_penalty=-2.5),
    r"frequency_penalty nan is outside -2\.\.2": SamplingParams(frequency_penalty=float("nan")),
    r"repetition_penalty 0\.0 is not above 0": SamplingParams(repetition_penalty=0.0),
    r"repetition_penalty inf is not above 0": SamplingParams(repetition_penalty=float("inf")),
    "min_tokens -1 is negative": SamplingParams(min_tokens=-1),
    "65 stop strings, at most 64": SamplingParams(stop=tuple(map(str, range(65)))),
    "a stop string has 1026 bytes, at most 1024": SamplingParams(stop=("ä" * 513,)),
    "a stop string is empty": SamplingParams(stop=("",)),
    "a stop string is there twice": SamplingParams(stop=("a", "a")),
    "257 stop tokens, at most 256": SamplingParams(stop_token_ids=tuple(range(257))),
    r"stop tokens \(-1,\) are not all token ids": SamplingParams(stop_token_ids=(-1,)),
    "stop tokens .* are not all token ids": SamplingParams(stop_token_ids=(1 << 31,)),
    "a stop token is there twice": SamplingParams(stop_token_ids=(3, 3)),
}

BAD_TRACES: dict[str, tuple[Callable[[Trace], Trace], str]] = {
    "prompt id too long": (lambda t: dataclasses.replace(t, prompt_id="é" * 129), "256 bytes"),
    "id beyond the vocabulary": (
        lambda t: replace_top_k(t, token_ids=t.top_k.token_ids + np.int32(VOCAB_SIZE)),
        "'prompt-2' has kept token ids outside 0..49151",
    ),
    "negative id": (lambda t: replace_top_k(t, token_ids=-1 - t.top_k.token_ids), "kept token ids"),
    "negative prompt id": (
        lambda t: dataclasses.replace(t, prompt_token_ids=np.array([-1], np.int32)),
        "prompt token ids",
    ),
    "sampled id beyond the vocabulary": (
        lambda t: dataclasses.replace(t, completion_token_ids=np.full(24, VOCAB_SIZE, np.int32)),
        "sampled token ids",
    ),
    "one token twice in a row": (repeat_first_id, "position 27 of the block names one token twice"),
    "one token twice on a level": (repeat_id_on_its_level, "position 27 of the block names one token twice"),
    "unsorted rows": (
        lambda t: replace_top_k(t, logprobs=np.ascontiguousarray(t.top_k.logprobs[:, ::-1])),
        "sorted",
    ),
    "logits, not logprobs": (
        lambda t: replace_top_k(t, logprobs=t.top_k.logprobs + np.float32(20)),
        "kept logprobs above 0",
    ),
    "infinite logprobs": (
        lambda t: replace_top_k(t, logprobs=np.full((24, 16), np.inf, np.float32)),
        "kept logprobs above 0",
    ),
    "tail above 1": (lambda t: replace_top_k(t, tail_mass=t.top_k.tail_mass + np.float32(1.5)), "tail mass"),
    "tail below 0": (lambda t: replace_top_k(t, tail_mass=full(-0.5)), "tail mass"),
    "infinite tail": (lambda t: replace_top_k(t, tail_mass=full(np.inf)), "tail mass"),
    "infinite sampled logprob": (
        lambda t: dataclasses.replace(t, sampled_logprobs=full(np.inf)),
        "sampled logprobs",
    ),
    "lone surrogate": (lambda t: dataclasses.replace(t, completion_text="\ud800"), "prompt-2"),
    "lone surrogate in a tag": (lambda t: dataclasses.replace(t, tags={"a": "\udfff"}), "prompt-2"),
    "seed of 70 bits": (lambda t: dataclasses.replace(t, sampling=SamplingParams(seed=1 << 70)), "prompt-2"),
    "stop string that nobody asked for": (
        lambda t: dataclasses.replace(t, finish_reason="stop", stop_string="\n"),
        "none that could have ended it",
    ),
    "stop string of a completion that ran out": (
        lambda t: dataclasses.replace(
            t, finish_reason="length", stop_string="\n", sampling=SamplingParams(stop=("\n",))
        ),
        "none that could have ended it",
    ),
    **{
        problem: (lambda t, sampling=sampling: dataclasses.replace(t, sampling=sampling), problem)
        for problem, sampling in BAD_SAMPLING.items()
    },
    "sample index of 70 bits": (lambda t: dataclasses.replace(t, sample_index=1 << 70), "prompt-2"),
    "NaN in rows": (lambda t: replace_top_k(t, logprobs=np.full((24, 16), np.nan, np.float32)), "NaN"),
    "NaN in tails": (lambda t: replace_top_k(t, tail_mass=full(np.nan)), "tail_mass holds NaN"),
    "NaN sampled": (
        lambda t: dataclasses.replace(t, sampled_logprobs=full(np.nan)),
        "sampled_logprobs holds NaN",
    ),
    "float64 rows": (
        lambda t: replace_top_k(t, logprobs=t.top_k.logprobs.astype(np.float64)),
        "dtype float64",
    ),
    "one logprob too few": (
        lambda t: dataclasses.replace(t, sampled_logprobs=t.sampled_logprobs[1:]),
        "shape",
    ),
    "span past the end": (
        lambda t: dataclasses.replace(t, spans=(TokenSpan("answer", 20, 25),)),
        "span",
    ),
    "logprobs of prompt rows that are not there": (
        lambda t: dataclasses.replace(t, prompt_logprobs=np.zeros(6, np.float32)),
        "come together",
    ),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_what_is_no_trace_is_refused(name: str) -> None:
    spoil, message = BAD_TRACES[name]
    with pytest.raises(CodecError, match=message):
        encode_block([build_trace(1), spoil(build_trace(2))], vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("mode", CODEC_MODES)
def test_nan_that_was_put_in_later_is_refused(mode: Any) -> None:
    """A trace is checked when it is made, but its arrays may be written to."""
    spec = CodecSpec(mode, draws=9 if mode == "sampled" else 0)
    for name in ("logprobs", "tail_mass", "sampled_logprobs"):
        trace = build_sampled_trace(draws=9) if mode == "sampled" else build_trace()
        array = trace.sampled_logprobs if name == "sampled_logprobs" else getattr(trace.top_k, name)
        array.flat[array.size // 2 + 1] = np.nan
        with pytest.raises(CodecError):
            encode_block([trace], codec=spec, vocab_size=VOCAB_SIZE)


def test_no_traces_and_bad_arguments_are_refused() -> None:
    with pytest.raises(CodecError, match="0 traces"):
        encode_block([], vocab_size=VOCAB_SIZE)
    for vocab_size in (0, -1, (1 << 20) + 1):
        with pytest.raises(CodecError, match="vocab_size"):
            encode_block([build_trace()], vocab_size=vocab_size)
    with pytest.raises(CodecError, match="mode 'lossless'"):
        encode_block([build_trace()], codec="lossless", vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(CodecError, match="draws"):
        encode_block([build_sampled_trace()], codec="sampled", vocab_size=VOCAB_SIZE)
    with pytest.raises(CodecError, match="draws"):
        encode_block(
            [build_sampled_trace()], codec=CodecSpec("sampled", draws=1 << 17), vocab_size=VOCAB_SIZE
        )


def test_too_much_for_one_block_is_refused_with_the_way_out() -> None:
    rng = np.random.default_rng(0)
    text = "".join(map(chr, rng.integers(32, 0xD000, 3 << 19)))
    with pytest.raises(CodecError, match="fewer traces"):
        encode_block([build_trace(completion_text=text)], vocab_size=VOCAB_SIZE)
    with pytest.raises(CodecError, match="fewer traces"):
        encode_block([build_trace(completion_text="a" * (65 << 20))], vocab_size=VOCAB_SIZE)
    wide = empty_rows(MAX_BLOCK_ENTRIES // MAX_TOP_K + 1, MAX_TOP_K)
    with pytest.raises(CodecError, match="fewer traces"):
        encode_block([wide], vocab_size=VOCAB_SIZE)
    prompt = np.zeros(MAX_BLOCK_ENTRIES + 1, np.int32)
    with pytest.raises(CodecError, match="fewer traces"):
        encode_block([build_trace(prompt_token_ids=prompt)], vocab_size=VOCAB_SIZE)
    with pytest.raises(CodecError, match="at most 1024"):
        encode_block([empty_rows(1, MAX_TOP_K + 1)], vocab_size=VOCAB_SIZE)
    with pytest.raises(CodecError, match="65537 traces"):
        encode_block([build_trace(positions=0)] * 65537, vocab_size=VOCAB_SIZE)


def empty_rows(positions: int, width: int) -> Trace:
    shape = (positions, width)
    rows = TopK(
        np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32), np.ones(positions, np.float32)
    )
    return build_trace(
        top_k=rows,
        completion_token_ids=np.zeros(positions, np.int32),
        sampled_logprobs=np.zeros(positions, np.float32),
    )


BLOCK = encode_block([build_rows([[-0.5, -1.5]], [[3, 4]])], codec="exact", vocab_size=9)


def with_header(**fields: int) -> bytes:
    message = trace_pb2.Block.FromString(BLOCK)
    for name, value in fields.items():
        setattr(message.header, name, value)
    return message.SerializeToString()


def test_a_block_of_a_newer_version_or_an_unknown_mode_is_refused_politely() -> None:
    for block in (
        with_header(format_version=3),
        with_header(format_version=2**32 - 1),
        with_header(codec_mode=6),
    ):
        for read in (split_block, verify_block, decode_block, decode_rows):
            with pytest.raises(UnsupportedFormatError, match=r"this package reads versions up to 2.*upgrade"):
                read(block)


def test_what_a_payload_says_that_is_not_known_here_is_refused_politely() -> None:
    pieces = take_apart(BLOCK)
    for later in (
        dataclasses.replace(pieces, flags=pieces.flags | TAIL_DRAWS, draws=MAX_TAIL_DRAWS + 1),
        dataclasses.replace(pieces, flags=pieces.flags | TAIL_DRAWS, draws=0xFF),
        dataclasses.replace(pieces, scale=b"\5"),
        dataclasses.replace(pieces, scale=b"\xff"),
    ):
        with pytest.raises(UnsupportedFormatError, match="upgrade"):
            decode_block(put_together(later))


def test_fields_that_a_later_header_or_metadata_has_are_skipped() -> None:
    pieces = take_apart(BLOCK)
    later = trace_pb2.BlockMetadata.FromString(pieces.metadata).SerializeToString() + b"\xa2\x06\x03abc"
    trace = decode_block(put_together(dataclasses.replace(pieces, metadata=later)))[0]
    assert trace.prompt_id == "rows"
    header = trace_pb2.Block.FromString(BLOCK).header.SerializeToString() + b"\xa0\x06\x01"
    _, payload = split_block(BLOCK)
    whole = b"\x0a" + bytes((len(header),)) + header + b"\x12" + bytes((len(payload),)) + bytes(payload)
    assert decode_block(whole)[0].prompt_id == "rows"


def test_blocks_of_version_1_have_no_modes_that_came_later_and_no_rows() -> None:
    for mode in ("fine", "compact", "sampled"):
        with pytest.raises(CorruptBlockError, match="came later"):
            decode_block(as_version_1(codec_mode=mode))
    with pytest.raises(CodecError, match="decode_block only"):
        decode_rows(as_version_1())


def as_version_1(**fields: Any) -> bytes:
    header, payload = split_block(BLOCK)
    old = {"format_version": 1, "uncompressed_size_bytes": 1, "dictionary_digest": b""}
    return rejoin(dataclasses.replace(header, **(old | fields)), bytes(payload))


@pytest.mark.parametrize("field", ["codec_mode", "trace_count", "uncompressed_size_bytes"])
def test_what_later_blocks_may_leave_out_is_missed_in_version_1(field: str) -> None:
    message = trace_pb2.Block.FromString(as_version_1(codec_mode="standard"))
    message.header.ClearField(field)
    with pytest.raises(UnsupportedFormatError if field == "codec_mode" else CorruptBlockError):
        verify_block(message.SerializeToString())


def test_what_is_usual_takes_no_bytes() -> None:
    header, payload = split_block(encode_block([build_rows([[-0.5]], [[3]])], vocab_size=300))
    message = trace_pb2.Block.FromString(join_block(header, bytes(payload))).header
    said = {field.name for field, _ in message.ListFields()}
    assert said == {"format_version", "completion_token_count", "payload_xxh3_low"}
    assert (header.codec_mode, header.trace_count, header.uncompressed_size_bytes) == ("standard", 1, 0)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"abc", b"\x0a\0\x12\0", BLOCK[:20], BLOCK + BLOCK, BLOCK[1:], b"\x0a\x02\x08"],
    ids=lambda data: f"{len(data)} bytes",
)
def test_bytes_that_are_no_block_are_refused(data: bytes) -> None:
    for read in (split_block, verify_block, decode_block, decode_rows):
        with pytest.raises(InvalidInputError, match="not a"):
            read(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trace_count", 1 << 17),
        ("uncompressed_size_bytes", (64 << 20) + 1),
        ("payload_xxh3_low", 1),
    ],
)
def test_a_header_out_of_bounds_is_refused(field: str, value: int) -> None:
    with pytest.raises(CorruptBlockError):
        verify_block(with_header(**{field: value}))


def test_a_flipped_bit_is_found_by_the_checksum() -> None:
    _, payload = split_block(BLOCK)
    begin = len(BLOCK) - len(payload)
    for place in range(begin, len(BLOCK)):
        changed = bytearray(BLOCK)
        changed[place] ^= 1 << place % 8
        with pytest.raises(CorruptBlockError, match="XXH3"):
            decode_block(bytes(changed))
    assert checksum(payload) == split_block(BLOCK)[0].payload_xxh3
