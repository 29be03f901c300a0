"""What a demo can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lynearm.wire.errors import ConfigError

PROMPTS = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Configuration of a demo. The defaults take at most eight minutes on two cores.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    out: Path = Path("runs/demo")
    """Directory for everything the demo makes; what an earlier demo left there is replaced."""

    cache_dir: Path | None = None
    """Where the converted SmolLM2 stays between demos; None is the user's cache directory."""

    teacher: Path | None = None
    """A teacher instead of SmolLM2-135M-Instruct: a directory in the transformers layout, Apache-2.0."""

    prompts: Path = PROMPTS
    """JSON lines; those tagged `split=held_out` come first and are never trained on."""

    dropped_layers: tuple[int, ...] = (3, 5, 7, 12, 14, 17, 19, 25)
    """Decoder layers of the teacher that the student lacks. For SmolLM2: those whose loss alone costs little
    KL, no two of them neighbours."""

    top_k: int = 64
    """Entries that the teacher sends for each position."""

    max_tokens: int = 64
    """Bound on a completion, tokens."""

    temperature: float = 0.7
    """Of the teacher's sampling: at 1 a model of this size rambles. The logprobs are raw either way."""

    max_batch: int = 64
    """Sequences that the teacher writes at once."""

    learning_rate: float = 3e-4
    """Peak rate of the student; it falls to a tenth over the steps, along a cosine."""

    ce_weight: float = 0.1
    """Weight of the cross-entropy beside the KL."""

    held_out_traces: int = 20
    """Traces on which the held-out KL is measured; the demo's prompts hold 30, and each counts at every
    measurement."""

    epochs: int = 2
    """Passes over the stream: the first follows the teacher, later ones replay it."""

    train_steps: int = 64
    """Optimizer steps: about one pass over the stream."""

    train_seconds: float = 345.0
    """Bound on the training, so that a slow machine ends in time too."""

    batch_sequences: int = 4
    """Traces per optimizer step: so few, since there is time for no more than some dozens of steps."""

    micro_batch_tokens: int = 512
    """Padded tokens that the student computes at once."""

    eval_every_steps: int = 25
    """Steps between measurements of the held-out KL."""

    coreml: bool = True
    """Also make a Core ML package."""

    def __post_init__(self) -> None:
        """Check every field."""
        if len(set(self.dropped_layers)) != len(self.dropped_layers):
            raise ConfigError(f"dropped_layers {self.dropped_layers} names a layer twice")
        if not self.prompts.is_file():
            raise ConfigError(f"there is no prompt file {self.prompts}", "name one with --prompts")
