"""What the demo's report tells. Every part may be empty; the report then says that it was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TrainPoint:
    """The training loss of one step."""

    step: int
    tokens: int
    """Completion tokens trained on until then, repetitions included."""
    loss: float
    """Nats per completion token."""


@dataclass(frozen=True, slots=True)
class HeldOutPoint:
    """One measurement on traces that are never trained on."""

    step: int
    tokens: int
    """Completion tokens trained on until then, repetitions included."""
    kl: float
    """Forward KL to the teacher, nats per completion token."""


@dataclass(frozen=True, slots=True)
class ExportRow:
    """One exported package, and how far it is from the trained student in float32."""

    name: str
    """For people, for example "MLX, 4-bit"."""
    path: str
    """Where it lies, as the reader should see it."""
    size_bytes: int
    kl_mean: float
    """KL(student ‖ package), nats per position."""
    max_abs_logit_difference: float
    greedy_matched: int
    """Tokens of the greedy continuation before the first difference."""
    greedy_total: int
    checked_with: str = ""
    """What computed the package's logits, and what that cannot show."""


@dataclass(frozen=True, slots=True)
class StageTiming:
    """When a stage of the demo ran; stages may overlap."""

    name: str
    start_seconds: float
    """Since the demo began."""
    end_seconds: float


@dataclass(frozen=True, slots=True)
class TextSample:
    """One prompt, and what teacher and student write to it."""

    prompt: str
    student_text: str
    teacher_text: str = ""
    """Empty where the teacher was not asked."""


@dataclass(frozen=True, slots=True)
class DemoReport:
    """One run of the demo."""

    title: str
    teacher: str
    """Name, for people, for example "SmolLM2-135M-Instruct, 30 layers"."""
    student: str
    teacher_tokens: int
    """Completion tokens that the teacher wrote and sent."""
    bits_per_token: float
    """Size of the stored blocks over `teacher_tokens`, everything included."""
    top_k: int
    """Entries of the teacher's distribution kept at each position."""
    curve: tuple[TrainPoint, ...] = ()
    held_out: tuple[HeldOutPoint, ...] = ()
    """The first is from before the first step, the last from after the last one."""
    exports: tuple[ExportRow, ...] = ()
    stages: tuple[StageTiming, ...] = ()
    samples: tuple[TextSample, ...] = ()
    sampled_from: str = "4-bit MLX student"
    """Which package wrote the `student_text` of the samples."""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Further facts about the run, in order."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Program or package to version, in order."""
    machine: str = ""

    @property
    def held_out_before(self) -> float | None:
        """Held-out KL before training, nats per completion token."""
        return self.held_out[0].kl if self.held_out else None

    @property
    def held_out_after(self) -> float | None:
        """Held-out KL after training, nats per completion token."""
        return self.held_out[-1].kl if self.held_out else None

    @property
    def seconds(self) -> float:
        """From the first stage's start to the last one's end; 0 without stages."""
        if not self.stages:
            return 0.0
        return max(one.end_seconds for one in self.stages) - min(one.start_seconds for one in self.stages)
