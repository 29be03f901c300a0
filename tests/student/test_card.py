"""The model card: what hubs read, and no markup by strangers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from student.teaching_material import make_spec

from lynearm.student.card import render_card
from lynearm.student.config import TrainConfig
from lynearm.student.lineage import JsonObject, StreamUse, extend_lineage
from lynearm.student.model import StudentModel
from lynearm.student.run_account import describe_run
from lynearm.wire.specs import StreamSpec
from lynearm.wire.traces import Cursor


@pytest.fixture
def spec(teacher: StudentModel) -> StreamSpec:
    return make_spec(teacher)


def card_of(*specs: StreamSpec, name: str = "student") -> str:
    lineage: JsonObject = {"name": name, "streams": []}
    for one in specs:
        use = StreamUse(one, Cursor(1, 0), 1, 4, 400)
        lineage = extend_lineage(lineage, [use], run=describe_run(TrainConfig(), [one]))
    return render_card(lineage)


def test_a_model_that_was_not_trained_has_a_card() -> None:
    card = render_card({"name": "student", "streams": []})
    assert card.startswith("---\nlibrary_name")
    assert 'license: "other"' in card


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (("Apache-2.0", "Apache-2.0"), '"apache-2.0"'),
        (("Apache-2.0", "MIT"), '"other"'),
        (("unknown",), '"other"'),
        (("https://example.org/terms",), '"other"'),
    ],
)
def test_a_licence_is_named_where_there_is_exactly_one(
    spec: StreamSpec, licenses: tuple[str, ...], expected: str
) -> None:
    assert f"license: {expected}\n" in card_of(*(replace(spec, license=one) for one in licenses))


def test_text_of_streams_is_no_markup(spec: StreamSpec) -> None:
    evil = "x`|<script>alert(1)</script>\n---\nlicense: mit"
    teacher = replace(spec.teacher, model=evil)
    card = card_of(replace(spec, teacher=teacher, license=evil, labels={"prompts": evil}), name=evil)
    front = card.split("---\n")[1]
    assert "license: mit" not in card.splitlines()
    assert "script" not in front
    (row,) = [line for line in card.splitlines() if "lessons" in line and line.startswith("|")]
    assert row.count("|") == 9
    # Within code spans only.
    outside = "".join(part for index, part in enumerate(card.split("`")) if index % 2 == 0)
    assert "<script>" not in outside.replace("\\<", "")


def test_conditions_are_told(spec: StreamSpec) -> None:
    card = card_of(replace(spec, license="gemma"))
    assert "## Terms" in card
    assert "Model Derivative" in card
    assert "## Terms" not in card_of(spec)
