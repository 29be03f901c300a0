"""Teacher profiles: sums that add up in any order, parts that survive the way, bytes that are refused."""

from __future__ import annotations

import dataclasses
from random import Random

import numpy as np
import pytest
import zstandard
from wire.hostile import at_most
from wire.mutation import spoil_bytes

from lynearm.v1 import profile_pb2
from lynearm.wire import profiles
from lynearm.wire.errors import CodecError, CorruptBlockError, MisalignmentError, UnsupportedFormatError
from lynearm.wire.profiles import LayerStatistics, TeacherProfile, decode_profile, encode_profile


def measure(seed: int, positions: int, *, heads: int = 3, neurons: int = 20) -> LayerStatistics:
    rng = np.random.default_rng(seed)
    return LayerStatistics(
        positions,
        float(rng.uniform(0, 2, positions).sum()),
        rng.uniform(0, 9, (positions, heads)).sum(axis=0),
        rng.uniform(0, 9, (positions, heads)).sum(axis=0),
        rng.uniform(0, 5, (positions, neurons)).sum(axis=0),
    )


def build(*seeds: int, layers: int = 4) -> TeacherProfile:
    """What workers of these seeds measured, added up in this order."""
    whole = TeacherProfile("m", "r")
    for seed in seeds:
        layer_of = {number: measure(100 * seed + number, 10 + seed) for number in range(layers)}
        whole = whole.plus(TeacherProfile("m", "r", layer_of))
    return whole


def assert_equal(actual: TeacherProfile, expected: TeacherProfile, relative: float = 0.0) -> None:
    assert (actual.model, actual.revision) == (expected.model, expected.revision)
    assert list(actual.layers) == list(expected.layers)
    for number, layer in actual.layers.items():
        other = expected.layers[number]
        assert layer.positions == other.positions
        assert layer.influence_sum == pytest.approx(other.influence_sum, rel=relative or 1e-300)
        for name in ("head_norm_sums", "head_contribution_sums", "neuron_sums"):
            np.testing.assert_allclose(getattr(layer, name), getattr(other, name), rtol=relative)


def test_sums_of_workers_add_up_in_any_order() -> None:
    whole = build(1, 2, 3)
    assert whole.positions == 11 + 12 + 13
    assert_equal(build(3, 1, 2), whole, relative=1e-14)
    assert_equal(build(1).plus(build(2).plus(build(3))), whole, relative=1e-14)
    assert_equal(build(1).plus(TeacherProfile("m", "r")), build(1))


def test_means_are_sums_over_their_positions() -> None:
    layer = LayerStatistics(4, 1.0, np.array([8.0]), np.array([2.0]), np.array([0.0, 6.0]))
    assert layer.influence == 0.25
    assert layer.head_norms.tolist() == [2.0]
    assert layer.head_contributions.tolist() == [0.5]
    assert layer.neuron_activations.tolist() == [0.0, 1.5]
    # A cosine of 1 + 1e-16 is no negative influence.
    assert dataclasses.replace(layer, influence_sum=-1e-15).influence == 0


def test_profiles_of_different_teachers_or_shapes_are_not_added() -> None:
    for other in (TeacherProfile("other", "r"), TeacherProfile("m", "other")):
        with pytest.raises(MisalignmentError, match="profiles of different teachers"):
            build(1).plus(other)
    with pytest.raises(MisalignmentError, match="neuron_sums of 20 and 21"):
        measure(1, 5).plus(measure(1, 5, neurons=21))


@pytest.mark.parametrize("part_bytes", [1, 1000, 1 << 20])
def test_the_parts_of_a_profile_add_up_to_it(monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    monkeypatch.setattr(profiles, "MAX_PART_BYTES", part_bytes)
    profile = build(4, 5, layers=9)
    parts = encode_profile(profile)
    assert len(parts) == {1: 9, 1000: 3, 1 << 20: 1}[part_bytes]
    whole = TeacherProfile("m", "r")
    for part in reversed(parts):
        whole = whole.plus(decode_profile(part))
    assert_equal(whole, profile)


def test_an_empty_profile_has_no_parts() -> None:
    assert encode_profile(TeacherProfile("m", "r")) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": 0},
        {"influence_sum": float("nan")},
        {"influence_sum": -1.0},
        {"influence_sum": 21.0},
        {"neuron_sums": np.array([-1.0])},
        {"neuron_sums": np.array([np.nan])},
        {"head_norm_sums": np.array([np.inf])},
        {"head_norm_sums": np.zeros((2, 2))},
        {"head_norm_sums": np.zeros(2, np.float32)},
    ],
)
def test_sums_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(CodecError):
        dataclasses.replace(measure(1, 10), **wrong)  # type: ignore[arg-type]  # wrong on purpose


def pack(content: bytes) -> bytes:
    return b"LYP1" + zstandard.ZstdCompressor().compress(content)


def test_bytes_that_are_no_profile_are_refused() -> None:
    (part,) = encode_profile(build(6))
    layer = profile_pb2.LayerStatistics(layer=1, positions=1)
    for wrong in (
        b"",
        part[:10],
        part[4:],
        pack(b"\xff" * 9),
        pack(profile_pb2.TeacherProfile(layers=[layer, layer]).SerializeToString()),
        pack(
            profile_pb2.TeacherProfile(
                layers=[profile_pb2.LayerStatistics(layer=1, positions=1, neuron_sums=b"1234567")]
            ).SerializeToString()
        ),
        pack(
            profile_pb2.TeacherProfile(
                layers=[profile_pb2.LayerStatistics(layer=1 << 16, positions=1)]
            ).SerializeToString()
        ),
    ):
        with pytest.raises(CorruptBlockError):
            decode_profile(wrong)
    with pytest.raises(UnsupportedFormatError):
        decode_profile(b"LYP2" + part[4:])
    large = pack(bytes(profiles.MAX_PART_CONTENT + 1))
    with at_most(2), pytest.raises(CorruptBlockError, match="declares"):
        decode_profile(large)


def test_spoilt_profiles_are_refused_or_still_sums() -> None:
    (part,) = encode_profile(build(7))
    content = zstandard.ZstdDecompressor().decompress(part[4:])
    rng = Random(9)
    refused = 0
    for _ in range(300):
        try:
            found = decode_profile(pack(spoil_bytes(content, rng)))
        except CorruptBlockError:
            refused += 1
            continue
        assert all(0 <= layer.influence <= 2.001 for layer in found.layers.values())
    assert 30 < refused < 300
