"""Writes traces to a Parquet file, which is there whole or not at all.

Invariants: rows go to a file of another name (`.part`) beside the one that is wanted; after the footer is
durable it gets its name. What is held in memory is one row group, of about `ROW_GROUP_BYTES`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from google.protobuf.json_format import MessageToJson

from lynearm.interchange.arrow import (
    PARQUET_VERSION,
    SPEC_METADATA_KEY,
    VERSION_METADATA_KEY,
    Untyped,
    load_arrow,
    trace_schema,
)
from lynearm.interchange.to_arrow import traces_to_batch
from lynearm.wire.errors import ConfigError
from lynearm.wire.protobuf import spec_to_proto
from lynearm.wire.specs import StreamSpec
from lynearm.wire.traces import Trace

ROW_GROUP_BYTES = 32 << 20
"""Of Arrow's memory, about 60 k positions of 64 entries. Many readers hold a row group at a time; much
smaller ones cost them more than they save."""


class ParquetTraceWriter:
    """A Parquet file that traces are added to. Use it as a context manager: an exception leaves no file.

    Args:
        path: The file; its directory exists.
        spec: Of the stream; kept in the file's metadata.
        overwrite: Replace a file that exists.

    Raises:
        ConfigError: if the file exists, without `overwrite`, or cannot be made.
        MissingDependencyError: without pyarrow.
    """

    def __init__(self, path: Path, spec: StreamSpec, *, overwrite: bool = False) -> None:
        self.path = path
        self.row_groups = 0
        self._overwrite = overwrite
        self._pa = load_arrow()
        schema = trace_schema(self._pa, tail_draws=spec.codec.tail_draws > 0)
        self._schema = schema.with_metadata(_metadata(spec))
        self._check_path()
        self._part = path.with_name(path.name + ".part")
        self._batches: list[Untyped] = []
        self._batches_bytes = 0
        try:
            self._file = self._part.open("wb")
        except OSError as error:
            raise ConfigError(f"cannot write {self._part}: {error.strerror}") from error
        # Dictionaries pay where values repeat: ids do, and so do the logprobs of the standard mode's grid.
        self._writer: Untyped = self._pa.parquet.ParquetWriter(self._file, self._schema, compression="zstd")

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the file its name; after an exception, remove what was written."""
        try:
            if error is None:
                self._finish()
        finally:
            self._abandon()
            self._file.close()
            self._part.unlink(missing_ok=True)

    def write(self, traces: Sequence[Trace]) -> None:
        """Add a row for each trace."""
        batch = traces_to_batch(self._pa, self._schema, traces)
        self._batches.append(batch)
        self._batches_bytes += int(batch.nbytes)
        if self._batches_bytes >= ROW_GROUP_BYTES:
            self._write_row_group()

    def _write_row_group(self) -> None:
        if self._batches:
            table = self._pa.Table.from_batches(self._batches, self._schema)
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
            self.row_groups += 1
        self._batches, self._batches_bytes = [], 0

    def _finish(self) -> None:
        self._write_row_group()
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._check_path()  # again: an export may take hours
        self._part.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _abandon(self) -> None:
        """Close pyarrow's writer in any case: when collected it would try to, and the file is closed."""
        try:
            if self._writer.is_open:
                self._writer.close()
        except (self._pa.ArrowException, OSError):
            self._writer.is_open = False

    def _check_path(self) -> None:
        if self.path.is_dir():
            raise ConfigError(f"{self.path} is a directory", "name a file in it")
        if not self.path.parent.is_dir():
            raise ConfigError(
                f"there is no directory {self.path.parent}", "make it, or name another with --out"
            )
        if self.path.exists() and not self._overwrite:
            raise ConfigError(f"{self.path} exists", "name another file, or replace it with --overwrite")


def _metadata(spec: StreamSpec) -> dict[bytes, bytes]:
    return {
        SPEC_METADATA_KEY: MessageToJson(spec_to_proto(spec), indent=None).encode(),
        VERSION_METADATA_KEY: str(PARQUET_VERSION).encode(),
    }
