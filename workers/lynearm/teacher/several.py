"""A job of several teachers before it runs: who answers what, and whether they can write what they are to.

Invariants: everything that can be refused is refused before the first model is loaded. Each teacher is a job
of its own, under a producer of its own, so that the whole goes on where it was, whichever of them was
stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.job_file import TEACHER_PLACE
from lynearm.teacher.memory import read_model_config
from lynearm.teacher.model_source import find_model_files, pin_model, prepare_model, source_kind
from lynearm.teacher.prompt_sources import iterate_prompts
from lynearm.teacher.prompts import Prompt
from lynearm.teacher.routing import PromptRoute, RoutingTable, count_routes
from lynearm.teacher.shared_streams import join_licenses, refuse_misaligned, teacher_label
from lynearm.teacher.tokenizer import describe_tokenizer, end_tokens
from lynearm.wire.errors import ConfigError, MissingDependencyError
from lynearm.wire.specs import TeacherSpec, TokenizerSpec
from lynearm.wire.weight_files import weights_revision

logger = logging.getLogger(__name__)

Untyped: TypeAlias = Any
"""An object of transformers, which ships no types that a strict checker accepts."""

_CODEC_FIELDS = ("codec", "top_k", "min_probability", "draws", "tail_draws")
"""What the teachers of one stream must agree on besides the tokenizer."""


def assign_teachers(table: RoutingTable, configs: Sequence[TeachConfig]) -> tuple[TeachConfig, ...]:
    """Give each teacher its part of the prompts, and a producer id of its own.

    Args:
        table: The rules.
        configs: What the job file says for each teacher, in the order of the rules.

    Raises:
        ConfigError: for a name that becomes too long, or teachers of one stream that encode differently.
    """
    streams = [config.stream for config in configs]
    assigned = tuple(
        replace(
            config,
            producer_id=f"{config.producer_id}-{rule.teacher}",
            job=f"{config.job}-{rule.teacher}" if config.job else "",
            route=PromptRoute(
                rule.teacher, table, names_ids=table.everyone and streams.count(config.stream) > 1
            ),
        )
        for rule, config in zip(table.rules, configs, strict=True)
    )
    for sharing in _by_stream(assigned).values():
        _refuse_other_codec(sharing)
    return assigned


def prepare_teachers(configs: Sequence[TeachConfig]) -> tuple[TeachConfig, ...]:
    """Check all that can be known before a model is loaded, and describe shared streams in their labels.

    Reads the prompts, pins the models and, where teachers share a stream, reads tokenizers and weight files.

    Args:
        configs: What `assign_teachers` returned.

    Returns:
        The teachers to which a prompt goes, in their order.

    Raises:
        PromptFileError: if a prompt file cannot be read.
        ConfigError: for prompts that no teacher takes, or a model or tokenizer that cannot be found.
        MisalignmentError: if teachers of one stream do not share tokenizer and vocabulary.
    """
    counts = {
        str(config.prompts): count_routes(config.route.table, _prompts(config))
        for config in {str(config.prompts): config for config in configs}.values()
        if config.route is not None
    }
    described: dict[str, TeachConfig] = {}
    for sharing in _by_stream([pin_model(config) for config in configs]).values():
        described |= {teacher_name(config): config for config in _describe(sharing)}
    busy: list[TeachConfig] = []
    for name, config in described.items():
        if counts[str(config.prompts)][name]:
            busy.append(config)
        else:
            logger.warning("no prompt goes to teacher %s", name)
    order = [teacher_name(config) for config in configs]
    return tuple(sorted(busy, key=lambda config: order.index(teacher_name(config))))


def teacher_name(config: TeachConfig) -> str:
    """Name of the teacher whose part of a job this is.

    Raises:
        ConfigError: if `assign_teachers` has not made it.
    """
    if config.route is None:
        raise ConfigError(f"the teacher {config.model!r} has no part in the job", "use assign_teachers")
    return config.route.teacher


def _prompts(config: TeachConfig) -> Iterator[Prompt]:
    return (one for one in iterate_prompts(config) if isinstance(one, Prompt))


def _by_stream(configs: Sequence[TeachConfig]) -> Mapping[str, list[TeachConfig]]:
    found: dict[str, list[TeachConfig]] = {}
    for config in configs:
        found.setdefault(config.stream, []).append(config)
    return found


def _refuse_other_codec(sharing: Sequence[TeachConfig]) -> None:
    first = sharing[0]
    for other in sharing[1:]:
        for field in _CODEC_FIELDS:
            before, own = getattr(first, field), getattr(other, field)
            if before != own:
                names = f"{teacher_name(first)!r} and {teacher_name(other)!r}"
                raise ConfigError(
                    f"teachers {names} write to stream {first.stream!r}, "
                    f"and their {field} is {before!r} and {own!r}",
                    f"write {field} under [teach], or put {TEACHER_PLACE} into the stream's name",
                )


def _describe(sharing: Sequence[TeachConfig]) -> list[TeachConfig]:
    """The teachers of one stream, with labels and licence that name all of them."""
    if len(sharing) == 1:
        return list(sharing)
    specs = [_read_spec(config) for config in sharing]
    for config, own in zip(sharing[1:], specs[1:], strict=True):
        refuse_misaligned(config.stream, teacher_name(config), specs[0], own)
    labels = {
        teacher_label(teacher_name(config)): f"{teacher.model}@{teacher.revision}, {config.license}"
        for config, (teacher, _) in zip(sharing, specs, strict=True)
    }
    labels |= {key: value for config in reversed(sharing) for key, value in config.labels.items()}
    license = join_licenses([config.license for config in sharing])
    width = max(teacher.vocab_size for teacher, _ in specs)
    return [
        replace(
            config,
            labels=labels,
            license=license,
            route=None if config.route is None else replace(config.route, vocab_size=width),
        )
        for config in sharing
    ]


def _read_spec(config: TeachConfig) -> tuple[TeacherSpec, TokenizerSpec]:
    """Who a pinned teacher is and whose tokenizer it uses, from its files alone: no weights are loaded.

    Raises:
        ConfigError: if its files are not on this machine.
        MissingDependencyError: without transformers.
    """
    directory = find_model_files(config)
    revision = config.revision
    if source_kind(config.model) == "gguf":
        prepared = prepare_model(config)
        directory, revision = prepared.directory, prepared.revision
    if directory is None:
        raise ConfigError(
            f"the files of teacher {config.model!r} are not here, to compare it with others of its stream",
            "bring them here, or give each teacher a stream of its own, with {teacher} in the stream's name",
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"comparing teachers needs transformers: {error}", "pip install 'lynearm[teacher]'"
        ) from error
    auto_tokenizer: Untyped = AutoTokenizer
    try:
        tokenizer: Untyped = auto_tokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n", 1)[0][:300]
        raise ConfigError(f"cannot load the tokenizer of teacher {config.model!r}: {first_line}") from error
    width = read_model_config(directory).get("vocab_size")
    teacher = TeacherSpec(
        model=config.model_name,
        revision=revision or weights_revision(directory),
        engine="",
        dtype="",
        vocab_size=width if isinstance(width, int) else len(tokenizer),
        max_model_len=config.max_model_len,
    )
    return teacher, describe_tokenizer(tokenizer, config.model_name, end_tokens(directory, tokenizer))
