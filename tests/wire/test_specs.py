"""Stream specs, alignment, and their protobuf form."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lynearm.v1 import trace_pb2
from lynearm.wire.errors import InvalidInputError, UnsupportedFormatError
from lynearm.wire.protobuf import (
    StreamInfo,
    spec_from_proto,
    spec_to_proto,
    stream_from_proto,
    stream_to_proto,
)
from lynearm.wire.specs import (
    CodecSpec,
    StreamSpec,
    TeacherSpec,
    TokenizerSpec,
    alignment_differences,
    hash_chat_template,
    hash_vocab,
    spec_differences,
)

TOKENIZER = TokenizerSpec("tok", hash_vocab([("a", 0), ("b", 1)]), hash_chat_template("{{ x }}"), 2, (1,))
SPEC = StreamSpec(
    name="gsm8k",
    teacher=TeacherSpec("teacher", "sha256:00", "vllm 0.32.0", "float32", 128, 512, "raw", 0.7),
    tokenizer=TOKENIZER,
    codec=CodecSpec("exact", 32),
    license="Apache-2.0",
    labels={"owner": "us"},
)


@pytest.mark.parametrize(
    "codec",
    [SPEC.codec, CodecSpec("sampled", draws=9), CodecSpec(min_probability=0.25, tail_draws=16)],
)
def test_a_spec_survives_the_wire(codec: CodecSpec) -> None:
    spec = replace(SPEC, codec=codec)
    data = spec_to_proto(spec).SerializeToString()
    assert spec_from_proto(trace_pb2.StreamSpec.FromString(data)) == spec


def test_streams_differ_by_their_tail_draws() -> None:
    drawn = replace(SPEC, codec=replace(SPEC.codec, tail_draws=2))
    assert spec_differences(SPEC, drawn) == ["codec.tail_draws is 0, wanted 2"]


def test_a_stream_survives_the_wire() -> None:
    info = StreamInfo(SPEC, True, 17, 3, 4, 5, 6, 7, 8)
    assert stream_from_proto(stream_to_proto(info)) == info


@pytest.mark.parametrize("name", ["", "Upper", "../etc", "a/b", "-x", "a" * 129, "ä", "a\n"])
def test_names_that_could_become_paths_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match="not allowed"):
        replace(SPEC, name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": ""}, "license is empty"),
        ({"teacher": replace(SPEC.teacher, model="")}, "teacher.model is empty"),
        ({"teacher": replace(SPEC.teacher, vocab_size=0)}, "vocab_size 0"),
        ({"tokenizer": replace(TOKENIZER, vocab_sha256=b"short")}, "not 32 bytes"),
        ({"codec": CodecSpec("exact", 1025)}, "top_k 1025"),
        ({"codec": CodecSpec(tail_draws=17)}, r"tail_draws 17 is outside 0\.\.16"),
        ({"codec": CodecSpec(tail_draws=-1)}, r"tail_draws -1 is outside 0\.\.16"),
        ({"codec": CodecSpec("sampled", draws=9, tail_draws=1)}, "tail_draws 1 does not suit mode 'sampled'"),
    ],
)
def test_an_incomplete_spec_names_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replace(SPEC, **change)  # type: ignore[arg-type]  # fields by name


def test_modes_that_are_not_said_or_not_known_are_refused() -> None:
    message = spec_to_proto(SPEC)
    message.codec.mode = trace_pb2.CODEC_MODE_UNSPECIFIED
    with pytest.raises(InvalidInputError, match="not said"):
        spec_from_proto(message)
    message.codec.mode = 99  # type: ignore[assignment]  # a later enum value
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        spec_from_proto(message)


def test_the_vocabulary_hash_ignores_order_and_sees_every_change() -> None:
    assert hash_vocab([("b", 1), ("a", 0)]) == TOKENIZER.vocab_sha256
    assert hash_vocab([("b", 0), ("a", 1)]) != TOKENIZER.vocab_sha256
    assert hash_vocab([("a", 0), ("b", 1), ("c", 2)]) != TOKENIZER.vocab_sha256


def test_alignment_spells_out_each_difference() -> None:
    other = replace(
        TOKENIZER,
        name="other",
        vocab_sha256=hash_vocab([("z", 0)]),
        chat_template_sha256=b"",
        eos_token_ids=(0, 1),
    )
    differences = alignment_differences(TOKENIZER, other)
    assert len(differences) == 3
    assert "'other'" in differences[0]
    assert "none" in differences[1]
    assert "[0, 1]" in differences[2]
    assert alignment_differences(TOKENIZER, replace(TOKENIZER, name="renamed")) == []
