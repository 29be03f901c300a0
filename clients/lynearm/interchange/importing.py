"""Files become blocks of a stream.

Invariants: nothing is published before every Parquet file proved to have its footer, the right columns, and
the rows of each prompt side by side. A prompt is in the stream with all its traces or not at all; the stream
alone says which are, so that a second run after any end goes on where the first one was. Memory holds a batch
of one file, the blocks in flight, and the ids of prompts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

from lynearm.client import Publisher, TraceClient, stop_on_interrupt
from lynearm.interchange.block_writer import BlockWriter
from lynearm.interchange.config import ImportConfig
from lynearm.interchange.import_plan import Source, check_prompts, open_source, plan_stream
from lynearm.interchange.progress import (
    FailedRequest,
    ImportProgress,
    ImportReport,
    ImportStage,
    OnImportProgress,
)
from lynearm.interchange.sources import PromptTraces
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.specs import StreamSpec

_MAX_SHOWN_FAILURES = 100
_REPORT_SECONDS = 0.5
"""Between two reports where no block was finished: an import may skip 100,000 prompts a second."""


def import_files(config: ImportConfig, on_progress: OnImportProgress = lambda progress: None) -> ImportReport:
    """Bring the traces of some files into a stream, but for those of prompts that it has.

    Ctrl-C stops cleanly: what was read is published, and the report says `interrupted`; a second Ctrl-C stops
    at once.

    Args:
        config: What to do.
        on_progress: Called on this thread.

    Raises:
        ConfigError: if nothing says what the stream is, or a flag and a file contradict each other. Nothing
            was published.
        InvalidInputError: naming the file and the row or line that is wrong. The prompts before it are
            imported.
        StreamExistsError: if the stream exists with another spec.
        StreamSealedError: if it is sealed, and prompts are not in it.
        MissingDependencyError: without pyarrow or transformers, where a file needs them.
    """
    with TraceClient(config.service) as client:
        return _Import(config, client, on_progress).run()


class _Import:
    def __init__(self, config: ImportConfig, client: TraceClient, on_progress: OnImportProgress) -> None:
        self._config = config
        self._client = client
        self._on_progress = on_progress
        self._started = time.monotonic()
        self._sources: list[Source] = []
        self._current = 0
        self._publisher: Publisher | None = None
        self._writer: BlockWriter | None = None
        self._stack = ExitStack()
        self._skipped_prompts = self._skipped_traces = 0
        self._failed: list[FailedRequest] = []
        self._failed_requests = 0
        self._reported_blocks = 0
        self._reported_at = 0.0

    def run(self) -> ImportReport:
        self._sources = [open_source(self._config, path) for path in self._config.files]
        self._report_progress("checking")
        check_prompts(self._sources)
        spec = plan_stream(self._config, self._client, self._sources)
        sealed = self._client.open_stream(spec).sealed
        finished = self._client.finished_prompts(spec.name)
        with stop_on_interrupt() as interrupted, self._stack:
            self._import(spec, finished, interrupted)
        if self._config.seal and not sealed and not interrupted.is_set():
            self._report_progress("sealing")
            sealed = self._client.seal_stream(spec.name).sealed
        return self._report(spec.name, sealed=sealed, interrupted=interrupted.is_set())

    def _import(self, spec: StreamSpec, finished: set[str], interrupted: threading.Event) -> None:
        try:
            self._read_into_writer(spec, finished, interrupted)
            self._flush()
            self._report_progress("importing")
        except InvalidInputError as error:
            # What came before a bad line is whole, and stays.
            self._flush()
            raise self._with_account(error, spec.name) from error

    def _read_into_writer(self, spec: StreamSpec, finished: set[str], interrupted: threading.Event) -> None:
        seen: set[str] = set()
        for prompt in self._read():
            if prompt.prompt_id in seen:
                raise InvalidInputError(
                    f"{prompt.where}: prompt {prompt.prompt_id!r} was there before",
                    "give every request an id of its own",
                )
            seen.add(prompt.prompt_id)
            if prompt.prompt_id in finished:
                self._skipped_prompts += 1
                self._skipped_traces += len(prompt.traces)
            else:
                self._writer_for(spec).add(prompt)
            self._report_if_due()
            if interrupted.is_set():
                return

    def _flush(self) -> None:
        if self._writer is not None and self._publisher is not None:
            self._writer.flush()
            self._publisher.flush()

    def _read(self) -> Iterator[PromptTraces]:
        for number, source in enumerate(self._sources):
            self._current = number
            for found in source.prompts():
                if isinstance(found, FailedRequest):
                    self._failed_requests += 1
                    if len(self._failed) < _MAX_SHOWN_FAILURES:
                        self._failed.append(found)
                else:
                    yield found
        self._current = len(self._sources)

    def _writer_for(self, spec: StreamSpec) -> BlockWriter:
        """The writer, made for the first prompt: a sealed stream that has everything needs no publisher."""
        if self._writer is None:
            publisher = self._client.publisher(spec.name, self._config.producer_id)
            self._publisher = self._stack.enter_context(publisher)
            self._writer = BlockWriter(publisher, spec)
        return self._writer

    def _with_account(self, error: InvalidInputError, stream: str) -> InvalidInputError:
        """The error, with what the stream has by then."""
        prompts = self._writer.prompts if self._writer is not None else 0
        if not prompts:
            return error
        return type(error)(
            f"{error.message} (the {prompts} prompts before it are in stream {stream!r}; after the "
            "correction the same command goes on)",
            error.remedy,
        )

    def _report_if_due(self) -> None:
        blocks = self._writer.blocks if self._writer is not None else 0
        if blocks > self._reported_blocks or time.monotonic() - self._reported_at > _REPORT_SECONDS:
            self._reported_blocks, self._reported_at = blocks, time.monotonic()
            self._report_progress("importing")

    def _report_progress(self, stage: ImportStage) -> None:
        before = sum(source.size_bytes for source in self._sources[: self._current])
        current = self._sources[self._current : self._current + 1]
        self._on_progress(
            ImportProgress(
                stage=stage,
                file=str(current[0].path) if current else "",
                read_bytes=before + sum(source.read_bytes for source in current),
                total_bytes=sum(source.size_bytes for source in self._sources),
                traces=self._writer.traces if self._writer is not None else 0,
                tokens=self._writer.tokens if self._writer is not None else 0,
                skipped_traces=self._skipped_traces,
                waiting_reason=self._publisher.waiting_reason if self._publisher is not None else "",
            )
        )

    def _report(self, stream: str, *, sealed: bool, interrupted: bool) -> ImportReport:
        writer = self._writer
        return ImportReport(
            stream=stream,
            files=len(self._sources),
            prompts=writer.prompts if writer is not None else 0,
            traces=writer.traces if writer is not None else 0,
            tokens=writer.tokens if writer is not None else 0,
            skipped_prompts=self._skipped_prompts,
            skipped_traces=self._skipped_traces,
            blocks=writer.blocks if writer is not None else 0,
            size_bytes=writer.size_bytes if writer is not None else 0,
            failed=tuple(self._failed),
            failed_requests=self._failed_requests,
            seconds=time.monotonic() - self._started,
            interrupted=interrupted,
            sealed=sealed,
        )
