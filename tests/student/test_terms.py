"""What licences and labels say about distillation."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from student.teaching_material import make_spec

from lynearm.student.model import StudentModel
from lynearm.student.terms import Verdict, check_terms, read_terms
from lynearm.wire.errors import DistillationForbiddenError
from lynearm.wire.specs import StreamSpec


@pytest.fixture
def spec(teacher: StudentModel) -> StreamSpec:
    return make_spec(teacher)


@pytest.mark.parametrize(
    ("license_id", "verdict"),
    [
        ("Apache-2.0", "allowed"),
        ("MIT", "allowed"),
        ("BSD-3-Clause", "allowed"),
        ("CC-BY-4.0", "allowed"),
        ("Apache-2.0 WITH LLVM-exception", "allowed"),
        ("MIT AND Apache-2.0", "allowed"),
        ("llama2", "forbidden"),
        ("LicenseRef-Llama-2", "forbidden"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT", "forbidden"),
        ("https://ai.meta.com/llama/license/", "forbidden"),
        ("llama3", "forbidden"),
        ("Meta Llama 3 Community License", "forbidden"),
        ("llama-3-70b", "forbidden"),
        ("llama3.1", "conditional"),
        ("https://www.llama.com/llama3_1/license/", "conditional"),
        ("llama3.3", "conditional"),
        ("llama4", "conditional"),
        ("gemma", "conditional"),
        ("https://ai.google.dev/gemma/terms", "conditional"),
        ("tencent-hunyuan-community", "forbidden"),
        ("qwen", "conditional"),
        ("qwen-research", "conditional"),
        ("bigscience-openrail-m", "conditional"),
        ("CC-BY-NC-4.0", "conditional"),
        ("CC-BY-NC-SA-4.0", "conditional"),
        ("FAIR Noncommercial Research License", "conditional"),
        ("unknown", "unknown"),
        ("NOASSERTION", "unknown"),
        ("https://example.org/terms", "unknown"),
        ("llama3 OR MIT", "allowed"),
        ("MIT AND llama3", "forbidden"),
        ("MIT OR Apache-2.0 AND llama2", "allowed"),
        ("(MIT OR llama2) AND MIT", "forbidden"),
    ],
)
def test_what_a_licence_says(spec: StreamSpec, license_id: str, verdict: Verdict) -> None:
    terms = read_terms(replace(spec, license=license_id))
    assert terms.verdict == verdict
    assert bool(terms.reason) == (verdict != "allowed")


def test_a_label_forbids_whatever_the_licence(spec: StreamSpec) -> None:
    assert read_terms(replace(spec, labels={"distillation": "forbidden"})).verdict == "forbidden"


@pytest.mark.parametrize(("license_id", "verdict"), [("unknown", "allowed"), ("llama2", "forbidden")])
def test_a_label_settles_doubts_but_lifts_no_prohibition(
    spec: StreamSpec, license_id: str, verdict: Verdict
) -> None:
    assert (
        read_terms(replace(spec, license=license_id, labels={"distillation": "allowed"})).verdict == verdict
    )


def test_forbidden_terms_are_refused_unless_overridden(
    spec: StreamSpec, caplog: pytest.LogCaptureFixture
) -> None:
    forbidding = replace(spec, license="llama2")
    with pytest.raises(DistillationForbiddenError, match=r"1\.b\.v") as caught:
        check_terms(forbidding, allow_terms=False)
    assert "--allow-terms" in caught.value.remedy
    with caplog.at_level(logging.WARNING):
        assert check_terms(forbidding, allow_terms=True).verdict == "forbidden"
    assert "--allow-terms" in caplog.text


def test_an_unknown_licence_is_one_line_and_a_free_one_none(
    spec: StreamSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_terms(replace(spec, license="unknown"), allow_terms=False)
        check_terms(replace(spec, license="unknown"), allow_terms=False, warn=False)
        check_terms(spec, allow_terms=False)
    assert len(caplog.messages) == 1
