"""A job of several teachers: each answers its part of the prompts, side by side where there is room.

Invariants: everything that can be refused is refused before the first model is loaded. Each teacher is a job
of its own, under a producer of its own, so that the whole goes on where it was, whichever of them was
stopped. A stream is sealed after the last of its teachers, and only if all of them came to their end.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeAlias

from lynearm.client import TraceClient
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.engine import weights_digest
from lynearm.teacher.job import OnProgress, TeachJob, TeachReport, local_cpus, settled
from lynearm.teacher.job_file import TEACHER_PLACE
from lynearm.teacher.memory import read_model_config
from lynearm.teacher.model_source import find_model_files, pin_model, prepare_model, source_kind
from lynearm.teacher.prompt_sources import iterate_prompts
from lynearm.teacher.prompts import Prompt
from lynearm.teacher.ray_actor import ray_session
from lynearm.teacher.routing import PromptRoute, RoutingTable, count_routes
from lynearm.teacher.shared_progress import SharedProgress
from lynearm.teacher.shared_streams import join_licenses, refuse_misaligned, teacher_label
from lynearm.teacher.side_by_side import SideBySide
from lynearm.teacher.tokenizer import describe_tokenizer, end_tokens
from lynearm.wire.errors import ConfigError, LynearmError, MissingDependencyError, TeacherError
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
        described |= {_name(config): config for config in _describe(sharing)}
    busy: list[TeachConfig] = []
    for name, config in described.items():
        if counts[str(config.prompts)][name]:
            busy.append(config)
        else:
            logger.warning("no prompt goes to teacher %s", name)
    order = [_name(config) for config in configs]
    return tuple(sorted(busy, key=lambda config: order.index(_name(config))))


class TeachersFailedError(TeacherError):
    """Some of several teachers came to no good end.

    Args:
        message: Who, and why.
        remedy: What to do.
        reports: What the others did, by teacher.
        errors: What went wrong, by teacher.
    """

    def __init__(
        self,
        message: str,
        remedy: str = "",
        *,
        reports: Mapping[str, TeachReport] | None = None,
        errors: Mapping[str, LynearmError] | None = None,
    ) -> None:
        super().__init__(message, remedy)
        self.reports = dict(reports or {})
        self.errors = dict(errors or {})


def run_several(
    configs: Sequence[TeachConfig],
    on_progress: OnProgress = lambda progress: None,
    *,
    only: str = "",
) -> dict[str, TeachReport]:
    """Let each teacher answer its part of the prompts, side by side as far as there is room.

    Args:
        configs: What `prepare_teachers` returned.
        on_progress: Called on this thread with the progress of all; as for `run_teach`.
        only: One teacher to run, as where each has a machine of its own. Nothing is sealed then.

    Returns:
        By teacher, in their order: what it did. Without those that had not begun when all were interrupted.

    Raises:
        ConfigError: if there is no teacher named `only`.
        LynearmError: as for `run_teach`, before anything is started; what earlier runs did stays.
        TeachersFailedError: if some failed later; the others came to their ends. The same call goes on.
    """
    by_name = {_name(config): config for config in configs}
    if only and only not in by_name:
        raise ConfigError(f"the job has no teacher {only!r}", f"name one of {', '.join(by_name)}")
    addresses = {config.ray_address for config in configs}
    if len(addresses) > 1:
        raise ConfigError(
            f"the teachers name {len(addresses)} Rays, {' and '.join(map(repr, sorted(addresses)))}",
            "write ray_address under [teach]: all of them share one",
        )
    wanted = {name: settled(config) for name, config in by_name.items() if only in ("", name)}
    with ExitStack() as clients:
        return _Several(wanted, on_progress, clients, may_seal=not only).run()


class _Several:
    """Jobs of teachers from the first look at the service to their reports."""

    def __init__(
        self,
        configs: Mapping[str, TeachConfig],
        on_progress: OnProgress,
        clients: ExitStack,
        *,
        may_seal: bool,
    ) -> None:
        self._configs = configs
        self._progress = SharedProgress(list(configs), on_progress)
        self._clients = {
            name: clients.enter_context(TraceClient(config.service)) for name, config in configs.items()
        }
        self._jobs = {
            name: TeachJob(config, self._clients[name], self._progress.of(name))
            for name, config in configs.items()
        }
        self._may_seal = may_seal
        self._reports: dict[str, TeachReport] = {}
        self._errors: dict[str, LynearmError] = {}

    def run(self) -> dict[str, TeachReport]:
        has_work = {name: job.look() for name, job in self._jobs.items()}
        for name, job in self._jobs.items():
            if not has_work[name]:
                self._conclude(name, job)
        if any(has_work.values()):
            self._teach({name: job for name, job in self._jobs.items() if has_work[name]})
        if self._errors:
            raise self._failure()
        return self._in_order()

    def _teach(self, jobs: Mapping[str, TeachJob]) -> None:
        for job in jobs.values():
            job.prepare_for_ray()
        configs = [job.config for job in jobs.values()]
        try:
            with ray_session(configs[0].ray_address, local_cpus(configs)) as ray:
                SideBySide(ray, jobs, self._progress.note, self._take_end).run()
        except KeyboardInterrupt:
            for name, job in jobs.items():
                job.interrupted = True
                if name not in self._reports and job.supervisor is not None:
                    self._conclude(name, job)

    def _take_end(self, name: str, error: LynearmError | None) -> None:
        self._progress.note(name, f"failed: {error.message}" if error else "")
        if error is None:
            self._conclude(name, self._jobs[name])
        else:
            self._errors[name] = error

    def _conclude(self, name: str, job: TeachJob) -> None:
        # Of a stream with several teachers, the last one seals.
        sharing = [other for other, config in self._configs.items() if config.stream == job.config.stream]
        others_are_done = all(
            other in self._reports and not self._reports[other].interrupted
            for other in sharing
            if other != name
        )
        self._reports[name] = job.conclude(seal=self._may_seal and others_are_done)

    def _in_order(self) -> dict[str, TeachReport]:
        """The reports as they are after the last teacher, who seals."""
        streams = Counter(config.stream for config in self._configs.values())
        sealed = {report.stream for report in self._reports.values() if report.sealed}
        return {
            name: replace(
                self._reports[name],
                sealed=self._reports[name].stream in sealed,
                shares_stream=streams[self._reports[name].stream] > 1,
            )
            for name in self._jobs
            if name in self._reports
        }

    def _failure(self) -> TeachersFailedError:
        told = "; ".join(f"teacher {name}: {error.message}" for name, error in self._errors.items())
        remedies = [error.remedy for error in self._errors.values() if error.remedy]
        return TeachersFailedError(
            told,
            "; ".join([*dict.fromkeys(remedies), "the same command goes on"]),
            reports=self._in_order(),
            errors=self._errors,
        )


def _name(config: TeachConfig) -> str:
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
        revision=revision or weights_digest(directory),
        engine="",
        dtype="",
        vocab_size=width if isinstance(width, int) else len(tokenizer),
        max_model_len=config.max_model_len,
    )
    return teacher, describe_tokenizer(tokenizer, config.model_name, end_tokens(directory, tokenizer))
