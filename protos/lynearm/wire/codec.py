"""Traces to blocks and back.

A payload is the traces' metadata followed by their rows (`lynearm.wire.positions`). What comes back of a
logprob depends on the mode: "exact" returns every float32 bit for bit; "fine", "standard" and "compact" put
logprobs and tail masses on a grid that adds at most 1e-6, 1e-4 and 1e-3 nats of KL divergence to a block's
mean position, over kept entries and tail; "sampled" returns draws and their counts. Token ids, text and
everything else travel unchanged. docs/format.md specifies the bytes for readers in other languages.

Two things are not kept. The token id of a padding entry comes back as 0. Entries of one level, in the exact
mode entries of equal logprob, come back in another order, since nothing orders them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import zstandard

from lynearm.v1 import trace_pb2
from lynearm.wire.adaptive import keep_likely
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
from lynearm.wire.code_tables import FEW_CODES, MANY_CODES, SymbolCounts, build_tables
from lynearm.wire.compression import decompress
from lynearm.wire.dictionaries import (
    Dictionary,
    DictionaryReader,
    TokenLists,
    TokenOrder,
    list_tokens,
    order_tokens,
)
from lynearm.wire.errors import CodecError, CorruptBlockError
from lynearm.wire.fields import ByteReader, varint
from lynearm.wire.grids import Grid, choose_grid
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
from lynearm.wire.positions import ROUNDING, Positions, first_previous_tokens
from lynearm.wire.row_naming import NamedRows, name_rows
from lynearm.wire.row_reading import read_positions
from lynearm.wire.row_writing import write_positions
from lynearm.wire.specs import CODEC_MODES, MAX_TOP_K, MAX_VOCAB_SIZE, CodecMode, CodecSpec
from lynearm.wire.token_kernels import AS_SAMPLED
from lynearm.wire.traces import Float32Array, Int32Array, TopK, Trace
from lynearm.wire.version1.reader import read_traces as read_version_1

_Number = TypeVar("_Number", np.int32, np.float32)

MAX_BLOCK_ENTRIES = 1 << 23
"""Bound on positions times largest K (at least 1) of a block, and on its prompt tokens: what decoding must be
ready to hold."""

_ZSTD_LEVEL = 3
_MIN_COMPRESSED_BYTES = 128
"""Metadata below it travels as it is: a zstd frame would hardly be smaller."""

_SHORT_ROWS = 16
"""Rows of the blocks for which a dictionary's second codes are trained."""


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
        codec: The stream's codec, or its mode alone. `top_k` is not enforced; `min_probability` is.
        vocab_size: Width of the teacher's logits, 1 to 2^20; every token id is below it.
        dictionary: What the codec has learned about the teacher; the reader needs it then.

    Raises:
        CodecError: if a trace breaks its contract (the message names prompt and field), or if the
            traces are too many for one block.
    """
    spec = codec if isinstance(codec, CodecSpec) else CodecSpec(codec)
    _check_arguments(traces, spec, vocab_size, dictionary)
    traces = [keep_likely(trace, spec.min_probability) for trace in traces]
    hidden = spec_of_traces(traces)
    if isinstance(codec, CodecSpec) and codec.hidden != hidden:
        raise CodecError(
            f"trace of prompt {traces[0].prompt_id!r} does not have the hidden states of the stream's codec",
            "capture them as the stream says, or publish to another stream",
        )
    rows = _name_rows(traces, spec, _order_of(dictionary, vocab_size), dictionary)
    usual_top_k = 0 if dictionary is None else dictionary.top_k
    metadata = write_metadata(traces, hidden, usual_top_k=usual_top_k)
    if len(metadata) > MAX_UNCOMPRESSED_BYTES:
        raise _too_large(f"{len(metadata)} bytes of metadata", MAX_UNCOMPRESSED_BYTES)
    stored, uncompressed_size = metadata, 0
    if len(metadata) >= _MIN_COMPRESSED_BYTES:
        compressed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=False).compress(metadata)
        if len(compressed) < len(metadata):
            stored, uncompressed_size = compressed, len(metadata)
    body = write_positions(rows, vocab_size=vocab_size, dictionary=dictionary)
    payload = b"".join((varint(len(stored)), stored, write_hidden(traces, hidden), body))
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise _too_large(f"a payload of {len(payload)} bytes", MAX_PAYLOAD_BYTES)
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


def train_dictionary(
    blocks: Iterable[Sequence[Trace]], *, codec: CodecSpec | CodecMode, vocab_size: int
) -> Dictionary:
    """A dictionary from a teacher's own traces, grouped as they will be in blocks.

    Args:
        blocks: Traces of the stream's first blocks, or of another stream of the same teacher; some
            thousand positions suffice.
        codec: As for `encode_block`.
        vocab_size: As for `encode_block`.

    Raises:
        CodecError: as for `encode_block`; also if there are no traces.
    """
    spec = codec if isinstance(codec, CodecSpec) else CodecSpec(codec)
    groups = [[keep_likely(trace, spec.min_probability) for trace in block] for block in blocks if block]
    everything = [trace for group in groups for trace in group]
    _check_arguments(everything, spec, vocab_size, None)
    gathered = _gather_positions(everything)
    _check_rows(everything, gathered, vocab_size)
    common = order_tokens(np.bincount(gathered.token_ids[_kept_mask(gathered)], minlength=vocab_size))
    grid: Grid | None = None
    if spec.mode not in ("exact", "sampled"):
        grid = choose_grid(spec.mode, gathered.logprobs, gathered.tail_mass)
    order = TokenOrder.common_first(common, vocab_size)
    # A draft fixes grid and level rule, by which the symbols of the final tables are counted.
    rows = _name_rows(everything, spec, order, None, grid=grid)
    merge = FEW_CODES if rows.fixed_width else MANY_CODES
    draft = build_tables(rows.counts, merge=merge, level_rule=rows.level_rule, with_escapes=True)
    counts, short_counts = SymbolCounts.zeros(), SymbolCounts.zeros()
    halves = (groups[::2], groups[1::2])
    for counted, others in (halves, halves[::-1]):
        # Lists made of the rows that are counted would seem better than they are for others.
        lists = _token_lists([trace for group in others or counted for trace in group])
        known = Dictionary(vocab_size, common, *lists, draft, grid)
        for group in counted:
            counts.add(_name_rows(group, spec, known.order, known).counts)
            for trace in group:
                _count_pieces(trace, spec, known, short_counts)
    rule = draft.level_rule
    tables = build_tables(counts, merge=merge, level_rule=rule, with_escapes=True)
    short_tables = build_tables(short_counts, merge=MANY_CODES, level_rule=rule, with_escapes=True)
    top_k = Counter(map(_width, everything)).most_common(1)[0][0]
    return Dictionary(vocab_size, common, *_token_lists(everything), tables, grid, top_k, short_tables)


def _count_pieces(trace: Trace, spec: CodecSpec, known: Dictionary, counts: SymbolCounts) -> None:
    """Count the symbols of a trace's rows as blocks of a few rows each would write them."""
    rows, width = _gather_positions([trace]), _width(trace)
    for start in range(0, rows.kept.size, _SHORT_ROWS):
        piece = rows.select(slice(start, start + _SHORT_ROWS))
        before = int(rows.sampled_ids[start - 1]) if start else _token_before(trace)
        named = name_rows(
            piece,
            [width],
            [piece.kept.size],
            first_previous_tokens([piece.kept.size], [before]),
            mode=spec.mode,
            draws=spec.draws,
            order=known.order,
            dictionary=known,
        )
        counts.add(named.counts)


