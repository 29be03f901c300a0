"""Version 1 of the block format, for reading: what lynearm wrote until 0.1.

A payload is one zstd frame around a table of columns. Two modes: "exact" holds every float32 bit for bit;
"standard" has logprobs and tail mass on a fixed grid. docs/format-v1.md specifies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import numpy as np

from lynearm.wire.blocks import (
    MAX_UNCOMPRESSED_BYTES,
    BlockHeader,
)
from lynearm.wire.compression import decompress
from lynearm.wire.errors import CodecError, CorruptBlockError
from lynearm.wire.specs import MAX_TOP_K, MAX_VOCAB_SIZE
from lynearm.wire.traces import TopK, Trace
from lynearm.wire.version1.columns import Column, ColumnReader
from lynearm.wire.version1.metadata import TraceMetadata, read_metadata
from lynearm.wire.version1.positions import Positions, read_positions

ZSTD_LEVEL = 3

MAX_BLOCK_ENTRIES = 1 << 23
"""Bound on positions times largest K (at least 1) of a block: what decoding must be ready to hold."""

_ROUNDING = 1e-2
"""How far a float32 log-softmax may put a logprob above 0, or a mass outside [0, 1]; measured: 2e-4."""


def read_traces(header: BlockHeader, payload: memoryview) -> tuple[Trace, ...]:
    """The traces of a version 1 block.

    Args:
        header: Verified.
        payload: Nothing in it is trusted.

    Raises:
        CorruptBlockError: if a size, count or value does not hold.
        UnsupportedFormatError: if a later writer used what this reader does not know.
    """
    if header.codec_mode not in ("exact", "standard"):
        raise CorruptBlockError(f"a block of version 1 in mode {header.codec_mode!r}, which came later")
    if header.uncompressed_size_bytes > MAX_UNCOMPRESSED_BYTES:
        raise CorruptBlockError(f"{header.uncompressed_size_bytes} bytes of content are beyond any block")
    content = decompress(payload, limit=header.uncompressed_size_bytes)
    if len(content) != header.uncompressed_size_bytes:
        raise CorruptBlockError(
            f"the payload holds {len(content)} bytes, the header says {header.uncompressed_size_bytes}"
        )
    reader = ColumnReader(content)
    shapes = _read_shapes(reader, header)
    metadata = read_metadata(reader, shapes.prompt_lengths, vocab_size=shapes.vocab_size)
    positions = read_positions(
        reader, shapes.lengths, shapes.widths, mode=header.codec_mode, vocab_size=shapes.vocab_size
    )
    ends = np.cumsum(shapes.lengths).tolist()
    rows = (slice(end - length, end) for end, length in zip(ends, shapes.lengths, strict=True))
    return tuple(map(_join_trace, metadata, rows, shapes.widths, repeat(positions)))


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Sizes of everything else in the block, one element per trace."""

    vocab_size: int
    prompt_lengths: list[int]
    lengths: list[int]
    widths: list[int]


def _read_shapes(reader: ColumnReader, header: BlockHeader) -> _Shapes:
    vocab_size = reader.unsigned(Column.VOCAB_SIZE)
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise CorruptBlockError(f"a vocabulary of {vocab_size}, expected 1 to {MAX_VOCAB_SIZE}")
    count = header.trace_count
    shapes = _Shapes(
        vocab_size=vocab_size,
        prompt_lengths=reader.lengths(Column.PROMPT_LENGTHS, count, header.prompt_token_count),
        lengths=reader.lengths(Column.COMPLETION_LENGTHS, count, header.completion_token_count),
        widths=reader.numbers(Column.TOP_K_WIDTHS, count).tolist(),
    )
    width = max(shapes.widths)
    if width > MAX_TOP_K or sum(shapes.lengths) * max(width, 1) > MAX_BLOCK_ENTRIES:
        raise CorruptBlockError(f"{sum(shapes.lengths)} positions of {width} entries are beyond any block")
    return shapes


def _join_trace(described: TraceMetadata, rows: slice, width: int, positions: Positions) -> Trace:
    top_k = TopK(
        token_ids=positions.token_ids[rows, :width],
        logprobs=positions.logprobs[rows, :width],
        tail_mass=positions.tail_mass[rows],
    )
    try:
        return Trace(
            prompt_id=described.prompt_id,
            prompt_token_ids=described.prompt_token_ids,
            completion_token_ids=positions.sampled_ids[rows],
            sampled_logprobs=positions.sampled_logprobs[rows],
            top_k=top_k,
            finish_reason=described.finish_reason,
            sample_index=described.sample_index,
            spans=described.spans,
            sampling=described.sampling,
            tags=described.tags,
            completion_text=described.completion_text,
        )
    except CodecError as error:
        raise CorruptBlockError(f"the block holds a trace that cannot be: {error}") from error
