"""Traces to blocks and back.

A payload is the traces' metadata followed by their rows (`lynearm.wire.positions`). What comes back of a
logprob depends on the mode: "exact" returns every float32 bit for bit; "fine", "standard" and "compact" put
logprobs and tail masses on a grid that adds at most 1e-6, 1e-4 and 1e-3 nats of KL divergence to a block's
mean position, over kept entries and tail; "sampled" returns draws and their counts. Token ids, text and
everything else travel unchanged. docs/format.md specifies the bytes for readers in other languages.

Three things are not kept. The token id of a padding entry comes back as 0. Entries of one level, in the exact
mode entries of equal logprob, come back in another order, since nothing orders them; and so do the draws from
a row's tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from lynearm.v1 import trace_pb2
from lynearm.wire.adaptive import keep_likely
from lynearm.wire.blocks import (
    FORMAT_VERSION,
    MAX_BLOCK_ENTRIES,
    MAX_PAYLOAD_BYTES,
    MAX_UNCOMPRESSED_BYTES,
    BlockHeader,
    checksum,
    join_block,
    split_block,
    verify_block,
)
from lynearm.wire.compression import decompress
from lynearm.wire.dictionaries import Dictionary, DictionaryReader, TokenOrder
from lynearm.wire.errors import CodecError, CorruptBlockError
from lynearm.wire.fields import ByteReader, varint
from lynearm.wire.hidden import HiddenStates
from lynearm.wire.hidden_section import (
    read_description,
    read_hidden,
    slice_hidden,
    spec_of_traces,
    write_hidden,
)
from lynearm.wire.metadata import (
    TraceMetadata,
    TraceShapes,
    parse_metadata,
    read_metadata,
    read_shapes,
    write_metadata,
)
from lynearm.wire.positions import Positions
from lynearm.wire.row_reading import read_positions
from lynearm.wire.row_writing import write_positions
from lynearm.wire.specs import CodecMode, CodecSpec
from lynearm.wire.trace_rows import check_arguments, check_tail_draws, name_trace_rows, too_large
from lynearm.wire.traces import Float32Array, TopK, Trace
from lynearm.wire.version1.reader import read_traces as read_version_1

_ZSTD_LEVEL = 3

_MIN_COMPRESSED_BYTES = 128
"""Metadata below it travels as it is: a zstd frame would hardly be smaller."""


def encode_block(
    traces: Sequence[Trace],
    *,
    codec: CodecSpec | CodecMode = "standard",
    vocab_size: int,
    dictionary: Dictionary | None = None,
) -> bytes:
    """Some traces as one serialised `lynearm.v1.Block`.

    Args:
        traces: At least one; K may differ between them.
        codec: The stream's codec, or its mode alone. `top_k` is not enforced; `min_probability` is. Traces
            must have the codec's hidden states and tail draws; with the mode alone, all of them the same.
        vocab_size: Width of the teacher's logits, 1 to 2^20; every token id is below it.
        dictionary: What the codec has learned about the teacher; the reader needs it then.

    Raises:
        CodecError: if a trace breaks its contract (the message names prompt and field), or if the
            traces are too many for one block.
    """
    spec = codec if isinstance(codec, CodecSpec) else CodecSpec(codec)
    check_arguments(traces, spec, vocab_size, dictionary)
    traces = [keep_likely(trace, spec.min_probability) for trace in traces]
    check_tail_draws(traces, codec)
    hidden = spec_of_traces(traces)
    if isinstance(codec, CodecSpec) and codec.hidden != hidden:
        raise CodecError(
            f"trace of prompt {traces[0].prompt_id!r} does not have the hidden states of the stream's codec",
            "capture them as the stream says, or publish to another stream",
        )
    rows = name_trace_rows(traces, spec, _order_of(dictionary, vocab_size), dictionary)
    usual_top_k = 0 if dictionary is None else dictionary.top_k
    metadata = write_metadata(traces, hidden, usual_top_k=usual_top_k)
    if len(metadata) > MAX_UNCOMPRESSED_BYTES:
        raise too_large(f"{len(metadata)} bytes of metadata", MAX_UNCOMPRESSED_BYTES)
    stored, uncompressed_size = metadata, 0
    if len(metadata) >= _MIN_COMPRESSED_BYTES:
        compressed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=False).compress(metadata)
        if len(compressed) < len(metadata):
            stored, uncompressed_size = compressed, len(metadata)
    body = write_positions(rows, vocab_size=vocab_size, dictionary=dictionary)
    payload = b"".join((varint(len(stored)), stored, write_hidden(traces, hidden), body))
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise too_large(f"a payload of {len(payload)} bytes", MAX_PAYLOAD_BYTES)
    header = BlockHeader(
        format_version=FORMAT_VERSION,
        codec_mode=spec.mode,
        trace_count=len(traces),
        prompt_token_count=sum(trace.prompt_token_ids.size for trace in traces),
        completion_token_count=sum(trace.completion_token_ids.size for trace in traces),
        uncompressed_size_bytes=uncompressed_size,
        payload_xxh3=checksum(payload),
        dictionary_digest=dictionary.digest if dictionary is not None else b"",
    )
    return join_block(header, payload)


def decode_block(
    data: bytes | memoryview, *, dictionaries: DictionaryReader | None = None
) -> tuple[Trace, ...]:
    """The traces of a block, in the order in which they were given.

    Args:
        data: One serialised `lynearm.v1.Block`. Nothing in it is trusted.
        dictionaries: Finds the dictionary that the block may need.

    Returns:
        Traces whose arrays may share memory with each other, but not with `data`.

    Raises:
        InvalidInputError: if the bytes are not a block.
        CorruptBlockError: if a checksum, size, count or value does not hold.
        UnsupportedFormatError: if a newer lynearm wrote the block.
        CodecError: if the block needs a dictionary and there is no way to find it.
    """
    header = verify_block(data)
    _, payload = split_block(data)
    if header.format_version == 1:
        return read_version_1(header, payload)
    read = _read_payload(header, payload, dictionaries)
    return tuple(_join_traces(read_metadata(read.message, read.shapes), read.positions, read.hidden))


@dataclass(frozen=True, slots=True)
class BlockRows:
    """The rows of a block as arrays: what a trainer batches, without an object for each trace."""

    positions: Positions
    row_counts: tuple[int, ...]
    """Rows of each trace: those of its prompt, where it has any, and those of its completion."""
    prompt_row_counts: tuple[int, ...]
    """How many of them are the prompt's."""
    hidden: HiddenStates | None = None
    """Hidden states at the completion's rows, those of the prompts left out; None: not captured."""


