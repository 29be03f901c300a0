"""Rows of prompt sources, one after the other: JSON lines, Parquet files, Hugging Face datasets.

A source is named by one text:

    prompts.jsonl               JSON lines in UTF-8, one object a line; also compressed, as .jsonl.gz
    prompts.parquet             a Parquet file
    data/train-*.parquet        every file that matches, by name; of a directory, every one of these kinds
    hf:openai/gsm8k?config=main&split=train&revision=…      a dataset of the hub, or of a local directory

Invariants: rows come in the same order each time. Memory holds one line, or one batch of rows, at a time:
datasets are read where the library keeps them on disk.
"""

from __future__ import annotations

import glob
import gzip
import importlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast
from urllib.parse import parse_qsl

from lynearm.teacher.prompts import BadLine, PromptColumns, parse_object
from lynearm.wire.errors import MissingDependencyError, PromptFileError

Untyped: TypeAlias = Any
"""An object of pyarrow or datasets, which ship no types that a strict checker accepts."""

HUB_PREFIX = "hf:"

MAX_LINE_BYTES = 4 << 20
"""Of a line of JSON: four times what the service takes as a prompt, for fields that are left out."""

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""What is read of a directory."""
_PARQUET_MAGIC = b"PAR1"
_GZIP_MAGIC = b"\x1f\x8b"
_BATCH_ROWS = 256
_READ_BUFFER_BYTES = 1 << 20
"""Without a buffer pyarrow reads whole column chunks: a row group at a time."""
_DATASET_KEYS = ("config", "split", "revision")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source."""

    file: str
    line: int
    """From 1."""
    fields: Mapping[str, object]


def read_rows(source: str, columns: PromptColumns) -> Iterator[Row | BadLine]:
    """Every row of a source, in its order.

    Args:
        source: As in the module's docstring.
        columns: What will be looked at; nothing else is read of tables.

    Raises:
        PromptFileError: if a file cannot be read, or a table lacks the columns.
        MissingDependencyError: without pyarrow or datasets, where one is needed.
    """
    if source.startswith(HUB_PREFIX):
        yield from _dataset_rows(source, columns)
        return
    for path in find_files(source):
        if _begins_with(path, _PARQUET_MAGIC):
            yield from _parquet_rows(path, columns)
        else:
            yield from _json_rows(path)