def _token_lists(traces: Sequence[Trace]) -> tuple[TokenLists, TokenLists]:
    """Followers of tokens, and companions of first tokens."""
    rows = _gather_positions(traces)
    kept_NK = _kept_mask(rows)
    first = first_previous_tokens([_row_count(t) for t in traces], [_token_before(t) for t in traces])
    previous_N = np.where(first == AS_SAMPLED, np.roll(rows.sampled_ids, 1), first)
    if kept_NK.shape[1] == 0:
        return TokenLists.none(), TokenLists.none()
    first_N = np.where(rows.kept > 0, rows.token_ids[:, 0], -1)
    followers = list_tokens(previous_N, rows.token_ids, kept_NK)
    return followers, list_tokens(first_N, rows.token_ids[:, 1:], kept_NK[:, 1:])


def _order_of(dictionary: Dictionary | None, vocab_size: int) -> TokenOrder:
    return TokenOrder.by_id(vocab_size) if dictionary is None else dictionary.order


def _check_arguments(
    traces: Sequence[Trace], spec: CodecSpec, vocab_size: int, dictionary: Dictionary | None
) -> None:
    if spec.mode not in CODEC_MODES:
        raise CodecError(f"codec mode {spec.mode!r} is none of {CODEC_MODES}")
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise CodecError(f"vocab_size {vocab_size} is outside 1..{MAX_VOCAB_SIZE}")
    if dictionary is not None and dictionary.vocab_size != vocab_size:
        raise CodecError(
            f"a dictionary over {dictionary.vocab_size} tokens for traces over {vocab_size}",
            "train a dictionary on traces of this teacher",
        )
    if spec.mode == "sampled" and spec.draws <= 0:
        raise CodecError("mode 'sampled' needs the number of draws", "give a CodecSpec with draws")
    if not 0 < len(traces) <= MAX_TRACES:
        raise CodecError(f"{len(traces)} traces in a block, expected 1 to {MAX_TRACES}")
    rows = sum(_row_count(trace) for trace in traces)
    width = max(_width(trace) for trace in traces)
    if width > MAX_TOP_K:
        raise CodecError(f"K is {width}, at most {MAX_TOP_K} can be kept")
    if rows * max(width, 1) > MAX_BLOCK_ENTRIES:
        raise _too_large(f"{rows} positions of {width} entries", MAX_BLOCK_ENTRIES)
    prompt_tokens = sum(trace.prompt_token_ids.size for trace in traces)
    if prompt_tokens > MAX_BLOCK_ENTRIES:
        raise _too_large(f"{prompt_tokens} prompt tokens", MAX_BLOCK_ENTRIES)


