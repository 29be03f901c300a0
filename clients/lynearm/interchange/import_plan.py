"""What an import finds out before it publishes anything: whether files are whole, what stream they make."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from lynearm.client import TraceClient
from lynearm.interchange.config import ImportConfig
from lynearm.interchange.openai_jsonl import OpenAiSource
from lynearm.interchange.openai_responses import ResponseFacts, ResponseReader
from lynearm.interchange.parquet_reader import ParquetTraceSource
from lynearm.interchange.stream_specs import Facts, SpecFacts, resolve_spec
from lynearm.interchange.teacher_files import TeacherFiles, load_teacher_files
from lynearm.interchange.tokens import TokenNames
from lynearm.wire.errors import ConfigError, InvalidInputError, StreamNotFoundError
from lynearm.wire.specs import StreamSpec, spec_differences
from lynearm.wire.traces import SamplingParams

logger = logging.getLogger(__name__)

Source: TypeAlias = ParquetTraceSource | OpenAiSource


def open_source(config: ImportConfig, path: Path) -> Source:
    """One of the files.

    Raises:
        ConfigError: if its format is not known, or a flag contradicts it.
        InvalidInputError: if it cannot be read, or is no whole Parquet file of traces.
    """
    if config.format_of(path) == "openai-jsonl":
        return OpenAiSource(path)
    for name in ("temperature", "top_p"):
        if getattr(config, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is given, and {path} says it for each trace")
    source = ParquetTraceSource(path)
    if source.ignored_columns:
        logger.warning("%s: not imported: column %s", path, ", ".join(source.ignored_columns))
    return source


def check_prompts(sources: Sequence[Source]) -> None:
    """Refuse Parquet files in which the rows of a prompt do not lie side by side.

    Raises:
        InvalidInputError: naming both rows.
    """
    seen: dict[str, str] = {}
    for source in sources:
        if isinstance(source, ParquetTraceSource):
            source.check_prompts(seen)


def plan_stream(config: ImportConfig, client: TraceClient, sources: Sequence[Source]) -> StreamSpec:
    """The spec of the stream that the files make; sets the readers of JSONL files.

    Raises:
        ConfigError: if something is missing, or files contradict each other.
        InvalidInputError: if the first line of a JSONL file is no response, or there is none.
    """
    jsonl = [source for source in sources if isinstance(source, OpenAiSource)]
    in_files = [
        (source.path, source.spec)
        for source in sources
        if isinstance(source, ParquetTraceSource) and source.spec is not None
    ]
    teacher = load_teacher_files(config.tokenizer) if config.tokenizer else None
    response = next(filter(None, (source.first_facts() for source in jsonl)), None)
    if jsonl and len(jsonl) == len(sources) and response is None:
        raise InvalidInputError(f"{', '.join(str(one.path) for one in jsonl)} holds no response")
    known = SpecFacts(
        guesses=_guesses(teacher, response, sources),
        existing=_existing(client, config.stream or (in_files[0][1].name if in_files else "")),
        tokenizer=_tokenizer_facts(teacher),
        file=in_files[0][1] if in_files else None,
    )
    spec = resolve_spec(config, known)
    for path, other in in_files[1:]:
        # Resolved, since flags may settle what the files say differently.
        if differences := spec_differences(spec, resolve_spec(config, replace(known, file=other))):
            raise ConfigError(
                f"{path} is of another stream than {in_files[0][0]}: {'; '.join(differences)}",
                "import them into two streams",
            )
    for source in jsonl:
        source.reader = _response_reader(config, spec, teacher, response)
    return spec


def _existing(client: TraceClient, name: str) -> StreamSpec | None:
    try:
        return client.get_stream(name).spec if name else None
    except StreamNotFoundError:
        return None


def _guesses(
    teacher: TeacherFiles | None, response: ResponseFacts | None, sources: Sequence[Source]
) -> Facts:
    guesses: dict[str, object] = {"tokenizer.name": teacher.spec.name} if teacher is not None else {}
    if response is not None:
        said = {"teacher.model": response.model, "teacher.engine": response.engine}
        guesses |= {name: value for name, value in said.items() if value}
        guesses["codec.top_k"] = response.top_k
    first = sources[0]
    if isinstance(first, ParquetTraceSource) and first.spec is None:
        guesses["codec.tail_draws"] = first.tail_draws
    return guesses


def _tokenizer_facts(teacher: TeacherFiles | None) -> Facts:
    if teacher is None:
        return {}
    facts: dict[str, object] = {
        "tokenizer.vocab_sha256": teacher.spec.vocab_sha256,
        "tokenizer.chat_template_sha256": teacher.spec.chat_template_sha256,
        "tokenizer.vocab_size": teacher.spec.vocab_size,
        "tokenizer.eos_token_ids": teacher.spec.eos_token_ids,
    }
    sizes = {"teacher.vocab_size": teacher.vocab_size, "teacher.max_model_len": teacher.max_model_len}
    return facts | {name: value for name, value in sizes.items() if value is not None}


def _response_reader(
    config: ImportConfig, spec: StreamSpec, teacher: TeacherFiles | None, response: ResponseFacts | None
) -> ResponseReader:
    return ResponseReader(
        TokenNames(teacher.tokenizer if teacher is not None else None),
        sampling=SamplingParams(
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
        ),
        end_token_ids=spec.tokenizer.eos_token_ids,
        top_k=spec.codec.top_k,
        cut=config.top_k is not None,
        model=response.model if response is not None and not config.teacher_model else None,
    )
