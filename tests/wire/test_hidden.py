"""Hidden states: their two types, and the section of a block that holds them."""

from __future__ import annotations

import dataclasses
import struct
from random import Random
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from wire import reference_reader as reference
from wire.building import build_trace
from wire.hostile import at_most
from wire.mutation import rejoin, spoil_bytes

from lynearm.v1 import trace_pb2
from lynearm.wire.blocks import split_block
from lynearm.wire.codec import decode_block, decode_rows, encode_block
from lynearm.wire.dictionaries import DictionaryReader
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.errors import CodecError, CorruptBlockError, InvalidInputError, UnsupportedFormatError
from lynearm.wire.fields import ByteReader, varint
from lynearm.wire.hidden import (
    HIDDEN_DTYPES,
    Float32Array,
    HiddenDtype,
    HiddenStates,
    HiddenStatesSpec,
    Layer,
    fp8_numbers,
)
from lynearm.wire.hidden_section import MAX_HIDDEN_BYTES, hidden_spec_from_proto, hidden_spec_to_proto
from lynearm.wire.protobuf import spec_from_proto, spec_to_proto
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import Trace

VOCAB_SIZE = 300
LAYERS: tuple[Layer, ...] = (2, 7, "norm")
DTYPES = pytest.mark.parametrize("dtype", HIDDEN_DTYPES)


def residual_stream(seed: int, positions: int, size: int = 48) -> Float32Array:
    """Shape [L, T, H]: a few channels are a hundred times the others, as in language models."""
    rng = np.random.default_rng(seed)
    states = rng.normal(0, 3, (len(LAYERS), positions, size))
    states[:, :, :2] *= 100
    return states.astype(np.float32)


def build_states(seed: int, positions: int, dtype: HiddenDtype = "bf16", size: int = 48) -> HiddenStates:
    return HiddenStates.from_float32(residual_stream(seed, positions, size), LAYERS, dtype)


def build_traces(dtype: HiddenDtype, **overrides: Any) -> list[Trace]:
    """Traces of several lengths: none, few, and enough for four lanes; one with a scored prompt."""
    kinds: list[tuple[int, dict[str, Any]]] = [(5, {}), (0, {}), (70, {"prompt_rows": True}), (1, {})]
    return [
        build_trace(
            seed,
            positions=positions,
            k=3,
            vocab_size=VOCAB_SIZE,
            hidden=build_states(seed, positions, dtype),
            **kind,
            **overrides,
        )
        for seed, (positions, kind) in enumerate(kinds)
    ]


def encode(traces: list[Trace]) -> bytes:
    return encode_block(traces, codec="exact", vocab_size=VOCAB_SIZE)


# The types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 2e-3), ("fp8", 3e-2)])
def test_rows_come_back_as_near_as_their_type_allows(dtype: HiddenDtype, error: float) -> None:
    states = residual_stream(3, 40)
    back = HiddenStates.from_float32(states, LAYERS, dtype).to_float32()
    assert back.dtype == np.float32
    off = np.linalg.norm(back - states, axis=2) / np.linalg.norm(states, axis=2)
    assert error / 10 < off.mean() < error
    # And the small ones are not drowned by the large: half a step of the mantissa, each for itself.
    normal = np.abs(states) > np.abs(states).max(axis=2, keepdims=True) * 2**-14
    steps = 2.0**-8 if dtype == "bf16" else 2.0**-4
    assert (np.abs(back - states)[normal] <= 1.01 * steps * np.abs(states[normal])).all()


@DTYPES
def test_what_is_of_the_type_comes_back_unchanged(dtype: HiddenDtype) -> None:
    once = HiddenStates.from_float32(residual_stream(4, 9), LAYERS, dtype)
    again = HiddenStates.from_float32(once.to_float32(), LAYERS, dtype)
    np.testing.assert_array_equal(again.to_float32(), once.to_float32())


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126)


@given(arrays.arrays(np.float32, (1, 3, 5), elements=FLOATS))
@settings(deadline=None, max_examples=100)
def test_both_types_round_as_torch_does(states: Float32Array) -> None:
    import torch

    tensor = torch.from_numpy(states)
    bf16 = HiddenStates.from_float32(states, (0,), "bf16")
    assert bf16.values.tobytes() == tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    fp8 = HiddenStates.from_float32(states, (0,), "fp8")
    assert fp8.scales is not None
    scaled = tensor / torch.from_numpy(fp8.scales)[..., None]
    codes = scaled.to(torch.float8_e4m3fn)
    assert fp8.values.tobytes() == codes.view(torch.uint8).numpy().tobytes()
    expected = codes.float() * torch.from_numpy(fp8.scales)[..., None]
    np.testing.assert_array_equal(fp8.to_float32(), expected.numpy())
    assert np.isfinite(fp8.to_float32()).all()