def _check_rows(traces: Sequence[Trace], rows: Positions, vocab_size: int) -> None:
    """Refuse what shapes and dtypes do not show: ids, order, and values that are no probabilities."""
    kept_NK = _kept_mask(rows)
    kept_ids = rows.token_ids if kept_NK.all() else np.where(kept_NK, rows.token_ids, 0)
    ids = {
        "prompt token ids": np.concatenate([trace.prompt_token_ids for trace in traces]),
        "sampled token ids": rows.sampled_ids,
        "kept token ids": kept_ids,
    }
    logprobs = {"sampled logprobs": rows.sampled_logprobs, "kept logprobs": rows.logprobs[:, :1]}
    checks = {
        f"{name} outside 0..{vocab_size - 1}": array.size == 0
        or (array.min() >= 0 and array.max() < vocab_size)
        for name, array in ids.items()
    }
    checks |= {
        f"{name} above 0": array.size == 0 or float(array.max()) <= ROUNDING
        for name, array in logprobs.items()
    }
    # Compared, not subtracted: −inf − −inf is NaN. NaN itself compares as false.
    checks["rows that are not sorted by logprob, descending"] = bool(
        (rows.logprobs[:, 1:] <= rows.logprobs[:, :-1]).all()
    )
    tail = rows.tail_mass
    checks["tail masses outside 0..1"] = tail.size == 0 or (
        float(tail.min()) >= -ROUNDING and float(tail.max()) <= 1 + ROUNDING
    )
    problems = [problem for problem, holds in checks.items() if not holds]
    if problems and len(traces) == 1:
        raise CodecError(f"trace of prompt {traces[0].prompt_id!r} has {problems[0]}")
    if problems:
        # Once more, one by one, to name the prompt.
        for trace in traces:
            _check_rows([trace], _gather_positions([trace]), vocab_size)