def decode_rows(data: bytes | memoryview, *, dictionaries: DictionaryReader | None = None) -> BlockRows:
    """The distributions of a block, as arrays over all its positions.

    Args:
        data: As for `decode_block`; version 2 or later.
        dictionaries: As for `decode_block`.

    Raises:
        LynearmError: as `decode_block`; CodecError for a block of version 1.
    """
    header = verify_block(data)
    _, payload = split_block(data)
    if header.format_version == 1:
        raise CodecError("blocks of version 1 are read by decode_block only")
    read = _read_payload(header, payload, dictionaries)
    shapes = read.shapes
    return BlockRows(read.positions, tuple(shapes.row_counts), tuple(shapes.prompt_row_counts), read.hidden)


def _order_of(dictionary: Dictionary | None, vocab_size: int) -> TokenOrder:
    return TokenOrder.by_id(vocab_size) if dictionary is None else dictionary.order


@dataclass(frozen=True, slots=True)
class _Payload:
    message: trace_pb2.BlockMetadata
    shapes: TraceShapes
    positions: Positions
    hidden: HiddenStates | None


def _read_payload(
    header: BlockHeader, payload: memoryview, dictionaries: DictionaryReader | None
) -> _Payload:
    reader = ByteReader(payload)
    message = _read_metadata_message(header, reader.take(reader.varint()))
    dictionary: Dictionary | None = None
    if header.dictionary_digest:
        dictionary = (dictionaries or DictionaryReader()).get(header.dictionary_digest)
    shapes = read_shapes(
        message,
        completion_tokens=header.completion_token_count,
        usual_top_k=0 if dictionary is None else dictionary.top_k,
    )
    count, width = sum(shapes.row_counts), max(shapes.widths)
    if count * max(1, width) > MAX_BLOCK_ENTRIES:
        raise CorruptBlockError(f"{count} positions of {width} entries are beyond any block")
    if shapes.prompt_tokens > MAX_BLOCK_ENTRIES:
        raise CorruptBlockError(f"{shapes.prompt_tokens} prompt tokens are beyond any block")
    if shapes.prompt_tokens != header.prompt_token_count:
        raise CorruptBlockError(
            f"{shapes.prompt_tokens} prompt tokens, the header says {header.prompt_token_count}"
        )
    hidden: HiddenStates | None = None
    if message.HasField("hidden_states"):
        described = read_description(message.hidden_states)
        hidden = read_hidden(described, reader.take(reader.varint()), header.completion_token_count)
    positions, vocab_size = read_positions(
        reader.rest(),
        shapes.row_counts,
        shapes.widths,
        shapes.before,
        mode=header.codec_mode,
        dictionary=dictionary,
    )
    if shapes.highest_prompt_token >= vocab_size:
        raise CorruptBlockError(f"prompt token {shapes.highest_prompt_token} in a vocabulary of {vocab_size}")
    return _Payload(message, shapes, positions, hidden)