def test_the_numbers_of_fp8_are_those_of_torch() -> None:
    import torch

    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(fp8_numbers(), expected)
    assert np.isnan(fp8_numbers()).sum() == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@DTYPES
def test_what_is_no_number_is_refused(dtype: HiddenDtype, bad: float) -> None:
    states = residual_stream(5, 2)
    states[1, 1, 7] = bad
    with pytest.raises(CodecError, match="NaN or infinity"):
        HiddenStates.from_float32(states, LAYERS, dtype)


def test_arrays_that_contradict_each_other_are_refused() -> None:
    states, fp8 = build_states(6, 4), build_states(6, 4, "fp8")
    assert fp8.scales is not None
    zeros, too_large, negative = fp8.scales * 0, fp8.scales * 0 + 1e38, -fp8.scales
    values = states.values
    for wrong in (
        {"layers": (2, 7)},
        {"layers": (7, 2, "norm")},
        {"layers": ("norm", 2, 7)},
        {"layers": (2, 2, "norm")},
        {"layers": (-1, 7, "norm")},
        {"values": values[0]},
        {"values": values.astype(np.float32)},
        {"values": values | np.uint16(0x7F80)},
        {"scales": fp8.scales},
        {"dtype": "fp8"},
    ):
        with pytest.raises(CodecError):
            dataclasses.replace(states, **wrong)
    for scales in (
        None,
        zeros,
        too_large,
        negative,
        zeros * np.nan,
        fp8.scales[:, 1:],
        fp8.scales.astype("f8"),
    ):
        with pytest.raises(CodecError):
            dataclasses.replace(fp8, scales=scales)
    with pytest.raises(CodecError, match="NaN"):
        dataclasses.replace(fp8, values=fp8.values | np.uint8(0x7F))
    with pytest.raises(CodecError, match="hidden has 4 positions, expected 3"):
        build_trace(1, positions=3, hidden=states)


# The section ----------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("with_dictionary", [False, True])
def test_hidden_states_come_back_bit_for_bit(dtype: HiddenDtype, with_dictionary: bool) -> None:
    traces = build_traces(dtype)
    spec = CodecSpec("exact", 3, hidden=HiddenStatesSpec(LAYERS, dtype, 48))
    dictionary = train_dictionary([traces], codec=spec, vocab_size=VOCAB_SIZE) if with_dictionary else None
    block = encode_block(traces, codec=spec, vocab_size=VOCAB_SIZE, dictionary=dictionary)
    reader = DictionaryReader(lambda _: dictionary.encoded if dictionary else b"")
    decoded = decode_block(block, dictionaries=reader)
    for actual, expected in zip(decoded, traces, strict=True):
        assert_same_states(actual.hidden, expected.hidden)
        np.testing.assert_array_equal(actual.completion_token_ids, expected.completion_token_ids)
    rows = decode_rows(block, dictionaries=reader)
    assert rows.hidden is not None
    together = np.concatenate([trace.hidden.values for trace in traces if trace.hidden], axis=1)
    assert rows.hidden.values.tobytes() == together.tobytes()
    assert rows.hidden.positions == sum(rows.row_counts) - sum(rows.prompt_row_counts)


def assert_same_states(actual: HiddenStates | None, expected: HiddenStates | None) -> None:
    assert actual is not None
    assert expected is not None
    assert (actual.layers, actual.dtype) == (expected.layers, expected.dtype)
    assert actual.values.tobytes() == expected.values.tobytes()
    if actual.scales is not None and expected.scales is not None:
        assert actual.scales.tobytes() == expected.scales.tobytes()


@DTYPES
def test_a_reader_written_from_the_page_finds_the_same(dtype: HiddenDtype) -> None:
    traces = build_traces(dtype)
    for theirs, ours in zip(reference.read_block(encode(traces)), traces, strict=True):
        assert ours.hidden is not None
        expected = ours.hidden.to_float32().tolist()
        assert theirs.hidden_states == expected


