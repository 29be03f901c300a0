"""What a training run says while it works, and at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from lynearm.rollouts import RolloutStatus

Stage: TypeAlias = Literal["loading", "collecting", "evaluating", "training", "waiting", "saving", "done"]
StopReason: TypeAlias = Literal["stream_end", "max_steps", "max_seconds", "interrupted", "no_improvement"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step."""

    step: int
    """From 1, over the whole run, resumed parts included."""
    epoch: int
    """Complete passes over every stream."""
    loss: float
    """Weighted sum of the terms, mean over the batch's completion positions."""
    kl: float
    """Forward KL to the teacher over top-k and tail, nats per completion token."""
    cross_entropy: float
    """On the tokens that the teacher drew, nats per completion token."""
    tokens: int
    """Completion tokens trained on so far, this step included."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    seconds: float = field(default=0.0, compare=False)
    """Wall time of the step, waiting for its traces not counted. Like the next, no part of what was learnt:
    records of a resumed run equal those of an uninterrupted one."""
    waiting_seconds: float = field(default=0.0, compare=False)
    """Wall time before the step without a trace to train on."""
    hidden: float | None = None
    """Weighted sum of the terms that compare hidden states, part of `loss`; None without any."""
    stream_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    """Completion tokens of this step by stream; empty where there is one stream."""
    staleness: float | None = None
    """Steps by which the rollouts of this step were behind the student that learns from them, on average;
    None without any."""


@dataclass(frozen=True, slots=True)
class StreamEvaluation:
    """The part of a measurement on one stream's held-out traces; fields as in `EvaluationRecord`."""

    kl: float
    cross_entropy: float
    positions: int
    agreement: float | None = None
    calibration_error: float | None = None


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One measurement on the held-out traces, those of all streams together."""

    step: int
    """Steps done when it was taken."""
    tokens: int
    """Completion tokens trained on until then."""
    kl: float
    """Forward KL to the teacher over top-k and tail, nats per completion token."""
    cross_entropy: float
    """On the tokens that the teacher drew, nats per completion token."""
    positions: int
    """Completion tokens measured on."""
    agreement: float | None = None
    """Part of the positions where student and teacher hold the same token most likely, of those where the
    teacher kept any; None where it kept none."""
    calibration_error: float | None = None
    """Expected calibration error on the tokens that the teacher drew, 0 to 1; see `calibration`."""
    exact_match: float | None = None
    """Part of the questions that were answered with the right number; None where none were asked."""
    streams: Mapping[str, StreamEvaluation] = field(default_factory=dict[str, StreamEvaluation])
    """By stream, for those with held-out traces; empty where there is one stream."""
    tasks: Mapping[str, float] = field(default_factory=dict[str, float])
    """Figures of lm-eval's tasks by TASK/METRIC; empty where none were asked for."""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> EvaluationRecord:
        """A record out of what `dataclasses.asdict` made of it.

        Raises:
            TypeError: if a field is missing or unknown.
        """
        streams = cast("Mapping[str, dict[str, Any]]", values.get("streams", {}))
        measured = {name: StreamEvaluation(**one) for name, one in streams.items()}
        known: dict[str, Any] = {**values, "streams": measured}
        return cls(**known)

    @property
    def perplexity(self) -> float:
        """Of the student on the tokens that the teacher drew."""
        return math.exp(self.cross_entropy) if self.cross_entropy < 700.0 else math.inf


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """The state of a run at one instant; sent at every change of stage and after every step."""

    stage: Stage
    message: str = ""
    """For people: what a stage waits for or works on."""
    record: StepRecord | None = None
    """The latest step."""
    tokens_per_second: float = 0.0
    """Completion tokens, over the latest steps, waiting not counted."""
    lag_blocks: int = 0
    """Blocks of the stream that are known to be there and were not trained on yet."""
    held_out: EvaluationRecord | None = None
    """The latest measurement."""
    rollouts: RolloutStatus | None = None
    """How the student's own writing goes; None in runs without."""
    waiting_share: float = 0.0
    """Part of the time since the first step without traces at hand, 0 to 1; measuring and saving left out."""


OnProgress: TypeAlias = Callable[[TrainProgress], None]


def ignore_progress(_: TrainProgress) -> None:
    """For runs that nobody watches."""


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run came to."""

    checkpoint: Path
    """Directory of the last checkpoint."""
    stop_reason: StopReason
    steps: int
    """Of the whole run, resumed parts included; the same for the counts below."""
    epochs: int
    """Complete passes over every stream."""
    traces: int
    """Trained on, repetitions included."""
    tokens: int
    """Completion tokens trained on, repetitions included."""
    seconds: float
    """Wall time of this process's part."""
    waiting_seconds: float
    """Of these, without a trace to train on."""
    skipped_traces: int
    """Of this process's part: without a completion, or with a prompt over `max_sequence_tokens`."""
    curve: tuple[StepRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]
    """The first is from before the first step; empty without held-out traces."""
    how_to_go_on: str = ""
    """What to type to go on; empty when the streams have been used up."""
    damaged_blocks: int = 0
    """Left out of the streams, with `on_corrupt` "skip"."""
    best_checkpoint: Path | None = None
    """The measured one with the lowest held-out KL; None where none was measured."""

    @property
    def held_out_before(self) -> float | None:
        """Held-out KL before the first step, nats per completion token."""
        return self.evaluations[0].kl if self.evaluations else None

    @property
    def held_out_after(self) -> float | None:
        """Held-out KL of the last measurement, nats per completion token."""
        return self.evaluations[-1].kl if self.evaluations else None
