"""The spec of the stream that an import makes, put together from everything that says something about it.

From the weakest to the strongest: defaults; what a response or a directory's name lets guess; the stream that
exists; the tokenizer; the spec in a Parquet file; flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from lynearm.interchange.config import ImportConfig
from lynearm.wire.errors import ConfigError, InvalidInputError
from lynearm.wire.specs import CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec

Facts: TypeAlias = Mapping[str, Any]
"""Values by the name of a spec's field, "teacher.model" for one; Any since each has the type of its field."""

_PARTS: Mapping[str, type[TeacherSpec | TokenizerSpec | CodecSpec]] = {
    "teacher": TeacherSpec,
    "tokenizer": TokenizerSpec,
    "codec": CodecSpec,
}

_DEFAULTS: Facts = {
    "teacher.engine": "unknown",
    "teacher.dtype": "unknown",
    "teacher.logprobs_mode": "raw",
    "teacher.logprobs_temperature": 1.0,
    "codec.mode": "standard",
    "codec.min_probability": 0.0,
    "codec.draws": 0,
    "codec.hidden": None,
    "codec.tail_draws": 0,
    "labels": {},
}

_FLAGS: Mapping[str, str] = {
    "name": "stream",
    "license": "license",
    "teacher.model": "teacher_model",
    "teacher.revision": "teacher_revision",
    "teacher.engine": "engine",
    "teacher.dtype": "dtype",
    "teacher.vocab_size": "vocab_size",
    "teacher.max_model_len": "max_model_len",
    "teacher.logprobs_mode": "logprobs_mode",
    "teacher.logprobs_temperature": "logprobs_temperature",
    "codec.mode": "codec",
    "codec.top_k": "top_k",
}
"""Field of an `ImportConfig` that says a fact."""


@dataclass(frozen=True, slots=True)
class SpecFacts:
    """What is known about a stream before it is made."""

    guesses: Facts = field(default_factory=dict[str, Any])
    existing: StreamSpec | None = None
    tokenizer: Facts = field(default_factory=dict[str, Any])
    file: StreamSpec | None = None


def resolve_spec(config: ImportConfig, known: SpecFacts) -> StreamSpec:
    """The spec of the stream.

    Raises:
        ConfigError: naming everything that nothing says, and the flags that would; or a value out of range.
    """
    facts: dict[str, Any] = {**_DEFAULTS, **known.guesses}
    facts |= _facts_of(known.existing) if known.existing is not None else {}
    facts |= known.tokenizer
    facts |= _facts_of(known.file) if known.file is not None else {}
    # No file brings hidden states: what is imported has none, whatever the stream had that it comes from.
    facts["codec.hidden"] = None
    facts |= _flag_facts(config)
    wanted = [
        "name",
        "license",
        *(f"{part}.{one.name}" for part, kind in _PARTS.items() for one in fields(kind)),
    ]
    missing = [name for name in wanted if name not in facts]
    if missing:
        raise ConfigError(
            f"nothing says {_listed(missing)} of the stream", f"give {_listed(_remedies(missing))}"
        )
    parts: dict[str, Any] = {
        part: kind(**{one.name: facts[f"{part}.{one.name}"] for one in fields(kind)})
        for part, kind in _PARTS.items()
    }
    try:
        return StreamSpec(name=facts["name"], license=facts["license"], labels=facts["labels"], **parts)
    except InvalidInputError as error:
        raise ConfigError(error.message, error.remedy) from error


def _facts_of(spec: StreamSpec) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": spec.name, "license": spec.license, "labels": dict(spec.labels)}
    for part, kind in _PARTS.items():
        facts |= {f"{part}.{one.name}": getattr(getattr(spec, part), one.name) for one in fields(kind)}
    return facts


def _flag_facts(config: ImportConfig) -> dict[str, Any]:
    facts = {name: getattr(config, flag) for name, flag in _FLAGS.items()}
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _remedies(missing: list[str]) -> list[str]:
    """Flags that say what is missing; a tokenizer says much at once."""
    by_tokenizer = [name for name in missing if name.startswith("tokenizer.")]
    flags = [f"--{_FLAGS[name].replace('_', '-')}" for name in missing if name in _FLAGS]
    return ["--tokenizer, the teacher's directory or name", *flags] if by_tokenizer else flags


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
