"""Reads traces out of Parquet files, whoever wrote them.

Invariants: what is held in memory is one batch of rows, of about `BATCH_BYTES`, however large the row groups
of the file are. All traces of one prompt lie in adjacent rows: `check_prompts` proves it beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from google.protobuf.json_format import Parse, ParseError

from lynearm.interchange.arrow import (
    PARQUET_VERSION,
    SPEC_METADATA_KEY,
    VERSION_METADATA_KEY,
    Untyped,
    load_arrow,
    trace_schema,
)
from lynearm.interchange.from_arrow import RowError, batch_to_traces, check_columns
from lynearm.interchange.sources import PromptTraces
from lynearm.v1 import trace_pb2
from lynearm.wire.errors import InvalidInputError, LynearmError, UnsupportedFormatError
from lynearm.wire.protobuf import spec_from_proto
from lynearm.wire.specs import StreamSpec
from lynearm.wire.traces import Trace

BATCH_BYTES = 16 << 20
"""Of a batch of rows before encoding, as the file's metadata estimates it."""

_MAX_BATCH_ROWS = 256
"""For files so repetitive that their encoded size says nothing of the rows in memory."""
_READ_BUFFER_BYTES = 1 << 20
"""Without a buffer pyarrow reads whole column chunks: a row group at a time."""


class ParquetTraceSource:
    """A Parquet file of traces. See `TraceSource`.

    Args:
        path: The file.

    Raises:
        InvalidInputError: if it cannot be read, is not Parquet or cut off, or its columns are not a trace's.
        UnsupportedFormatError: if a newer lynearm wrote it.
        MissingDependencyError: without pyarrow.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pa = load_arrow()
        self._schema = trace_schema(self._pa)
        try:
            self.size_bytes = path.stat().st_size
            self._file: Untyped = self._pa.parquet.ParquetFile(
                path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False
            )
        except (self._pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error
        self._rows_read = 0
        found = self._file.schema_arrow
        metadata: dict[bytes, bytes] = found.metadata or {}
        version = metadata.get(VERSION_METADATA_KEY, b"1")
        if not version.isdigit() or int(version) > PARQUET_VERSION:
            raise UnsupportedFormatError(
                f"{path} has version {version.decode(errors='replace')} of the columns; this package reads "
                f"versions up to {PARQUET_VERSION}",
                "upgrade lynearm",
            )
        check_columns(self._pa, found, self._schema, str(path))
        unknown = sorted(set(found.names) - set(self._schema.names))
        self.ignored_columns: tuple[str, ...] = tuple(unknown)
        """Columns that are no part of a trace; an import leaves them out."""
        self.spec: StreamSpec | None = self._read_spec(metadata.get(SPEC_METADATA_KEY))
        """Of the stream that the file was exported from; None where another program wrote it again."""

    @property
    def read_bytes(self) -> int:
        """Share of the file whose rows were read, in bytes."""
        rows = int(self._file.metadata.num_rows)
        return self.size_bytes * self._rows_read // rows if rows else self.size_bytes

    @property
    def tail_draws(self) -> int:
        """Draws from the tail of each position, read from the first one; 0 without any."""
        if "tail_draws" in self._file.schema_arrow.names:
            for batch in self._batches(columns=["tail_draws"], rows=self._batch_rows()):
                positions = batch.column(0).flatten()
                if len(positions):
                    return len(positions[0].as_py() or ())
        return 0

    def check_prompts(self, seen: dict[str, str]) -> None:
        """Refuse prompts whose rows are not adjacent, reading no other column.

        A second import could not tell what it has of them.

        Args:
            seen: Where each prompt of other files stands; those of this one are added.

        Raises:
            InvalidInputError: naming both rows.
        """
        row = 0
        last: str | None = None
        for batch in self._batches(columns=["prompt_id"], rows=1 << 16):
            for prompt_id in batch.column(0).to_pylist():
                if prompt_id != last and prompt_id in seen:
                    raise InvalidInputError(
                        f"{self.path}: row {row} is of prompt {prompt_id!r}, which is also in "
                        f"{seen[prompt_id]}, and other prompts are between them",
                        "sort the file by prompt_id; prompts of two files need two streams",
                    )
                if prompt_id != last:
                    seen[prompt_id] = f"{self.path}: row {row}"
                last = prompt_id
                row += 1

    def prompts(self) -> Iterator[PromptTraces]:
        """The prompts in order; rows that follow each other under one id are one prompt."""
        for prompt_id, rows in groupby(self._traces(), key=lambda located: located[1].prompt_id):
            first, *rest = rows
            traces = (first[1], *(trace for _, trace in rest))
            yield PromptTraces(prompt_id, traces, f"{self.path}: row {first[0]}")

    def _traces(self) -> Iterator[tuple[int, Trace]]:
        """Row number and trace of every row."""
        self._rows_read = 0
        names = [name for name in self._file.schema_arrow.names if name in self._schema.names]
        for batch in self._batches(columns=names, rows=self._batch_rows()):
            try:
                for index, trace in enumerate(batch_to_traces(self._pa, batch, self._schema)):
                    yield self._rows_read + index, trace
            except RowError as error:
                first, last = self._rows_read, self._rows_read + batch.num_rows - 1
                row = f"row {first + error.row}" if error.row is not None else f"rows {first} to {last}"
                raise InvalidInputError(f"{self.path}: {row}: {error.message}", error.remedy) from error
            self._rows_read += batch.num_rows

    def _batches(self, *, columns: list[str], rows: int) -> Iterator[Untyped]:
        batches: Untyped = self._file.iter_batches(batch_size=rows, columns=columns, use_threads=False)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (self._pa.ArrowException, OSError) as error:
                raise self._unreadable(error) from error
            yield batch

    def _batch_rows(self) -> int:
        metadata = self._file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        # The largest mean of a row group; with dictionaries, what is read is up to four times as much.
        largest = max(
            (group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=1
        )
        return max(1, min(_MAX_BATCH_ROWS, int(BATCH_BYTES / (4 * max(largest, 1)))))

    def _read_spec(self, data: bytes | None) -> StreamSpec | None:
        if data is None:
            return None
        try:
            return spec_from_proto(Parse(data, trace_pb2.StreamSpec(), ignore_unknown_fields=True))
        except (ParseError, UnicodeDecodeError, LynearmError) as error:
            raise InvalidInputError(
                f"{self.path}: the stream spec in its metadata cannot be read: {error}",
                "export the stream again",
            ) from error

    def _unreadable(self, error: Exception) -> InvalidInputError:
        if isinstance(error, OSError) and error.strerror:
            return InvalidInputError(f"cannot read {self.path}: {error.strerror}")
        what = " ".join(str(error).split())
        return InvalidInputError(
            f"{self.path} is not a whole Parquet file: {what}",
            "copy it again, or give --format if it is another",
        )
