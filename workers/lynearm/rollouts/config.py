"""What a rollout process is told by the trainer that starts it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

from lynearm.wire.errors import ConfigError
from lynearm.wire.specs import MAX_TAIL_DRAWS, MAX_TOP_K
from lynearm.wire.traces import Cursor

Support: TypeAlias = Literal["teacher", "student"]
SUPPORTS: tuple[Support, ...] = get_args(Support)


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """One rollout process.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    service: str
    """host:port of the trace service; several servers of one catalog with commas between."""
    teacher: str
    """host:port of the served teacher; several that serve the same model with commas between."""
    stream: str
    """Where scored rollouts are published. It has to be there."""
    directory: Path
    """For what is not in the stream yet, and the log."""
    prompts: str = ""
    """Source of prompts as for `lynearm teach`; empty: the prompts of `prompt_stream`."""
    prompt_stream: str = ""
    """Stream whose prompts the student answers, where `prompts` names no source."""
    start: Cursor = Cursor()  # noqa: RUF009  # frozen
    """The next trace of `stream` that the trainer will look at."""
    step: int = 0
    """Steps that the trainer has done."""

    temperature: float = 1.0
    """Of sampling; 0 is greedy."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this probability together."""
    max_tokens: int = 256
    """Bound on a rollout, tokens."""
    max_model_len: int = 2048
    """Longest prompt plus rollout, tokens."""
    seed: int = 0
    """Of the draws."""

    top_k: int = 64
    """Entries of a scored row."""
    support: Support = "teacher"
    """Whose likeliest tokens those are: "teacher", or "student" for the tokens that the student itself holds
    likeliest, with the teacher's probabilities there."""
    score_temperature: float = 1.0
    """At which teacher and student are compared."""
    tail_draws: int = 0
    """Tokens that the teacher draws from the tail of each scored row; 0 with the student's support."""

    max_staleness: int = 16
    """Steps that a rollout may be behind the student that learns from it."""
    per_step: float = 4.0
    """Rollouts that a step takes, on average."""
    ahead: int = 32
    """Rollouts that may be under way or wait for the trainer."""
    wave: int = 16
    """Rollouts that are made, scored and published as one."""

    held_out_fraction: float = 0.0
    """Part of the prompts that is never trained on: nothing is written for those."""
    split_seed: int = 0
    """Of the hash by which they are chosen."""

    threads: int = 0
    """CPU threads of the engine; 0 for all."""
    dtype: str = "auto"
    """As for a teacher."""
    kv_cache_mib: int = 0
    """As for a teacher."""
    service_timeout_seconds: float = 30.0
    """How long one call may take."""

    def __post_init__(self) -> None:
        """Check every field."""
        checks = {
            "stream is empty": bool(self.stream),
            "neither prompts nor prompt_stream is given": bool(self.prompts or self.prompt_stream),
            f"temperature is {self.temperature}, expected 0 or more": self.temperature >= 0,
            f"top_p is {self.top_p}, expected above 0 and at most 1": 0 < self.top_p <= 1,
            f"max_tokens is {self.max_tokens}, expected 1 or more": self.max_tokens >= 1,
            f"max_model_len is {self.max_model_len}, expected 2 or more": self.max_model_len >= 2,
            f"top_k is {self.top_k}, expected 1 to {MAX_TOP_K}": 1 <= self.top_k <= MAX_TOP_K,
            f"support is {self.support!r}, expected one of {SUPPORTS}": self.support in SUPPORTS,
            f"score_temperature is {self.score_temperature}, expected above 0": self.score_temperature > 0,
            f"tail_draws is {self.tail_draws}, expected 0 to {MAX_TAIL_DRAWS}, 0 with support 'student'": (
                0 <= self.tail_draws <= (MAX_TAIL_DRAWS if self.support == "teacher" else 0)
            ),
            f"max_staleness is {self.max_staleness}, expected 0 or more": self.max_staleness >= 0,
            f"per_step is {self.per_step}, expected above 0": self.per_step > 0,
            f"wave is {self.wave}, expected 1 to ahead, which is {self.ahead}": 1 <= self.wave <= self.ahead,
        }
        for problem, holds in checks.items():
            if not holds:
                raise ConfigError(problem)

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps({**asdict(self), "directory": str(self.directory)})

    @classmethod
    def from_json(cls, line: str) -> RolloutConfig:
        """The configuration in a line.

        Raises:
            ConfigError: if it is not one of this version.
        """
        try:
            values = cast("dict[str, Any]", json.loads(line))
            unknown = set(values) - {field.name for field in fields(cls)}
            if unknown:
                raise ConfigError(f"the trainer says {sorted(unknown)}, which this version does not know")
            values["start"] = Cursor(**cast("dict[str, int]", values["start"]))
            values["directory"] = Path(values["directory"])
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the rollout process got no configuration: {line[:200]!r}") from error