def test_a_block_without_hidden_states_is_what_it_was() -> None:
    traces = [dataclasses.replace(trace, hidden=None) for trace in build_traces("bf16")]
    block = encode(traces)
    header, payload = split_block(block)
    reader = ByteReader(payload)
    metadata = bytes(reader.take(reader.varint()))
    if header.uncompressed_size_bytes:
        metadata = zstandard.ZstdDecompressor().decompress(metadata)
    assert not trace_pb2.BlockMetadata.FromString(metadata).HasField("hidden_states")
    assert all(trace.hidden is None for trace in decode_block(block))
    assert decode_rows(block).hidden is None


def test_bf16_states_are_compressed() -> None:
    trace = build_trace(1, positions=64, k=1, vocab_size=VOCAB_SIZE, hidden=build_states(1, 64, size=256))
    assert trace.hidden is not None
    bare = encode([dataclasses.replace(trace, hidden=None)])
    assert len(encode([trace])) - len(bare) < 0.8 * trace.hidden.size_bytes


def test_traces_that_differ_in_their_hidden_states_share_no_block() -> None:
    first, _, _, last = build_traces("bf16")
    for other in (
        dataclasses.replace(last, hidden=None),
        dataclasses.replace(last, hidden=build_states(3, 1, "fp8")),
        dataclasses.replace(last, hidden=build_states(3, 1, size=49)),
    ):
        for traces in ([first, other], [other, first]):
            with pytest.raises(CodecError, match="put only traces of one kind into a block"):
                encode(traces)


def test_traces_without_what_the_stream_says_are_refused() -> None:
    traces = build_traces("bf16")
    right = HiddenStatesSpec(LAYERS, "bf16", 48)
    for wrong in (None, dataclasses.replace(right, dtype="fp8"), dataclasses.replace(right, layers=(2, 7))):
        with pytest.raises(CodecError, match="does not have the hidden states of the stream's codec"):
            encode_block(traces, codec=CodecSpec("exact", hidden=wrong), vocab_size=VOCAB_SIZE)


def test_too_many_hidden_states_for_a_block_are_refused_in_words() -> None:
    values = np.zeros((256, 3, 16_384), np.uint16)
    states = HiddenStates(tuple(range(256)), "bf16", values)
    with pytest.raises(
        CodecError, match=f"25165824 bytes of hidden states: a block's limit is {MAX_HIDDEN_BYTES}"
    ):
        encode([build_trace(1, positions=3, k=1, vocab_size=VOCAB_SIZE, hidden=states)])


@pytest.mark.parametrize(
    "spec", [None, HiddenStatesSpec((0,), "fp8", 1), HiddenStatesSpec(LAYERS, "bf16", 4096)]
)
def test_a_stream_says_which_hidden_states_it_carries(spec: HiddenStatesSpec | None) -> None:
    from models.trace_blocks import make_spec

    stream = dataclasses.replace(make_spec(), codec=CodecSpec("standard", 8, hidden=spec))
    assert spec_from_proto(spec_to_proto(stream)) == stream


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ()},
        {"layers": tuple(range(257))},
        {"layers": (1 << 16,)},
        {"layers": (3, 1)},
        {"layers": ("norm", 1)},
        {"dtype": "int8"},
        {"hidden_size": 0},
        {"hidden_size": (1 << 16) + 1},
    ],
)
def test_specs_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="hidden states: "):
        dataclasses.replace(HiddenStatesSpec((1, 2), "bf16", 64), **wrong)


def test_a_type_that_is_not_known_is_newer() -> None:
    message = hidden_spec_to_proto(HiddenStatesSpec((1,), "bf16", 64))
    message.dtype = 3  # type: ignore[assignment]  # what a later version would send
    with pytest.raises(UnsupportedFormatError):
        hidden_spec_from_proto(message)


# Hostile bytes --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Parts:
    """A block with hidden states, taken apart."""

    block: bytes
    metadata: trace_pb2.BlockMetadata
    section: bytes
    rows: bytes

    def join(self, section: bytes | None = None) -> bytes:
        """The block with another section; sizes and checksum hold."""
        section = self.section if section is None else section
        metadata = self.metadata.SerializeToString(deterministic=True)
        header = dataclasses.replace(split_block(self.block)[0], uncompressed_size_bytes=0)
        payload = varint(len(metadata)) + metadata + varint(len(section)) + section + self.rows
        return rejoin(header, payload)


