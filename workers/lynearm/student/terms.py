"""Whether a stream's terms let a student learn from it: what its licence and its labels say.

The table holds the terms of models that speak of training other models on their outputs. It is no legal
advice: it stops the obvious breach and points at conditions. Free licences (Apache-2.0, MIT and the like)
say nothing about outputs, and so set no condition.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lynearm.wire.errors import DistillationForbiddenError
from lynearm.wire.specs import StreamSpec

logger = logging.getLogger(__name__)

DISTILLATION_LABEL = "distillation"
"""Label of a stream: "forbidden" refuses training on it; "allowed" says that the one who made the stream has
read the terms, and silences warnings, but does not lift a prohibition of the licence."""

Verdict: TypeAlias = Literal["allowed", "conditional", "unknown", "forbidden"]

_SEVERITY: tuple[Verdict, ...] = ("allowed", "unknown", "conditional", "forbidden")
"""Of a choice (OR) the mildest counts, of a sum (AND, WITH) the severest."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a stream's terms say about training a student on it."""

    verdict: Verdict
    reason: str = ""
    """One clause for people; empty where training is allowed without condition."""


@dataclass(frozen=True, slots=True)
class _Known:
    pattern: re.Pattern[str]
    terms: Terms


def _known(pattern: str, verdict: Verdict, reason: str = "") -> _Known:
    return _Known(re.compile(pattern), Terms(verdict, reason))


_TABLE = (
    # Llama 2 and 3 forbid what the versions from 3.1 on allow under a condition.
    _known(
        r"llama-?2(?![\d.])|ai\.meta\.com/llama/license",
        "forbidden",
        "its section 1.b.v forbids to improve other language models than Llama 2 and its derivatives",
    ),
    _known(
        r"llama-?(3[.-][1-4](?!\d)|4)",
        "conditional",
        "its section 1.b.i asks that the name of a distributed student begins with “Llama”, with the notice "
        "“Built with Llama”",
    ),
    _known(
        r"llama-?3(?!\.?[1-9])",
        "forbidden",
        "its section 1.b.v forbids to improve other language models than Llama 3 and its derivatives",
    ),
    _known(
        r"gemma",
        "conditional",
        "under the Gemma Terms of Use a distilled student is a Model Derivative and keeps their restrictions",
    ),
    _known(
        r"hunyuan",
        "forbidden",
        "its section 5 forbids to improve other language models than Hunyuan and its derivatives",
    ),
    _known(
        r"qwen-research", "conditional", "it is for research and evaluation only, and asks for a Qwen notice"
    ),
    _known(
        r"^qwen(-license(-agreement)?)?$",
        "conditional",
        "it asks that a distributed student is shown as “Built with Qwen” or “Improved using Qwen”",
    ),
    _known(
        r"(^|-)nc(-|$)|non-?commercial|research-only", "conditional", "it is for non-commercial purposes only"
    ),
    _known(
        r"openrail",
        "conditional",
        "a student distilled from the model is a derivative, which keeps its use restrictions",
    ),
    _known(r"^(apache|bsd|cc-by-[1-4]|cc-by-sa|cc0|odc-by|mpl|gpl|lgpl|agpl|cdla-permissive)-?", "allowed"),
    _known(r"^(mit|mit-0|0bsd|isc|zlib|unlicense|bsl-1\.0|odbl(-1\.0)?|pddl(-1\.0)?)$", "allowed"),
)
"""The first that matches a licence counts; see `_normalise` for what they are matched with."""


def read_terms(spec: StreamSpec) -> Terms:
    """What the licence expression and the labels of a stream say."""
    license_terms = _read_expression(spec.license)
    label = spec.labels.get(DISTILLATION_LABEL, "").strip().lower()
    if label == "forbidden":
        return Terms("forbidden", f"its label says {DISTILLATION_LABEL}=forbidden")
    if label == "allowed" and license_terms.verdict != "forbidden":
        return Terms("allowed", f"its label says {DISTILLATION_LABEL}=allowed")
    return license_terms


def check_terms(spec: StreamSpec, *, allow_terms: bool, warn: bool = True) -> Terms:
    """Refuse a stream whose terms forbid to learn from it; say in one line what else is to be known.

    Args:
        spec: Of the stream.
        allow_terms: Train all the same; the manifest records it.
        warn: Whether to log the line: of several ranks, one speaks.

    Raises:
        DistillationForbiddenError: if the terms forbid it and `allow_terms` is not set.
    """
    terms = read_terms(spec)
    said = f"stream {spec.name!r} has the licence {spec.license!r}: {terms.reason}"
    if terms.verdict == "forbidden" and not allow_terms:
        raise DistillationForbiddenError(
            said,
            "learn from another teacher; --allow-terms trains all the same, for those whom the terms or a "
            "contract permit it, and the checkpoint's manifest says so",
        )
    if warn and terms.verdict != "allowed":
        logger.warning("%s%s", said, "; trained on by --allow-terms" if terms.verdict == "forbidden" else "")
    return terms


def _read_expression(expression: str) -> Terms:
    # Without parentheses, OR binds weaker than AND in SPDX; with them, everything counts as a sum.
    if "(" in expression or ")" in expression:
        parts = re.split(r"\s+(?:AND|OR|WITH)\s+|[()]", expression)
        return _severest([_read_license(part) for part in parts if part.strip()])
    choices = [
        _severest([_read_license(part) for part in re.split(r"\s+(?:AND|WITH)\s+", choice)])
        for choice in re.split(r"\s+OR\s+", expression)
    ]
    return min(choices, key=_severity)


def _severest(terms: Sequence[Terms]) -> Terms:
    return max(terms, key=_severity) if terms else Terms("unknown", "it names no terms")


def _severity(terms: Terms) -> int:
    return _SEVERITY.index(terms.verdict)


def _read_license(license_id: str) -> Terms:
    name = _normalise(license_id)
    if name in ("", "unknown", "other", "none", "noassertion"):
        return Terms("unknown", "nobody said under which terms the teacher may be distilled")
    # An exception adds permissions.
    if name.endswith("-exception"):
        return Terms("allowed")
    for known in _TABLE:
        if known.pattern.search(name):
            return known.terms
    return Terms("unknown", "lynearm does not know whether it lets others learn from the teacher: read it")


def _normalise(license_id: str) -> str:
    """Lower case, words joined by single hyphens, without the prefix of SPDX's own references."""
    name = re.sub(r"[\s_-]+", "-", license_id.strip().lower())
    return name.removeprefix("licenseref-").removeprefix("meta-")
