"""The students of `benchmarks/distill_quality.py`: their training, and how far they are from the teacher.

Every method trains through `lynearm.student.optimization`, on the same traces in the same order. The dense
one differs only in its rows, which hold the teacher's whole vocabulary, computed again before each step.

Shape legend: T = completion positions of a trace, V = vocabulary, K = tokens of the teacher's top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lynearm.student.batches import Batch, Batcher, DrawnTrace
from lynearm.student.config import TrainConfig
from lynearm.student.model import load_student
from lynearm.student.objective import Objective, parse_terms
from lynearm.student.optimization import Optimization
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import TopK, Trace

Rows: TypeAlias = Literal["likely", "draws", "none", "tail draws"]
"""What a row holds: the likeliest entries and the tail's mass, draws, nothing, or the likeliest entries and
draws from the tail."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to teach."""

    name: str
    title: str
    losses: tuple[str, ...]
    """Terms as `docs/losses.md` explains them."""
    codec: CodecSpec | None
    """What carries the rows; None: the teacher's whole distributions, which no stream carries."""
    rows: Rows = "likely"


@dataclass(frozen=True, slots=True)
class Training:
    """What all methods share."""

    steps: int
    sequences: int
    """Traces of a step."""
    learning_rate: float
    dtype: str
    """What students compute in while they train; their weights are float32, and so is every measurement."""


@dataclass(frozen=True, slots=True)
class Quality:
    """A student beside its teacher on held-out traces, means over positions."""

    kl: float
    """KL(teacher ‖ student) over the whole vocabulary, nats."""
    kl_of_top: float
    """The part of it that the teacher's top tokens and the mass of all others account for; what is left
    is the KL among those others, by their mass."""
    agreement: float
    """Part of the positions where both have the same likeliest token."""


class HeldOut:
    """Held-out traces and the teacher's whole distributions there.

    Args:
        teacher: A transformers model, float32.
        traces: With rows of the teacher's top tokens.
    """

    def __init__(self, teacher: Any, traces: Sequence[Trace]) -> None:
        self._traces = traces
        self._teacher = [full_logprobs(teacher, trace).float() for trace in traces]

    @property
    def positions(self) -> int:
        """Completion positions of all traces."""
        return sum(len(logprobs_TV) for logprobs_TV in self._teacher)

    def measure(self, student: Any) -> Quality:
        """How far a transformers model is from the teacher; computed in float32, summed in float64."""
        sums = np.zeros(3)
        student.eval()
        for trace, teacher_TV in zip(self._traces, self._teacher, strict=True):
            student_TV = full_logprobs(student, trace)
            ids_TK = torch.from_numpy(trace.top_k.token_ids.astype(np.int64))
            sums += [
                float(_kl(teacher_TV.double(), student_TV).sum()),
                float(_kl(_buckets(teacher_TV.double(), ids_TK), _buckets(student_TV, ids_TK)).sum()),
                float((teacher_TV.argmax(-1) == student_TV.argmax(-1)).sum()),
            ]
        kl, kl_of_top, agreement = (sums / self.positions).tolist()
        return Quality(kl, kl_of_top, agreement)


@torch.no_grad()
def full_logprobs(model: Any, trace: Trace) -> Tensor:
    """Log-probabilities of the whole vocabulary at the completion's positions, [T, V], float64."""
    token_ids = np.concatenate([trace.prompt_token_ids, trace.completion_token_ids[:-1]]).astype(np.int64)
    output = model(
        input_ids=torch.from_numpy(token_ids)[None],
        use_cache=False,
        logits_to_keep=trace.completion_token_ids.size,
    )
    # float32 would leave sums of a row 1e-4 off one.
    return torch.log_softmax(output.logits[0].double(), -1)


def with_full_rows(teacher: Any, trace: Trace) -> Trace:
    """The trace with rows that hold the teacher's whole distribution."""
    logprobs_TV = full_logprobs(teacher, trace).float().numpy()
    positions, vocab_size = logprobs_TV.shape
    ids_TV = np.broadcast_to(np.arange(vocab_size, dtype=np.int32), logprobs_TV.shape)
    return dataclasses.replace(trace, top_k=TopK(ids_TV, logprobs_TV, np.zeros(positions, np.float32)))


def train(
    student_dir: Path,
    method: Method,
    traces: Sequence[Trace],
    training: Training,
    *,
    teacher: Any,
    measure_at: Sequence[int],
    measure: Callable[[Any], Quality],
) -> dict[int, Quality]:
    """Train a student from its beginning; its quality after each step of `measure_at`.

    Args:
        student_dir: Where every student begins.
        method: Its losses; the dense one asks the teacher for its rows.
        traces: In the order of training, enough for all steps, as the method's stream carries them.
        training: Steps, sizes and rates.
        teacher: A transformers model, float32.
        measure_at: Steps.
        measure: Takes the transformers model.
    """
    student = load_student(student_dir, device="cpu", dtype=training.dtype)
    config = TrainConfig(
        student=student_dir,
        loss=method.losses,
        learning_rate=training.learning_rate,
        schedule="cosine",
        warmup_steps=max(1, training.steps // 10),
        max_steps=training.steps,
        batch_sequences=training.sequences,
    )
    optimization = Optimization(student, config, objectives=(Objective(parse_terms(config.loss)),))
    found: dict[int, Quality] = {}
    for step, batch in enumerate(_batches(traces, config), start=1):
        if method.codec is None:
            dense = tuple(with_full_rows(teacher, trace) for trace in batch.traces)
            batch = dataclasses.replace(batch, traces=dense)
        student.train(True)
        optimization.step(batch, step)
        if step in measure_at:
            found[step] = measure(student.model)
    return found


def _batches(traces: Sequence[Trace], config: TrainConfig) -> Iterator[Batch]:
    batcher = Batcher(batch_sequences=config.batch_sequences, max_sequence_tokens=config.max_sequence_tokens)
    for trace in traces:
        if batch := batcher.add(DrawnTrace(trace, 0)):
            yield batch


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of each row, nats; a bucket without mass counts nothing."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def _buckets(logprobs_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Log-probabilities of some tokens and of all others together, [T, K + 1]."""
    kept_TK = logprobs_TV.gather(1, ids_TK)
    others_T1 = logprobs_TV.scatter(1, ids_TK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((kept_TK, others_T1), 1)