def take_apart(dtype: HiddenDtype, traces: list[Trace] | None = None) -> Parts:
    block = encode(traces or build_traces(dtype))
    header, payload = split_block(block)
    reader = ByteReader(payload)
    stored = bytes(reader.take(reader.varint()))
    if header.uncompressed_size_bytes:
        stored = zstandard.ZstdDecompressor().decompress(stored)
    section = bytes(reader.take(reader.varint()))
    return Parts(block, trace_pb2.BlockMetadata.FromString(stored), section, bytes(reader.rest()))


@DTYPES
def test_a_block_taken_apart_and_joined_says_the_same(dtype: HiddenDtype) -> None:
    parts = take_apart(dtype)
    for actual, expected in zip(decode_block(parts.join()), build_traces(dtype), strict=True):
        assert_same_states(actual.hidden, expected.hidden)


@DTYPES
def test_spoilt_sections_are_refused_or_still_numbers(dtype: HiddenDtype) -> None:
    traces = build_traces(dtype)
    parts = take_apart(dtype, traces[:2])
    rng = Random(8)
    refused = 0
    for _ in range(200):
        # Half of the damage goes to the first bytes, where sizes and a frame's header lie.
        head = rng.choice((len(parts.section), 24))
        spoilt = parts.join(spoil_bytes(parts.section[:head], rng) + parts.section[head:])
        try:
            rows = decode_rows(spoilt)
        except (CorruptBlockError, UnsupportedFormatError):
            refused += 1
            with pytest.raises((reference.CorruptError, reference.NewerError)):
                reference.read_block(spoilt)
            continue
        assert rows.hidden is not None
        assert np.isfinite(rows.hidden.to_float32()).all()
    assert 60 < refused < 190


@DTYPES
def test_every_truncation_of_a_section_is_refused(dtype: HiddenDtype) -> None:
    parts = take_apart(dtype, build_traces(dtype)[:1])
    for size in range(0, len(parts.section), 7):
        with pytest.raises(CorruptBlockError):
            decode_block(parts.join(parts.section[:size]))
    with pytest.raises(CorruptBlockError, match="1 bytes behind the hidden states"):
        decode_block(parts.join(parts.section + b"\0"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden_size": 1 << 16}, "beyond any block"),
        ({"hidden_size": 2**32 - 1}, "outside 1..65536"),
        ({"hidden_size": 0}, "outside 1..65536"),
        ({"hidden_size": 47}, "hidden states|zstd frame|part"),
        ({"layers": []}, "part|behind"),
        ({"layers": [7, 2]}, "ascend"),
        ({"layers": [2, 2]}, "ascend"),
        ({"layers": list(range(256))}, "256 layers|257 layers|beyond"),
        ({"layers": [2**32 - 1] * 1000}, "bytes to describe"),
        ({"final_norm": False}, "behind"),
        ({"dtype": 0}, "type 0"),
        ({"dtype": 7}, "type 7"),
    ],
)
def test_a_description_that_lies_takes_no_memory(change: dict[str, Any], error: str) -> None:
    parts = take_apart("bf16")
    for name, value in change.items():
        if name == "layers":
            del parts.metadata.hidden_states.layers[:]
            parts.metadata.hidden_states.layers.extend(value)
        else:
            setattr(parts.metadata.hidden_states, name, value)
    block = parts.join()
    with at_most(2), pytest.raises((CorruptBlockError, UnsupportedFormatError), match=error):
        decode_block(block)
    with pytest.raises((reference.CorruptError, reference.NewerError)):
        reference.read_block(block)


@pytest.mark.parametrize("declared", [1 << 30, 2**64 - 1, None])
def test_a_frame_that_declares_too_much_takes_no_memory(declared: int | None) -> None:
    parts = take_apart("bf16")
    # A frame header with an eight-byte size, or without one.
    frame = (
        b"\x28\xb5\x2f\xfd"
        + (b"\xe0" + struct.pack("<Q", declared) if declared else b"\x00\x58")
        + b"\x01\x00\x00"
    )
    with at_most(2), pytest.raises(CorruptBlockError):
        decode_block(parts.join(varint(len(frame)) + frame + parts.section))


def test_a_section_where_none_is_announced_is_read_as_rows_and_refused() -> None:
    parts = take_apart("fp8")
    parts.metadata.ClearField("hidden_states")
    with pytest.raises((CorruptBlockError, UnsupportedFormatError)):
        decode_block(parts.join())