def _read_metadata_message(header: BlockHeader, stored: memoryview) -> trace_pb2.BlockMetadata:
    size = header.uncompressed_size_bytes
    if size == 0:
        return parse_metadata(stored, trace_count=header.trace_count)
    metadata = decompress(stored, limit=size)
    if len(metadata) != size:
        raise CorruptBlockError(f"metadata of {len(metadata)} bytes, the header says {size}")
    return parse_metadata(metadata, trace_count=header.trace_count)


def _join_traces(
    described: Sequence[TraceMetadata], positions: Positions, hidden: HiddenStates | None
) -> Iterable[Trace]:
    start = 0
    completed = 0
    for metadata in described:
        middle = start + metadata.prompt_rows
        end = middle + metadata.completion_length
        rows = slice(completed, completed + metadata.completion_length)
        states = None if hidden is None else slice_hidden(hidden, rows)
        yield _join_trace(metadata, positions, slice(start, middle), slice(middle, end), states)
        start, completed = end, rows.stop


def _join_trace(
    metadata: TraceMetadata,
    positions: Positions,
    prompt: slice,
    completion: slice,
    hidden: HiddenStates | None,
) -> Trace:
    prompt_token_ids = metadata.prompt_token_ids
    prompt_top_k: TopK | None = None
    prompt_logprobs: Float32Array | None = None
    if metadata.prompt_rows:
        prompt_token_ids = np.concatenate([prompt_token_ids, positions.sampled_ids[prompt]])
        prompt_top_k = _top_k(positions, prompt, metadata.top_k)
        prompt_logprobs = positions.sampled_logprobs[prompt]
    try:
        return Trace(
            prompt_id=metadata.prompt_id,
            prompt_token_ids=prompt_token_ids,
            completion_token_ids=positions.sampled_ids[completion],
            sampled_logprobs=positions.sampled_logprobs[completion],
            top_k=_top_k(positions, completion, metadata.top_k),
            finish_reason=metadata.finish_reason,
            sample_index=metadata.sample_index,
            spans=metadata.spans,
            sampling=metadata.sampling,
            tags=metadata.tags,
            completion_text=metadata.completion_text,
            stop_string=metadata.stop_string,
            prompt_top_k=prompt_top_k,
            prompt_logprobs=prompt_logprobs,
            hidden=hidden,
        )
    except CodecError as error:
        raise CorruptBlockError(f"the block holds a trace that cannot be: {error}") from error


def _top_k(positions: Positions, rows: slice, width: int) -> TopK:
    return TopK(
        token_ids=positions.token_ids[rows, :width],
        logprobs=positions.logprobs[rows, :width],
        tail_mass=positions.tail_mass[rows],
        tail_draws=None if positions.tail_draws is None else positions.tail_draws[rows],
    )
