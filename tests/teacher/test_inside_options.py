"""How a look inside is asked for, and what is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.inside_options import HiddenCapture, LayerStats, parse_capture, parse_stats
from lynearm.wire.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("hidden:layers=4,8,-1", HiddenCapture((4, 8, -1), "bf16")),
        ("hidden:layers=norm,dtype=fp8", HiddenCapture(("norm",), "fp8")),
        ("hidden:dtype=bf16,layers=0,norm", HiddenCapture((0, "norm"), "bf16")),
    ],
)
def test_layers_and_type_are_read(text: str, expected: HiddenCapture | None) -> None:
    assert parse_capture(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden", "write hidden:layers="),
        ("hidden:", "write hidden:layers="),
        ("hidden:4,8", "write hidden:layers="),
        ("logits:layers=4", "write hidden:layers="),
        ("hidden:layers=4,heads=2", "write hidden:layers="),
        ("hidden:layers=", "'' is no layer"),
        ("hidden:layers=4,x", "'x' is no layer"),
        ("hidden:layers=4,dtype=int8", "dtype is none of bf16, fp8"),
        ("hidden:layers=4,dtype=fp8,bf16", "dtype is none of"),
        ("hidden:layers=4,layers=5", "says layers twice"),
        ("hidden:layers=" + ",".join(map(str, range(257))), "capture of 257 layers"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_form(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_capture(text)
    with pytest.raises(ConfigError, match=message):
        TeachConfig("m", Path("p"), "s", "Apache-2.0", capture=text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", None), ("layers", LayerStats(8)), ("layers:every=1", LayerStats(1))],
)
def test_the_steps_to_measure_are_read(text: str, expected: LayerStats | None) -> None:
    assert parse_stats(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "heads",
        "layers:all=1",
        "layers:every=0",
        "layers:every=",
        "layers:every=x",
        "layers:every=1,2",
        "layers:8",
    ],
)
def test_stats_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="stats"):
        parse_stats(text)
    with pytest.raises(ConfigError, match="stats"):
        TeachConfig("m", Path("p"), "s", "Apache-2.0", stats=text)


def test_layers_of_a_model_ascend_with_the_final_norm_last() -> None:
    assert HiddenCapture((-1, "norm", 3, 0)).resolve(30) == (0, 3, 29, "norm")


@pytest.mark.parametrize("layers", [(30,), (-31,), (29, -1), (3, 3), ("norm", "norm")])
def test_layers_that_a_model_has_not_or_twice_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="capture of layer"):
        HiddenCapture(layers).resolve(30)
