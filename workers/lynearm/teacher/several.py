"""A job of several teachers: each answers its part of the prompts, one after another.

Invariants: everything that can be refused is refused before the first model is loaded. Each teacher is a job
of its own, under a producer of its own, so that the whole goes on where it was, whichever of them was
stopped. A stream is sealed after the last of its teachers, and only if all of them came to their end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.engine import model_revision
from lynearm.teacher.job import OnProgress, TeachProgress, TeachReport, run_teach
from lynearm.teacher.job_file import TEACHER_PLACE
from lynearm.teacher.prompts import Prompt, load_prompts
from lynearm.teacher.routing import PromptRoute, RoutingTable, count_routes
from lynearm.teacher.shared_streams import join_licenses, refuse_misaligned, teacher_label
from lynearm.teacher.tokenizer import describe_tokenizer, end_tokens
from lynearm.wire.errors import ConfigError, MissingDependencyError
from lynearm.wire.specs import TeacherSpec, TokenizerSpec

logger = logging.getLogger(__name__)

Untyped: TypeAlias = Any
"""An object of transformers, which ships no types that a strict checker accepts."""

_CODEC_FIELDS = ("codec", "top_k", "min_probability", "draws")
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

    Reads the prompts, and, of the teachers that share a stream, tokenizers and weight files.

    Args:
        configs: What `assign_teachers` returned.

    Returns:
        The teachers to which a prompt goes, in their order.

    Raises:
        PromptFileError: if a prompt file cannot be read.
        ConfigError: for prompts that no teacher takes, or a model whose tokenizer cannot be loaded.
        MisalignmentError: if teachers of one stream do not share tokenizer and vocabulary.
    """
    counts = {
        str(config.prompts): count_routes(config.route.table, _prompts(config))
        for config in {str(config.prompts): config for config in configs}.values()
        if config.route is not None
    }
    described: dict[str, TeachConfig] = {}
    for sharing in _by_stream(configs).values():
        described |= {_name(config): config for config in _describe(sharing)}
    busy: list[TeachConfig] = []
    for name, config in described.items():
        if counts[str(config.prompts)][name]:
            busy.append(config)
        else:
            logger.warning("no prompt goes to teacher %s", name)
    order = [_name(config) for config in configs]
    return tuple(sorted(busy, key=lambda config: order.index(_name(config))))


def run_several(
    configs: Sequence[TeachConfig],
    on_progress: OnProgress = lambda progress: None,
    *,
    only: str = "",
) -> dict[str, TeachReport]:
    """Let each teacher answer its part of the prompts; as `run_teach` for each, in their order.

    Args:
        configs: What `prepare_teachers` returned.
        on_progress: Called on this thread; the message names the teacher.
        only: One teacher to run, as where each has a machine of its own. Nothing is sealed then.

    Returns:
        By teacher: what it did. Ends early with one that was interrupted.

    Raises:
        ConfigError: if there is no teacher named `only`.
        LynearmError: as for `run_teach`. What earlier teachers did stays; the same call goes on.
    """
    reports: dict[str, TeachReport] = {}
    names = [_name(config) for config in configs]
    if only and only not in names:
        raise ConfigError(f"the job has no teacher {only!r}", f"name one of {', '.join(names)}")
    for number, (name, config) in enumerate(zip(names, configs, strict=True)):
        if only not in ("", name):
            continue
        is_last_of_stream = all(later.stream != config.stream for later in configs[number + 1 :])

        def report(progress: TeachProgress, name: str = name) -> None:
            on_progress(replace(progress, message=": ".join(filter(None, (name, progress.message)))))

        logger.info("stream %s: teacher %s begins", config.stream, name)
        reports[name] = run_teach(
            replace(config, seal=config.seal and is_last_of_stream and not only), report
        )
        if reports[name].interrupted:
            break
    return reports


def _name(config: TeachConfig) -> str:
    if config.route is None:
        raise ConfigError(f"the teacher {config.model!r} has no part in the job", "use assign_teachers")
    return config.route.teacher


def _prompts(config: TeachConfig) -> Iterable[Prompt]:
    return load_prompts(config.prompts, strict=config.strict).prompts


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
                raise ConfigError(
                    f"teachers {_name(first)!r} and {_name(other)!r} write to stream {first.stream!r}, "
                    f"and their {field} is {before!r} and {own!r}",
                    f"write {field} under [teach], or put {TEACHER_PLACE} into the stream's name",
                )


def _describe(sharing: Sequence[TeachConfig]) -> list[TeachConfig]:
    """The teachers of one stream, with labels and licence that name all of them."""
    if len(sharing) == 1:
        return list(sharing)
    specs = [_read_spec(config) for config in sharing]
    for config, own in zip(sharing[1:], specs[1:], strict=True):
        refuse_misaligned(config.stream, _name(config), specs[0], own)
    labels = {
        teacher_label(_name(config)): f"{teacher.model}@{teacher.revision}, {config.license}"
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
    """Who a teacher is and whose tokenizer it uses, from its files alone: no weights are loaded.

    Raises:
        ConfigError: if there is no such model, or it has no tokenizer.
        MissingDependencyError: without transformers.
    """
    try:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    except ImportError as error:
        raise MissingDependencyError(
            f"comparing teachers needs transformers: {error}", "pip install 'lynearm[teacher]'"
        ) from error
    auto_config: Untyped = AutoConfig
    auto_tokenizer: Untyped = AutoTokenizer
    auto_generation: Untyped = GenerationConfig
    directory = Path(config.model) if Path(config.model).is_dir() else None
    try:
        model_config: Untyped = auto_config.from_pretrained(config.model)
        tokenizer: Untyped = auto_tokenizer.from_pretrained(config.model)
        generation = None if directory else auto_generation.from_pretrained(config.model).to_dict()
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n", 1)[0][:300]
        raise ConfigError(f"cannot load the tokenizer of teacher {config.model!r}: {first_line}") from error
    text_config: Untyped = model_config.get_text_config()
    name = config.model_name or Path(config.model).name
    teacher = TeacherSpec(
        model=name,
        revision=model_revision(config.model, SimpleNamespace(hf_config=model_config, revision=None)),
        engine="",
        dtype="",
        vocab_size=int(text_config.vocab_size),
        max_model_len=config.max_model_len,
    )
    return teacher, describe_tokenizer(tokenizer, name, end_tokens(directory, tokenizer, generation))
