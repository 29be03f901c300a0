"""A stream becomes a Parquet file, block after block."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from lynearm.client import TraceClient, stop_on_interrupt
from lynearm.interchange.parquet_writer import ParquetTraceWriter
from lynearm.interchange.progress import ExportProgress, ExportReport, OnExportProgress
from lynearm.wire.codec import decode_block


def export_parquet(
    client: TraceClient,
    stream: str,
    path: Path,
    *,
    overwrite: bool = False,
    on_progress: OnExportProgress = lambda progress: None,
) -> ExportReport:
    """Write a stream's traces, from its start to where it ends now.

    Args:
        client: Of the service.
        stream: Its name.
        path: The file; there whole or not at all.
        overwrite: Replace a file that exists.
        on_progress: Called on this thread, after each block.

    Raises:
        ConfigError: if the file exists, without `overwrite`, or cannot be made.
        StreamNotFoundError: if there is no such stream.
        MissingDependencyError: without pyarrow.
        KeyboardInterrupt: after Ctrl-C; no file is left.
    """
    started = time.monotonic()
    info = client.get_stream(stream)
    traces = tokens = blocks = size_bytes = 0
    dictionaries = client.dictionaries(stream, wait=True)
    with ParquetTraceWriter(path, info.spec, overwrite=overwrite) as writer:
        with (
            client.subscribe(stream, start=0, follow=False) as subscription,
            stop_on_interrupt(wake=subscription.close) as interrupted,
        ):
            for received in subscription:
                decoded = decode_block(received.block, dictionaries=dictionaries)
                writer.write(decoded)
                blocks += 1
                traces += len(decoded)
                tokens += sum(trace.completion_token_ids.size for trace in decoded)
                size_bytes += len(received.block)
                on_progress(ExportProgress(traces, max(traces, info.trace_count), tokens, size_bytes))
                _raise_if(interrupted)
        _raise_if(interrupted)
    return ExportReport(
        stream=stream,
        path=path,
        traces=traces,
        tokens=tokens,
        blocks=blocks,
        next_offset=blocks,
        row_groups=writer.row_groups,
        size_bytes=path.stat().st_size,
        seconds=time.monotonic() - started,
    )


def _raise_if(interrupted: threading.Event) -> None:
    if interrupted.is_set():
        raise KeyboardInterrupt