def _kept_mask(rows: Positions) -> npt.NDArray[np.bool_]:
    ranks_K: npt.NDArray[np.uint32] = np.arange(rows.token_ids.shape[1], dtype=np.uint32)
    mask_NK: npt.NDArray[np.bool_] = np.less.outer(ranks_K, rows.kept).T
    return mask_NK


def _token_before(trace: Trace) -> int:
    """Token before a trace's first row: its prompt's first one where the prompt has rows, else its last."""
    prompt = trace.prompt_token_ids
    if prompt.size == 0:
        return -1
    return int(prompt[0] if trace.prompt_top_k is not None and trace.prompt_top_k.positions else prompt[-1])


def _row_count(trace: Trace) -> int:
    prompt_rows = 0 if trace.prompt_top_k is None else trace.prompt_top_k.positions
    return prompt_rows + trace.completion_token_ids.size


def _width(trace: Trace) -> int:
    return trace.top_k.k if trace.prompt_top_k is None else max(trace.top_k.k, trace.prompt_top_k.k)


def _name_rows(
    traces: Sequence[Trace],
    spec: CodecSpec,
    order: TokenOrder,
    dictionary: Dictionary | None,
    grid: Grid | None = None,
) -> NamedRows:
    vocab_size = order.token_of_rank.size
    positions = _gather_positions(traces)
    _check_rows(traces, positions, vocab_size)
    lengths = [_row_count(trace) for trace in traces]
    try:
        return name_rows(
            positions,
            [_width(trace) for trace in traces],
            lengths,
            first_previous_tokens(lengths, [_token_before(trace) for trace in traces]),
            mode=spec.mode,
            draws=spec.draws,
            order=order,
            dictionary=dictionary,
            grid=grid,
        )
    except CodecError as error:
        raise CodecError(f"block from prompt {traces[0].prompt_id!r} on: {error.message}") from error


def _gather_positions(traces: Sequence[Trace]) -> Positions:
    """Rows of all traces, padded to the largest K."""
    parts: list[tuple[TopK, Int32Array, Float32Array]] = []
    for trace in traces:
        if trace.prompt_top_k is not None and trace.prompt_logprobs is not None:
            parts.append((trace.prompt_top_k, trace.prompt_token_ids[1:], trace.prompt_logprobs))
        parts.append((trace.top_k, trace.completion_token_ids, trace.sampled_logprobs))
    width = max(top_k.k for top_k, _, _ in parts)
    token_ids_NK = _stack([top_k.token_ids for top_k, _, _ in parts], width, np.int32(0))
    logprobs_NK = _stack([top_k.logprobs for top_k, _, _ in parts], width, np.float32(-np.inf))
    return Positions(
        kept=(logprobs_NK > -np.inf).sum(axis=1).astype(np.uint32),
        token_ids=token_ids_NK,
        logprobs=logprobs_NK,
        tail_mass=np.concatenate([top_k.tail_mass for top_k, _, _ in parts]),
        sampled_ids=np.concatenate([ids for _, ids, _ in parts]),
        sampled_logprobs=np.concatenate([logprobs for _, _, logprobs in parts]),
    )


def _stack(parts: Sequence[npt.NDArray[_Number]], width: int, padding: _Number) -> npt.NDArray[_Number]:
    """Rows of all parts, padded to one width."""
    if all(part.shape[1] == width for part in parts):
        return np.concatenate(parts)
    rows_NK = np.full((sum(map(len, parts)), width), padding, padding.dtype)
    start = 0
    for part in parts:
        rows_NK[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return rows_NK


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
    )


def _too_large(what: str, limit: int) -> CodecError:
    return CodecError(f"{what}: a block's limit is {limit}", "put fewer traces into one block")
