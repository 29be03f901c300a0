"""Judges the completions of a prompt, and says which of them are published.

Invariant: of every finished prompt something is published, so that the stream alone says what is finished.
Where no completion is kept, that is a record: a trace without tokens, whose tags say what became of the
prompt.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from lynearm.teacher.config import Keep, TeachConfig
from lynearm.teacher.verifiers import VERDICT_TAGS, Verdict, Verifier, make_verifier, verdict_tags
from lynearm.wire.traces import TopK, Trace

logger = logging.getLogger(__name__)

ReadAnswer: TypeAlias = Callable[[Trace], str]
"""What a trace's completion answers, as text; empty without an answer."""

KEPT_TAG = "kept"
"""Tag of a record: how many completions of its prompt were kept, "0"."""


class TraceSelection:
    """Gives each trace its verdict, and keeps those that are wanted.

    Called by one thread; `verdicts` and `left_out` may be read by others.

    Args:
        verifier: Judges answers; None judges nothing, and everything is kept.
        keep: What is published.
        read_answer: Finds the answer in a trace.
    """

    def __init__(self, verifier: Verifier | None, keep: Keep, read_answer: ReadAnswer) -> None:
        self._verifier = verifier
        self._keep: Keep = keep
        self._read_answer = read_answer
        self._verdicts: Counter[str] = Counter()
        self.left_out = 0
        """Completions that were generated and not published."""

    @property
    def verdicts(self) -> dict[str, int]:
        """How many completions got each verdict; empty without a verifier."""
        return dict(self._verdicts)

    def __call__(self, traces: Sequence[Trace]) -> tuple[Trace, ...]:
        """What to publish of a prompt: at least one trace.

        Args:
            traces: Every completion of one prompt, at least one.
        """
        if self._verifier is None:
            return tuple(traces)
        judged = [self._judge(trace, self._verifier) for trace in traces]
        kept = select(judged, self._keep)
        self.left_out += len(judged) - len(kept)
        return kept or (_record_of(judged),)

    def _judge(self, trace: Trace, verifier: Verifier) -> Trace:
        try:
            verdict = verifier(self._read_answer(trace), trace)
        # Text that a model wrote meets code that reads it: no such text may stop a job.
        except Exception as error:
            logger.warning("prompt %s: the verifier failed: %r", trace.prompt_id, error)
            verdict = Verdict("unverifiable", f"the verifier failed: {type(error).__name__}: {error}")
        self._verdicts[verdict.outcome] += 1
        others = {key: value for key, value in trace.tags.items() if key not in VERDICT_TAGS}
        return replace(trace, tags=others | verdict_tags(verdict))


def verifier_of(config: TeachConfig) -> Verifier | None:
    """The verifier that a configuration names; None for none.

    Raises:
        ConfigError, MissingDependencyError: as for `make_verifier`.
    """
    if not config.verify:
        return None
    return make_verifier(config.verify, answer_tag=config.answer_tag, timeout_seconds=config.verify_seconds)


def select(judged: Sequence[Trace], keep: Keep) -> tuple[Trace, ...]:
    """The traces to publish, in their order: all, the correct ones, or the shortest of those.

    Args:
        judged: Every completion of one prompt, tagged with its verdict.
        keep: Which are wanted. Of several that are equally short, the first is.
    """
    if keep == "all":
        return tuple(judged)
    correct = [trace for trace in judged if trace.tags.get("verdict") == "correct"]
    if keep == "correct" or not correct:
        return tuple(correct)
    return (min(correct, key=lambda trace: (trace.completion_token_ids.size, trace.sample_index)),)


def record_trace(prompt_id: str, tags: Mapping[str, str], *, sample_index: int = 0) -> Trace:
    """A trace without tokens: that a prompt is finished, and what became of it. Students pass over it."""
    nothing = TopK(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32), np.zeros(0, np.float32))
    return Trace(
        prompt_id=prompt_id,
        prompt_token_ids=np.zeros(0, np.int32),
        completion_token_ids=np.zeros(0, np.int32),
        sampled_logprobs=np.zeros(0, np.float32),
        top_k=nothing,
        finish_reason="abort",
        sample_index=sample_index,
        tags=tags,
    )


def _record_of(judged: Sequence[Trace]) -> Trace:
    """The record of a prompt of which nothing is kept; "incorrect" if one of its traces was judged so."""
    tags = dict(judged[0].tags)
    for trace in judged:
        if trace.tags["verdict"] == "incorrect":
            tags = dict(trace.tags)
            break
    return record_trace(judged[0].prompt_id, tags | {KEPT_TAG: "0"}, sample_index=judged[0].sample_index)
