"""Rollouts that are written, scored and published together.

A rollout is a `Trace` from its beginning. Before it is scored, its distributions are the student's own: that
is what the student's support is taken from. Its number, counted over the whole run, is its `sample_index`, so
that (prompt, number) names it in its stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.traces import Trace

STEP_TAG = "student_step"
"""Tag of a rollout: steps that made the weights by which it was drawn."""

LOGPROB_TAG = "student_logprob"
"""Tag of a rollout: mean of the student's logprobs of its tokens, nats, at temperature 1."""

SOURCE_TAG = "source"
SOURCE = "student"
"""Tag and value of a rollout, by which a weight can be given to all of them."""


@dataclass(frozen=True, slots=True)
class Wave:
    """Rollouts that belong together."""

    rollouts: tuple[Trace, ...]
    """At least one, by the same weights; numbers ascend."""

    @property
    def first(self) -> int:
        """Number of the first."""
        return self.rollouts[0].sample_index

    @property
    def step(self) -> int:
        """Steps that made the weights."""
        return student_step(self.rollouts[0])

    @property
    def tokens(self) -> int:
        """Written by the student."""
        return sum(trace.completion_token_ids.size for trace in self.rollouts)


def rollout_tags(prompt_tags: Mapping[str, str], step: int, mean_logprob: float) -> dict[str, str]:
    """Tags of a rollout.

    Args:
        prompt_tags: Of its prompt: what says how it counts goes for its rollouts too.
        step: Steps that made the weights.
        mean_logprob: Of its tokens under the student, nats.
    """
    own = {SOURCE_TAG: SOURCE, STEP_TAG: str(step), LOGPROB_TAG: f"{mean_logprob:.4f}"}
    return {**prompt_tags, **own}


def student_step(trace: Trace) -> int:
    """Steps that made the weights by which a rollout was drawn.

    Raises:
        CorruptBlockError: if the trace does not say.
    """
    text = trace.tags.get(STEP_TAG, "")
    if not text.isdigit():
        raise CorruptBlockError(
            f"trace of prompt {trace.prompt_id!r} says {text!r} of its {STEP_TAG}, expected a number",
            "give each run a rollout stream of its own, with --rollout-stream",
        )
    return int(text)


def sampled_divergence(rollouts: Sequence[Trace], scored: Sequence[Trace]) -> float | None:
    """Mean of log q − log p over all tokens, nats; None without tokens.

    Args:
        rollouts: With the student's logprobs of its tokens.
        scored: The same ones with the teacher's.
    """
    tokens = sum(trace.completion_token_ids.size for trace in rollouts)
    if not tokens:
        return None
    pairs = zip(rollouts, scored, strict=True)
    total = sum(float((one.sampled_logprobs - other.sampled_logprobs).sum()) for one, other in pairs)
    return total / tokens
