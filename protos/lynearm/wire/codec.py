"""Traces to blocks and back.

A payload is one zstd frame around a table of columns (`lynearm.wire.columns`). Two modes: "exact"
returns every float32 bit for bit; "standard" puts logprobs and tail mass on a grid
(`lynearm.wire.quantise`) that adds about 1e-4 nats of KL divergence. Token ids, text and everything
else travel unchanged in both. docs/format.md specifies the layout for readers in other languages.

Two things are not kept. The token id of a padding entry comes back as 0. In standard mode, entries of
one level come back in the order of the block's dictionary, since equal logprobs have no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import zstandard

from lynearm.wire.blocks import (
    FORMAT_VERSION,
    MAX_PAYLOAD_BYTES,
    MAX_TRACES,
    MAX_UNCOMPRESSED_BYTES,
    BlockHeader,
    checksum,
    join_block,
    split_block,
    verify_block,
)
from lynearm.wire.columns import Column, ColumnReader, ColumnWriter, Encoding
from lynearm.wire.errors import CodecError, CorruptBlockError, UnsupportedFormatError
from lynearm.wire.metadata import TraceMetadata, read_metadata, write_metadata
from lynearm.wire.positions import Positions, read_positions, write_positions
from lynearm.wire.specs import CODEC_MODES, MAX_TOP_K, MAX_VOCAB_SIZE, CodecMode
from lynearm.wire.traces import TopK, Trace

ZSTD_LEVEL = 3

MAX_BLOCK_ENTRIES = 1 << 23
"""Bound on positions times largest K (at least 1) of a block: what decoding must be ready to hold."""

_ROUNDING = 1e-2
"""How far a float32 log-softmax may put a logprob above 0, or a mass outside [0, 1]; measured: 2e-4."""


def encode_block(traces: Sequence[Trace], *, mode: CodecMode = "standard", vocab_size: int) -> bytes:
    """Some traces as one serialised `lynearm.v1.Block`.

    Args:
        traces: At least one; K may differ between them.
        mode: "exact" or "standard".
        vocab_size: Width of the teacher's logits, 1 to 2^20; every token id is below it.

    Raises:
        CodecError: if a trace breaks its contract (the message names prompt and field), or if the
            traces are too many for one block.
    """
    _check_arguments(traces, mode, vocab_size)
    content = _encode_content(traces, mode, vocab_size)
    if len(content) > MAX_UNCOMPRESSED_BYTES:
        raise _too_large(f"{len(content)} bytes before compression", MAX_UNCOMPRESSED_BYTES)
    payload = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(content)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise _too_large(f"a payload of {len(payload)} bytes", MAX_PAYLOAD_BYTES)
    header = BlockHeader(
        format_version=FORMAT_VERSION,
        codec_mode=mode,
        trace_count=len(traces),
        prompt_token_count=sum(trace.prompt_token_ids.size for trace in traces),
        completion_token_count=sum(trace.completion_token_ids.size for trace in traces),
        uncompressed_size_bytes=len(content),
        payload_xxh3=checksum(payload),
    )
    return join_block(header, payload)


def decode_block(data: bytes | memoryview) -> tuple[Trace, ...]:
    """The traces of a block, in the order in which they were given.

    Args:
        data: One serialised `lynearm.v1.Block`. Nothing in it is trusted.

    Returns:
        Traces whose arrays may share memory with each other, but not with `data`.

    Raises:
        InvalidInputError: if the bytes are not a block.
        CorruptBlockError: if a checksum, size, count or value does not hold.
        UnsupportedFormatError: if a newer lynearm wrote the block.
    """
    header = verify_block(data)
    _, payload = split_block(data)
    reader = ColumnReader(_decompress(payload, header.uncompressed_size_bytes))
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


def _check_arguments(traces: Sequence[Trace], mode: str, vocab_size: int) -> None:
    if mode not in CODEC_MODES:
        raise CodecError(f"codec mode {mode!r} is none of {CODEC_MODES}")
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise CodecError(f"vocab_size {vocab_size} is outside 1..{MAX_VOCAB_SIZE}")
    if not 0 < len(traces) <= MAX_TRACES:
        raise CodecError(f"{len(traces)} traces in a block, expected 1 to {MAX_TRACES}")
    positions = sum(trace.completion_token_ids.size for trace in traces)
    width = max(trace.top_k.k for trace in traces)
    if width > MAX_TOP_K:
        raise CodecError(f"K is {width}, at most {MAX_TOP_K} can be kept")
    if positions * max(width, 1) > MAX_BLOCK_ENTRIES:
        raise _too_large(f"{positions} positions of {width} entries", MAX_BLOCK_ENTRIES)
    for trace in traces:
        _check_trace(trace, vocab_size)


def _check_trace(trace: Trace, vocab_size: int) -> None:
    """Refuse what shapes and dtypes do not show: ids, order, and values that are no probabilities."""
    top_k = trace.top_k
    ids = {
        "prompt_token_ids": trace.prompt_token_ids,
        "completion_token_ids": trace.completion_token_ids,
        "top_k.token_ids": np.where(top_k.logprobs > -np.inf, top_k.token_ids, 0),
    }
    problems = [
        f"{name} from {array.min()} to {array.max()} leave 0..{vocab_size - 1}"
        for name, array in ids.items()
        if array.size and (array.min() < 0 or array.max() >= vocab_size)
    ]
    for name, array in {"sampled_logprobs": trace.sampled_logprobs, "top_k.logprobs": top_k.logprobs}.items():
        if array.size and array.max() > _ROUNDING:
            problems.append(f"{name} reach {array.max()}, but a logprob is at most 0")
    # Compared, not subtracted: −inf − −inf is NaN.
    if (top_k.logprobs[:, 1:] > top_k.logprobs[:, :-1]).any():
        problems.append("top_k.logprobs are not sorted, descending")
    tail = top_k.tail_mass
    if tail.size and (tail.min() < -_ROUNDING or tail.max() > 1 + _ROUNDING):
        problems.append(f"top_k.tail_mass from {tail.min()} to {tail.max()} leaves 0..1")
    if problems:
        raise CodecError(f"trace of prompt {trace.prompt_id!r}: {problems[0]}")


def _encode_content(traces: Sequence[Trace], mode: CodecMode, vocab_size: int) -> bytes:
    writer = ColumnWriter()
    writer.words(Column.VOCAB_SIZE, Encoding.UINT32, [vocab_size])
    writer.numbers(Column.PROMPT_LENGTHS, [trace.prompt_token_ids.size for trace in traces])
    writer.numbers(Column.COMPLETION_LENGTHS, [trace.completion_token_ids.size for trace in traces])
    writer.numbers(Column.TOP_K_WIDTHS, [trace.top_k.k for trace in traces])
    write_metadata(writer, traces, vocab_size=vocab_size)
    write_positions(writer, _gather_positions(traces), mode=mode, vocab_size=vocab_size)
    return writer.content()


def _gather_positions(traces: Sequence[Trace]) -> Positions:
    """Rows of all traces, padded to the largest K."""
    lengths = [trace.completion_token_ids.size for trace in traces]
    width = max(trace.top_k.k for trace in traces)
    token_ids_NK = np.zeros((sum(lengths), width), np.int32)
    logprobs_NK = np.full((sum(lengths), width), -np.inf, np.float32)
    start = 0
    for trace, length in zip(traces, lengths, strict=True):
        token_ids_NK[start : start + length, : trace.top_k.k] = trace.top_k.token_ids
        logprobs_NK[start : start + length, : trace.top_k.k] = trace.top_k.logprobs
        start += length
    entries_NK = logprobs_NK > -np.inf
    token_ids_NK[~entries_NK] = 0
    return Positions(
        kept=entries_NK.sum(axis=1),
        token_ids=token_ids_NK,
        logprobs=logprobs_NK,
        tail_mass=np.concatenate([trace.top_k.tail_mass for trace in traces]),
        sampled_ids=np.concatenate([trace.completion_token_ids for trace in traces]),
        sampled_logprobs=np.concatenate([trace.sampled_logprobs for trace in traces]),
    )


def _decompress(payload: memoryview, size_bytes: int) -> bytes:
    """The content of the payload's one frame.

    The size that a frame declares is read before anything is allocated: zstandard ignores
    `max_output_size` when the frame declares its own.
    """
    try:
        frame = zstandard.get_frame_parameters(payload)
    except zstandard.ZstdError as error:
        raise CorruptBlockError(f"the payload is not a zstd frame: {error}") from error
    if frame.content_size != size_bytes or size_bytes > MAX_UNCOMPRESSED_BYTES:
        raise CorruptBlockError(
            f"the payload declares {frame.content_size} bytes of content, the header {size_bytes}"
        )
    if frame.dict_id:
        raise UnsupportedFormatError(f"the payload needs zstd dictionary {frame.dict_id}", "upgrade lynearm")
    try:
        content = zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptBlockError(f"the payload does not decompress: {error}") from error
    if len(content) != size_bytes:
        raise CorruptBlockError(f"the payload holds {len(content)} bytes, the header says {size_bytes}")
    return content


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


def _too_large(what: str, limit: int) -> CodecError:
    return CodecError(f"{what}: a block's limit is {limit}", "put fewer traces into one block")