def find_files(source: str) -> list[Path]:
    """The files that a path, a directory or a pattern names, by name.

    Raises:
        PromptFileError: if there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(one for one in path.iterdir() if one.name.endswith(_SUFFIXES))
        if not found:
            raise PromptFileError(f"directory {path} holds no file named *.jsonl, *.jsonl.gz or *.parquet")
        return found
    if not path.exists() and glob.has_magic(source):
        found = sorted(Path(one) for one in glob.glob(str(path), recursive=True) if Path(one).is_file())
        if not found:
            raise PromptFileError(f"no file matches {source!r}", "quote the pattern, and check the directory")
        return found
    return [path]


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise _unreadable(path, error) from error


def _json_rows(path: Path) -> Iterator[Row | BadLine]:
    try:
        with _open(path) as file:
            for number, line in enumerate(_lines(file), start=1):
                if not line.strip():
                    continue
                try:
                    if len(line) > MAX_LINE_BYTES:
                        raise PromptFileError(f"the line is longer than {MAX_LINE_BYTES} bytes")
                    yield Row(str(path), number, parse_object(line, first=number == 1))
                except PromptFileError as error:
                    yield BadLine(str(path), number, error.message)
    except (OSError, EOFError) as error:
        raise _unreadable(path, error) from error


def _open(path: Path) -> BinaryIO:
    if _begins_with(path, _GZIP_MAGIC):
        return cast("BinaryIO", gzip.open(path, "rb"))
    return path.open("rb")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, its beginning."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        yield line


def _parquet_rows(path: Path, columns: PromptColumns) -> Iterator[Row]:
    try:
        importlib.import_module("pyarrow.parquet")
        pa: Untyped = importlib.import_module("pyarrow")
    except ImportError as error:
        raise MissingDependencyError(
            f"prompts in Parquet need pyarrow: {error}", "pip install 'lynearm[parquet]'"
        ) from error
    try:
        with pa.parquet.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False) as file:
            names = _wanted(columns, [str(name) for name in file.schema_arrow.names], str(path))
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, fields)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _dataset_rows(source: str, columns: PromptColumns) -> Iterator[Row]:
    dataset = _load_dataset(source)
    names = _wanted(columns, [str(name) for name in dataset.column_names], source)
    number = 0
    for batch in dataset.select_columns(names).iter(batch_size=_BATCH_ROWS):
        for values in zip(*(batch[name] for name in names), strict=True):
            number += 1
            yield Row(source, number, dict(zip(names, values, strict=True)))


def _load_dataset(source: str) -> Untyped:
    name, settings = _parse_dataset(source)
    try:
        datasets: Untyped = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingDependencyError(
            f"{source} needs the package datasets: {error}", "pip install 'lynearm[datasets]'"
        ) from error
    # Its bars and ours would write over each other.
    datasets.disable_progress_bars()
    directory = Path(name).expanduser()
    try:
        if any((directory / file).is_file() for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(directory))
            if isinstance(loaded, datasets.DatasetDict) and settings.get("split") in loaded:
                loaded = loaded[settings["split"]]
        else:
            loaded = datasets.load_dataset(
                str(directory) if directory.is_dir() else name,
                settings.get("config"),
                split=settings.get("split"),
                revision=settings.get("revision"),
            )
    # The library raises what it likes, its own errors and those of pyarrow, fsspec and the hub's client.
    except Exception as error:
        raise PromptFileError(
            f"cannot load {source}: {_first_line(error)}",
            f"check the name and write it as {HUB_PREFIX}OWNER/NAME?config=…&split=…",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = sorted(str(split) for split in loaded)
        if len(splits) > 1 or settings.get("split"):
            said = f"has no split {settings['split']!r}" if "split" in settings else "has several splits"
            example = f"{source.partition('?')[0]}?split={splits[0]}"
            raise PromptFileError(f"{source} {said}: {', '.join(splits)}", f"name one, as in {example}")
        loaded = loaded[splits[0]]
    return loaded


def _parse_dataset(source: str) -> tuple[str, dict[str, str]]:
    name, _, query = source.removeprefix(HUB_PREFIX).partition("?")
    pairs: list[tuple[str, str]] = []
    with suppress(ValueError):
        pairs = parse_qsl(query, strict_parsing=True) if query else []
    settings = dict(pairs)
    unknown = sorted(set(settings) - set(_DATASET_KEYS))
    if not name or (query and not pairs) or unknown or len(settings) < len(pairs):
        said = f"; {unknown[0]!r} is none of {', '.join(_DATASET_KEYS)}" if unknown else ""
        raise PromptFileError(
            f"{source!r} names no dataset{said}",
            f"write it as {HUB_PREFIX}OWNER/NAME?config=…&split=…&revision=…",
        )
    return name, settings


def _wanted(columns: PromptColumns, available: Collection[str], source: str) -> list[str]:
    """The columns to read.

    Raises:
        PromptFileError: if the table lacks one that the user named, or all that can hold a prompt.
    """
    shown = ", ".join(sorted(available)) or "none"
    for name in columns.named:
        if name not in available:
            raise PromptFileError(f"{source} has no column {name!r}", f"its columns are {shown}")
    contents = [name for name in columns.contents if name in available]
    if not contents:
        either = " or ".join(repr(name) for name in columns.contents)
        raise PromptFileError(
            f"{source} has no column {either}, but {shown}",
            "name one with --prompt-column or --messages-column",
        )
    return contents + [name for name in columns.optional if name in available and name not in contents]


def _unreadable(path: Path, error: Exception) -> PromptFileError:
    reason = (error.strerror if isinstance(error, OSError) else None) or _first_line(error)
    return PromptFileError(f"cannot read prompts from {path}: {reason}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__
