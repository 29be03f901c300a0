"""A second reader of block format version 2, written from docs/format.md and from nothing else.

It shows that the page is enough, and is checked against lynearm's own reader, of which it imports nothing. It
is slow on purpose: one bit at a time, plain Python numbers, the words and the order of the page.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import xxhash
import zstandard
from google.protobuf.message import DecodeError

from lynearm.v1 import trace_pb2

EXACT, STANDARD, FINE, COMPACT, SAMPLED = 1, 2, 3, 4, 5
GRID, BITS, BF16_LOGITS, FP16_LOGITS, COUNTS = range(5)
KEPT_CODE, SAMPLED_CODE, OUTSIDE_CODE, LEVEL_CODE, FIRST_CODE, LOGIT_CODE = 8, 16, 24, 25, 26, 27
TAIL_CODE, REST_CODE = 28, 36

MAX_ENTRIES = 1 << 23
MAX_VOCABULARY = 1 << 20
MAX_DICTIONARY_CONTENT = 21_200_940
LARGEST_SCALE = float.fromhex("0x1.249248p+119")


class CorruptError(ValueError):
    """The bytes are no block, or contradict themselves."""


class NewerError(ValueError):
    """The block uses something that this reader does not know."""


@dataclass
class Row:
    """One position: entries in the order of the block, without padding."""

    token_ids: list[int]
    logprobs: list[float]
    tail_mass: float
    sampled_id: int
    sampled_logprob: float
    tail_draws: list[int] | None = None
    """Empty where nothing was drawn; none where the block has no draws."""


@dataclass
class Trace:
    """One trace; `metadata` says everything else, with `sampling` filled in."""

    metadata: trace_pb2.TraceMetadata
    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    prompt_rows: list[Row]
    completion_rows: list[Row]
    hidden_states: list[list[list[float]]] | None
    """Of each layer, of each completion position."""


def read_block(data: bytes, find_dictionary: Callable[[bytes], bytes] | None = None) -> list[Trace]:
    """The traces of a block; `find_dictionary` returns a dictionary's bytes by its digest."""
    header, payload = read_outer(data)
    reader = ByteReader(payload)
    stored = reader.take(reader.varint())
    dictionary = None
    if header.dictionary_digest:
        check(find_dictionary is not None, "the block needs a dictionary, and there is no way to find it")
        assert find_dictionary is not None
        found = find_dictionary(header.dictionary_digest)
        digest = hashlib.sha256(found).digest()[:4]
        check(digest == header.dictionary_digest, "the dictionary has another digest")
        dictionary = Dictionary(found)
    metadata = read_metadata(header, stored, dictionary.top_k if dictionary else 0)
    messages = list(metadata.traces)
    hidden_states = None
    if metadata.HasField("hidden_states"):
        section = reader.take(reader.varint())
        hidden_states = read_hidden_states(metadata.hidden_states, section, header.completion_token_count)
    counts = [(trace.prompt_rows + trace.completion_length, trace.top_k) for trace in messages]
    widths = [width for count, width in counts for _ in range(count)]
    part = RowsPart(reader, header.codec_mode, dictionary, widths, tokens_before(messages))
    rows = part.read()
    return list(join_traces(messages, rows, part.vocabulary, hidden_states))


def tokens_before(messages: list[trace_pb2.TraceMetadata]) -> dict[int, int | None]:
    """The token before the first row of each trace, by that row; none where there are no prompt tokens."""
    before: dict[int, int | None] = {}
    row = 0
    for message in messages:
        if message.prompt_rows + message.completion_length:
            before[row] = message.prompt_token_ids[-1] if message.prompt_token_ids else None
        row += message.prompt_rows + message.completion_length
    return before


def check(holds: bool, problem: str) -> None:
    """Refuse what does not hold."""
    if not holds:
        raise CorruptError(problem)


class ByteReader:
    """Bytes and varints from the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        check(size <= len(self.data) - self.position, f"{size} bytes wanted at {self.position}")
        self.position += size
        return self.data[self.position - size : self.position]

    def varint(self) -> int:
        value = 0
        for group in range(10):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << (7 * group)
            if byte < 0x80:
                break
        check(byte < 0x80 and value < 1 << 64, "a varint of more than 64 bits")
        return value

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.position)


# The block ------------------------------------------------------------------------------------------------


def fields_of(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a protobuf message's fields, not looking into them."""
    reader = ByteReader(message)
    while reader.position < len(message):
        number, wire_type = divmod(reader.varint(), 8)
        check(wire_type in (0, 1, 2, 5) and number > 0, "not a protobuf message")
        if wire_type == 0:
            yield number, reader.varint()
        elif wire_type == 2:
            yield number, reader.take(reader.varint())
        else:
            yield number, int.from_bytes(reader.take(8 if wire_type == 1 else 4), "little")


def read_outer(data: bytes) -> tuple[trace_pb2.BlockHeader, bytes]:
    """Header and payload, checked against bounds and checksum."""
    parts: dict[int, bytes] = {}
    for number, value in fields_of(data):
        if number in (1, 2):
            check(isinstance(value, bytes) and number not in parts, "header or payload is there twice")
            assert isinstance(value, bytes)
            parts[number] = value
    check(len(parts) == 2, "header or payload is missing")
    try:
        header = trace_pb2.BlockHeader.FromString(parts[1])
    except DecodeError as error:
        raise CorruptError("the header does not parse") from error
    check(header.format_version > 0, "no format version")
    if header.format_version > 2:
        raise NewerError(f"format version {header.format_version}; this reader knows version 2")
    if header.format_version < 2:
        raise CorruptError("version 1 is specified by another page")
    header.codec_mode = header.codec_mode or STANDARD
    header.trace_count = header.trace_count or 1
    if header.codec_mode not in (EXACT, STANDARD, FINE, COMPACT, SAMPLED):
        raise NewerError(f"codec mode {header.codec_mode}; this reader knows 1 to 5")
    check(1 <= header.trace_count <= 65_536, "number of traces")
    check(1 <= len(parts[2]) <= 3 << 20, "size of the payload")
    check(header.uncompressed_size_bytes <= 64 << 20, "size of the metadata")
    check(len(header.dictionary_digest) in (0, 4), "size of the digest")
    check(xxhash.xxh3_64_intdigest(parts[2], seed=0) % 2**32 == header.payload_xxh3_low, "checksum")
    return header, parts[2]


def decompress(frame: bytes) -> bytes:
    """One zstd frame whose declared size the caller has checked."""
    try:
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptError("a zstd frame does not decompress") from error


def declared_size(frame: bytes) -> int:
    """Content size that a zstd frame's header declares; without one, 2^64 − 1."""
    try:
        parameters = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise CorruptError("not a zstd frame") from error
    check(parameters.dict_id == 0, "a zstd dictionary")
    return int(parameters.content_size)


def read_metadata(
    header: trace_pb2.BlockHeader, stored: bytes, dictionary_k: int = 0
) -> trace_pb2.BlockMetadata:
    """The metadata of a block, with sizes checked, and with what header and dictionary say filled in."""
    if header.uncompressed_size_bytes:
        check(declared_size(stored) == header.uncompressed_size_bytes, "size of the metadata")
        stored = decompress(stored)
    parts = [value for number, value in fields_of(stored) if number == 1 and isinstance(value, bytes)]
    check(len(parts) == header.trace_count, "number of traces in the metadata")
    fields = sum(1 for part in parts for _ in fields_of(part))
    check(fields <= (1 << 21) + 64 * len(parts), "fields of the metadata")
    described = sum(
        len(value) for number, value in fields_of(stored) if number == 10 and isinstance(value, bytes)
    )
    check(described <= 4096, "description of the hidden states")
    try:
        metadata = trace_pb2.BlockMetadata.FromString(stored)
    except DecodeError as error:
        raise CorruptError("the metadata do not parse") from error
    traces = list(metadata.traces)
    check(sum(len(trace.spans) for trace in traces) <= 1 << 20, "spans")
    check(sum(len(trace.tags) for trace in traces) <= 1 << 20, "tags")
    left_over = header.completion_token_count - sum(trace.completion_length for trace in traces)
    check(left_over >= 0, "completion tokens")
    if traces[-1].completion_length == 0:
        traces[-1].completion_length = left_over
    for trace in traces:
        check(trace.top_k <= 1025, "K")
        trace.top_k = (trace.top_k or dictionary_k) % 1025
        trace.finish_reason = trace.finish_reason or trace_pb2.FINISH_REASON_STOP
        check(trace.prompt_rows == 0 or len(trace.prompt_token_ids) == 1, "a scored prompt's first token")
    rows = sum(trace.prompt_rows + trace.completion_length for trace in traces)
    check(rows * max(1, *(trace.top_k for trace in traces)) <= MAX_ENTRIES, "entries of the block")
    prompt_tokens = sum(trace.prompt_rows + len(trace.prompt_token_ids) for trace in traces)
    check(prompt_tokens == header.prompt_token_count <= MAX_ENTRIES, "prompt tokens")
    completion_tokens = sum(trace.completion_length for trace in traces)
    check(completion_tokens == header.completion_token_count, "completion tokens")
    return metadata


def read_hidden_states(
    spec: trace_pb2.HiddenStatesSpec, section: bytes, positions: int
) -> list[list[list[float]]]:
    """Of each layer, the state of each completion position of the block."""
    count = len(spec.layers) + spec.final_norm
    if spec.dtype not in (1, 2):
        raise NewerError(f"hidden states of type {spec.dtype}; this reader knows 1 and 2")
    check(1 <= count <= 256 and 1 <= spec.hidden_size <= 65_536, "layers or hidden size")
    check(list(spec.layers) == sorted(set(spec.layers)), "layers that do not ascend")
    check(all(layer < 65_536 for layer in spec.layers), "a layer")
    row_bytes = 2 * spec.hidden_size if spec.dtype == 1 else spec.hidden_size + 4
    check(count * row_bytes * positions <= 16 << 20, "bytes of hidden states")
    reader = ByteReader(section)

    def plane(size: int) -> bytes:
        stored = reader.take(reader.varint())
        if len(stored) != size:
            check(declared_size(stored) == size, "size of a plane")
            stored = decompress(stored)
        return stored

    states: list[list[list[float]]] = []
    for _ in range(count):
        if spec.dtype == 1:
            upper, lower = plane(positions * spec.hidden_size), plane(positions * spec.hidden_size)
            numbers = [float_of(high << 24 | low << 16) for high, low in zip(upper, lower, strict=True)]
        else:
            scales = struct.unpack(f"<{positions}f", plane(4 * positions))
            check(all(0 < scale <= LARGEST_SCALE for scale in scales), "a scale")
            codes = plane(positions * spec.hidden_size)
            rows = [scale for scale in scales for _ in range(spec.hidden_size)]
            numbers = [float32(scale * e4m3(code)) for scale, code in zip(rows, codes, strict=True)]
        check(spec.dtype == 2 or all(map(math.isfinite, numbers)), "a state that is no number")
        starts = range(0, len(numbers), spec.hidden_size)
        states.append([numbers[start : start + spec.hidden_size] for start in starts])
    check(reader.rest() == b"", "bytes behind the hidden states")
    return states


def e4m3(code: int) -> float:
    """The number of an FP8 code."""
    check(code & 0x7F != 0x7F, "a state that is no number")
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def join_traces(
    messages: list[trace_pb2.TraceMetadata],
    rows: list[Row],
    vocabulary: int,
    hidden_states: list[list[list[float]]] | None,
) -> Iterator[Trace]:
    """Metadata, rows and hidden states of every trace."""
    sampling = trace_pb2.SamplingParams(temperature=1, top_p=1)
    start = 0
    completed = 0
    for message in messages:
        if message.HasField("sampling"):
            sampling = message.sampling
        else:
            message.sampling.CopyFrom(sampling)
        middle = start + message.prompt_rows
        end = middle + message.completion_length
        prompt = [*message.prompt_token_ids, *(row.sampled_id for row in rows[start:middle])]
        check(all(token < vocabulary for token in prompt), "prompt tokens")
        check(message.finish_reason in (1, 2, 3), "finish reason")
        check(message.stop_number <= len(sampling.stop), "stop number")
        check(message.stop_number == 0 or message.finish_reason == 1, "stop number")
        last = 0
        for span in message.spans:
            check(span.kind in (1, 2, 3) and span.length > 0 and span.start >= last, "span")
            last = span.start + span.length
        check(last <= message.completion_length, "span")
        check(len({tag.key for tag in message.tags}) == len(message.tags), "a tag comes twice")
        completion = [row.sampled_id for row in rows[middle:end]]
        states = None
        if hidden_states is not None:
            states = [layer[completed : completed + message.completion_length] for layer in hidden_states]
        yield Trace(message, prompt, completion, rows[start:middle], rows[middle:end], states)
        start = end
        completed += message.completion_length


# Code tables ----------------------------------------------------------------------------------------------


class BitReader:
    """The bits of one stream."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def bit(self) -> int:
        check(self.position < 8 * len(self.data), "a stream ends too early")
        value = self.data[self.position >> 3] >> (self.position & 7) & 1
        self.position += 1
        return value

    def plain(self, width: int) -> int:
        return sum(self.bit() << place for place in range(width))

    def word(self, code: Code) -> int:
        """The symbol whose code word comes next."""
        word = 0
        for length in range(1, 11):
            word = 2 * word + self.bit()
            if (length, word) in code:
                return code[length, word]
        raise CorruptError("no code word")

    def expect_end(self) -> None:
        check((self.position + 7) // 8 == len(self.data), "a stream ends too late")


Code = dict[tuple[int, int], int]
"""Symbol of each (length, code word)."""


def canonical(lengths: list[int]) -> Code:
    """The code of some lengths."""
    check(sum(2 ** (10 - length) for length in lengths if length) <= 2**10, "lengths of no prefix code")
    code: Code = {}
    word = 0
    for length in range(1, 11):
        for symbol, its_length in enumerate(lengths):
            if its_length == length:
                code[length, word] = symbol
                word += 1
        word *= 2
    return code


class Tables:
    """Merge, level rule, and the codes of entries and numbers."""

    def __init__(self, data: bytes) -> None:
        reader = ByteReader(data)
        head = struct.unpack("<BBIBhh", reader.take(11))
        self.merge, self.step_shift, self.origin, self.shift, self.base, self.slope = head
        check(self.merge <= 3 and self.step_shift <= 31 and self.shift <= 31, "merge or shift")
        self.entry_codes = self.read_codes(reader, (1, 8, 32, 128)[self.merge], 327)
        self.number_codes = self.read_codes(reader, 44, 125)
        self.draw_codes: list[Code] | None = None
        if reader.position < len(data):
            self.draw_codes = self.read_codes(reader, 2, 125)
        check(reader.rest() == b"", "bytes behind the tables")

    @staticmethod
    def read_codes(reader: ByteReader, count: int, symbols: int) -> list[Code]:
        def nibbles() -> Iterator[int]:
            while True:
                byte = reader.take(1)[0]
                yield byte & 15
                yield byte >> 4

        nibble = nibbles()
        codes: list[Code] = []
        for _ in range(count):
            lengths: list[int] = []
            while len(lengths) < symbols:
                value = next(nibble)
                check(value <= 10 or value == 12, "a nibble of no meaning")
                if value == 12:
                    lengths += [0] * (symbols - len(lengths))
                else:
                    lengths += [0] * (next(nibble) + 1) if value == 0 else [value]
            check(len(lengths) == symbols, "a run of zeros beyond the code")
            codes.append(canonical(lengths))
        return codes

    def tail_step(self, last_level: int) -> int:
        return min(max(last_level - self.origin, 0) >> self.shift, 7)


class Dictionary:
    """Vocabulary's order, lists and tables."""

    def __init__(self, data: bytes) -> None:
        if data[:3] == b"LYD" and data[3:4] > b"2":
            raise NewerError("a dictionary of a newer format")
        check(data[:4] == b"LYD2" and len(data) <= 3 << 20, "not a dictionary")
        check(declared_size(data[4:]) <= MAX_DICTIONARY_CONTENT, "size of the dictionary")
        reader = ByteReader(decompress(data[4:]))
        head = struct.unpack("<11I", reader.take(44))
        self.vocabulary, c, d, self.top_k, common, *of_lists, table_bytes, short_bytes = head
        check(c == 0 or is_grid(c, d), "c or D")
        check(self.top_k <= 1024, "K")
        self.grid = (c, d)
        check(1 <= self.vocabulary <= MAX_VOCABULARY and common <= self.vocabulary, "V or common tokens")
        tokens = list(accumulate(shuffled(reader, common)))
        check(all(0 <= token < self.vocabulary for token in tokens), "a common token outside V")
        check(len(set(tokens)) == common, "a common token comes twice")
        self.order = tokens + sorted(set(range(self.vocabulary)) - set(tokens))
        self.followers = self.read_lists(reader, *of_lists[:2])
        self.companions = self.read_lists(reader, *of_lists[2:])
        self.tables = Tables(reader.take(table_bytes))
        self.short_tables = Tables(reader.take(short_bytes)) if short_bytes else None
        check(reader.rest() == b"", "bytes behind the dictionary's tables")

    def read_lists(self, reader: ByteReader, lists: int, listed: int) -> dict[int | None, list[int]]:
        """The list of each token that has one."""
        check(lists <= 16_384, "lists")
        owners = list(accumulate(shuffled(reader, lists)))
        counts = list(reader.take(lists))
        tokens = iter(shuffled(reader, listed))
        check(all(1 <= count <= 128 for count in counts) and sum(counts) == listed, "tokens of the lists")
        check(all(left < right for left, right in pairwise(owners)), "owners that do not ascend")
        found: dict[int | None, list[int]] = {
            owner: [next(tokens) for _ in range(count)] for owner, count in zip(owners, counts, strict=True)
        }
        named = [*owners, *(token for tokens in found.values() for token in tokens)]
        check(all(0 <= token < self.vocabulary for token in named), "a list's token outside V")
        return found


def shuffled(reader: ByteReader, count: int) -> list[int]:
    """Byte-shuffled int32 numbers."""
    planes = reader.take(4 * count)
    return [struct.unpack("<i", planes[index::count])[0] for index in range(count)]


# Alphabets ------------------------------------------------------------------------------------------------


def read_number(bits: BitReader, code: Code) -> int:
    """A number."""
    symbol = bits.word(code)
    if symbol == 124:
        return bits.plain(32)
    if symbol < 8:
        return symbol
    width = (symbol >> 2) - 1
    return ((4 + (symbol & 3)) << width) + bits.plain(width)


def read_gap(bits: BitReader, gap_class: int) -> int:
    """A gap, or a token code in its third."""
    if gap_class < 4:
        return gap_class
    width = (gap_class >> 1) - 1
    return ((2 + (gap_class & 1)) << width) + bits.plain(width)


def read_token_code(bits: BitReader, token_class: int) -> int:
    """A token code of a token class."""
    if token_class < 14:
        return read_gap(bits, token_class)
    if token_class < 28:
        return 128 + read_gap(bits, token_class - 14)
    if token_class < 50:
        return 256 + read_gap(bits, token_class - 28)
    if token_class < 52:
        return 2176 + token_class - 50
    width = token_class - 51
    return 2176 + (1 << width) + bits.plain(width)


def unzigzag(number: int) -> int:
    """The integer behind a number."""
    return -(number >> 1) - 1 if number & 1 else number >> 1


# Rows -----------------------------------------------------------------------------------------------------


@dataclass
class Entries:
    """A row's levels and token codes, then its tokens."""

    levels: list[int]
    token_codes: list[int]
    token_ids: list[int]


class RowsPart:
    """The part of a payload that holds the rows."""

    def __init__(
        self,
        reader: ByteReader,
        mode: int,
        dictionary: Dictionary | None,
        widths: list[int],
        before: dict[int, int | None],
    ) -> None:
        self.widths = widths
        self.before = before
        self.followers: dict[int | None, list[int]] = {}
        self.companions: dict[int | None, list[int]] = {}
        self.known_companions: set[int | None] = set()
        self.grown: set[tuple[str, int]] = set()
        self.flags = reader.take(1)[0]
        self.draws = reader.take(1)[0] if self.flags & 128 else 0
        if self.draws > 16:
            raise NewerError(f"{self.draws} draws from each tail; this reader knows 16")
        check(self.flags < 128 or (self.draws > 0 and mode != SAMPLED), "draws from the tails")
        if self.flags & 48 or not self.flags & 1:
            check(dictionary is not None, "a dictionary is needed, and the header names none")
        if self.flags & 32:
            assert dictionary is not None
            self.vocabulary = dictionary.vocabulary
            self.scale = grid_of(dictionary, mode)
        else:
            self.vocabulary = reader.varint()
            check(1 <= self.vocabulary <= MAX_VOCABULARY, "V")
            self.scale = read_scale(reader, mode)
        check(self.flags & 65 != 65, "two kinds of tables")
        self.order: list[int] | range = range(self.vocabulary)
        if self.flags & 16 or not self.flags & 1:
            assert dictionary is not None
            check(dictionary.vocabulary == self.vocabulary, "the dictionary is of another V")
            if self.flags & 16:
                self.order = dictionary.order
                self.followers = {**dictionary.followers}
                self.companions = {**dictionary.companions}
                self.known_companions = set(dictionary.companions)
            tables = dictionary.short_tables if self.flags & 64 else dictionary.tables
            check(tables is not None, "the dictionary has no tables for short blocks")
            assert tables is not None
            self.tables = tables
        if self.flags & 1:
            self.tables = Tables(reader.take(reader.varint()))
        sizes = [reader.varint() for _ in range(4 if self.flags & 8 else 0)]
        streams = [reader.take(size) for size in sizes] + [reader.rest()]
        self.numbers, *lanes = map(BitReader, streams)
        # A single lane lies in the number stream.
        self.lanes = lanes or [self.numbers]
        check(len(widths) <= 8 * len(streams[0]), "more rows than bits")
        self.lane_bits = 8 * sum(len(lane.data) for lane in self.lanes)

    def column(self, count: int, code: int, contexts: list[int] | None = None) -> list[int]:
        codes = [code] * count if contexts is None else [code + context for context in contexts]
        return [read_number(self.numbers, self.tables.number_codes[code]) for code in codes]

    def plain(self, count: int, width: int) -> list[int]:
        return [self.numbers.plain(width) for _ in range(count)]

    def read(self) -> list[Row]:
        count = len(self.widths)
        self.first_levels = self.column(count, LEVEL_CODE)
        digits = [min(level.bit_length(), 7) for level in self.first_levels]
        kept = self.column(count, KEPT_CODE, digits) if self.flags & 2 else self.widths
        check(all(k <= width for k, width in zip(kept, self.widths, strict=True)), "KEPT above K")
        check(sum(kept) <= self.lane_bits, "more entries than bits")
        sampled = self.column(count, SAMPLED_CODE, digits)
        check(all(j <= k for j, k in zip(sampled, kept, strict=True)), "SAMPLED above KEPT")
        outside = self.column(sampled.count(0), OUTSIDE_CODE)
        check(all(rank < self.vocabulary for rank in outside), "OUTSIDE beyond V")
        from_logits = self.scale.kind in (BF16_LOGITS, FP16_LOGITS)
        first = self.column(count if from_logits else 0, FIRST_CODE)
        logit = self.column(count if from_logits else 0, LOGIT_CODE)
        apart = bool(self.flags & 4)
        loose = [float_of(bits) for bits in self.plain(count if apart else len(outside), 32)]
        mantissas = self.plain(len(first), 23)
        if from_logits:
            self.scale.tops = [self.scale.top_place(number) for number in logit]
            self.scale.firsts = [
                float_of((383 - unzigzag(upper)) % 512 << 23 | lower)
                for upper, lower in zip(first, mantissas, strict=True)
            ]
        rows: list[Row] = []
        loose_logprobs = iter(loose)
        sampled_ids = [self.order[rank] for rank in outside]
        # All of them before the first tail, which stands behind them where there is one lane.
        named = list(self.read_lanes(kept, sampled, sampled_ids))
        for row, (entries, sampled_id) in enumerate(named):
            logprobs = [self.scale.logprob(row, level) for level in entries.levels]
            j = sampled[row]
            sampled_logprob = next(loose_logprobs) if apart or not j else logprobs[j - 1]
            check(
                all(logprob <= 0.01 for logprob in [*logprobs, sampled_logprob]), "a logprob NaN or above 0"
            )
            tail_mass = self.read_tail(entries.levels, logprobs)
            check(-0.01 <= tail_mass <= 1.01, "a tail mass NaN or outside 0 to 1")
            rows.append(Row(entries.token_ids, logprobs, tail_mass, sampled_id, sampled_logprob))
        if self.draws:
            self.read_tail_draws(rows)
        self.numbers.expect_end()
        return rows

    def read_tail_draws(self, rows: list[Row]) -> None:
        """The tokens that were drawn from each row's tail."""
        check(len(rows) * self.draws <= MAX_ENTRIES, "draws of the block")

        def column(count: int, code: int) -> list[int]:
            check(count <= 8 * len(self.numbers.data) - self.numbers.position, "more draws than bits")
            if self.tables.draw_codes is None:
                return self.plain(count, self.vocabulary.bit_length())
            return [read_number(self.numbers, self.tables.draw_codes[code]) for _ in range(count)]

        first = column(len(rows), 0)
        gaps = iter(column((len(rows) - first.count(0)) * (self.draws - 1), 1))
        for row, number in zip(rows, first, strict=True):
            steps = [number - 1, *(next(gaps) for _ in range(self.draws - 1))] if number else []
            ranks = list(accumulate(steps))
            check(all(rank < self.vocabulary for rank in ranks), "a draw beyond V")
            row.tail_draws = [self.order[rank] for rank in ranks]
            check(not set(row.tail_draws) & set(row.token_ids), "a draw that the row keeps")

    def read_lanes(
        self, kept: list[int], sampled: list[int], outside_ids: list[int]
    ) -> Iterator[tuple[Entries, int]]:
        """Every row, with its tokens from the lists, and its sampled token."""
        outside = iter(outside_ids)
        sampled_id = 0
        recent = list(self.order[min(self.vocabulary, 1920) - 1 :: -1])
        for row, count in enumerate(kept):
            entries = self.read_entries(self.lanes[row % len(self.lanes)], count, self.first_levels[row])
            token_before = self.before.get(row, sampled_id)
            self.name_tokens(entries, recent, self.followers.get(token_before, []))
            if count and self.flags & 2:
                self.grow_lists(token_before, entries.token_ids)
            elif count:
                if token_before is not None and token_before < self.vocabulary:
                    self.followers[token_before] = entries.token_ids[:128]
                first = entries.token_ids[0]
                if first not in self.known_companions:
                    self.companions[first] = entries.token_ids[1:129]
            for i in range(count - 1, -1, -1):
                if not 256 <= entries.token_codes[i] < 320:
                    recent.append(entries.token_ids[i])
            sampled_id = entries.token_ids[sampled[row] - 1] if sampled[row] else next(outside)
            yield entries, sampled_id
        if self.flags & 8:
            for lane in self.lanes:
                lane.expect_end()

    def grow_lists(self, token_before: int | None, token_ids: list[int]) -> None:
        """Put a row's tokens before the followers, and behind the companions."""
        if token_before is not None and token_before < self.vocabulary and self.may_grow("f", token_before):
            both = token_ids + self.followers.get(token_before, [])
            self.followers[token_before] = list(dict.fromkeys(both))[:64]
        first = token_ids[0]
        companions = self.companions.get(first, [])
        if len(companions) < 64 and self.may_grow("c", first):
            self.companions[first] = list(dict.fromkeys(companions + token_ids[1:]))[:64]

    def may_grow(self, kind: str, owner: int) -> bool:
        """Whether a list was changed before, or is one of the first 16,384."""
        if (kind, owner) not in self.grown and len(self.grown) == 16_384:
            return False
        self.grown.add((kind, owner))
        return True

    def name_tokens(self, entries: Entries, recent: list[int], followers: list[int]) -> None:
        """The tokens of a row's token codes."""
        before = len(recent)
        companions: list[int] = []
        for i, token_code in enumerate(entries.token_codes):
            if token_code < 128:
                check(token_code < len(followers), "a place behind the followers' end")
                token = followers[token_code]
            elif token_code < 256:
                check(i > 0 and token_code - 128 < len(companions), "a place behind the companions' end")
                token = companions[token_code - 128]
            elif token_code < 2176:
                check(token_code - 256 < before, "a distance behind the list's begin")
                token = recent[before - 1 - (token_code - 256)]
            else:
                check(token_code - 2176 < self.vocabulary, "a rank beyond V")
                token = self.order[token_code - 2176]
            entries.token_ids.append(token)
            if i == 0:
                companions = self.companions.get(token, [])

    def read_entries(self, bits: BitReader, count: int, level: int) -> Entries:
        """Levels and token codes of a row whose first entry has this level."""
        entries = Entries([], [], [])
        token_code = octave = 0
        used = [0, 0]
        for i in range(count):
            bucket = min(i.bit_length(), 7)
            if i:
                octave = sum(token_code >= bound for bound in (128, 256, 640))
                if octave < 2:
                    used[octave] = 1
            state = octave + 4 * used[0] + 8 * used[1]
            codes = self.tables.entry_codes
            symbol = bits.word(
                codes[(0, bucket, 4 * bucket + octave, 16 * bucket + state)[self.tables.merge]]
            )
            if symbol == 326:
                symbol = bits.plain(9)
                check(symbol < 326, "an escape to a symbol that is not there")
            if symbol < 42:
                check(i > 0, "a gap in a first entry")
                token_code += 1 + read_gap(bits, symbol)
            else:
                step, token_class = divmod(symbol - 42, 71)
                check((step == 0) == (i == 0), "a step of 0 behind the first entry, or none before it")
                token_code = read_token_code(bits, token_class)
                if step == 3:
                    context = min(level >> self.tables.step_shift, 7)
                    step += read_number(bits, self.tables.number_codes[context])
                level += step
            check(level <= self.scale.largest_level, "a level above the largest")
            entries.levels.append(level)
            entries.token_codes.append(token_code)
        return entries

    def tail_code(self, levels: list[int]) -> tuple[int, int]:
        """The number code of a row's tail, and on a grid the level that it is expected at."""
        step = self.tables.tail_step(levels[-1] if levels else 0)
        if self.scale.kind == GRID:
            rest = max(2**40 - sum(map(self.scale.mass, levels)), 0) / 2**40
            octave = min(math.frexp(rest / self.scale.c)[1] + 2, 8)
            if rest > 0 and octave > 0:
                return REST_CODE - 1 + octave, round((1 - math.sqrt(rest)) * (2 / self.scale.c))
        return TAIL_CODE + step, self.tables.base + self.tables.slope * step

    def read_tail(self, levels: list[int], logprobs: list[float]) -> float:
        """A row's tail mass."""
        code, expected = self.tail_code(levels)
        number = read_number(self.numbers, self.tables.number_codes[code])
        if self.scale.kind == GRID:
            if number == 0:
                return 0.0
            level = expected + unzigzag(number - 1)
            check(0 <= level <= self.scale.largest_level, "a tail mass outside its grid")
            return float32(math.exp(self.scale.logprob(0, level)))
        prediction = 0.0
        if self.scale.kind != COUNTS:
            rest = 1.0
            for logprob in logprobs:
                rest = rest - exponential(logprob)
            prediction = float32(max(rest, 0.0))
        return float_of((bits_of(prediction) + unzigzag(number)) % 2**32)


def exponential(x: float) -> float:
    """e^x in a fixed order of operations."""
    if x < -700:
        return 0.0
    n = round(x * 1.4426950408889634)
    r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    s = 0.0
    for k in range(13, -1, -1):
        s = s * r + 1.0 / math.factorial(k)
    return s * 2.0**n


# Scales ---------------------------------------------------------------------------------------------------


def float_of(bits: int) -> float:
    """The float32 with these bits."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def bits_of(number: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


def float32(number: float) -> float:
    """Rounded to float32. Sums of two float32 may be rounded to float64 before: nothing is rounded twice."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


@dataclass
class Scale:
    """How levels become logprobs."""

    kind: int
    largest_level: int = 2**32 - 1
    c: float = 0.0
    d: float = 0.0
    draws: int = 0
    tops: list[int | None] | None = None
    firsts: list[float] | None = None

    @property
    def shift(self) -> int:
        return 23 - (7 if self.kind == BF16_LOGITS else 10)

    def top_place(self, number: int) -> int | None:
        """Place of a row's top logit; none for a plain row."""
        if number == 0:
            return None
        if number < 4096:
            return bits_of(number / 2) >> self.shift
        place = number - 4096 - 2**20
        check(abs(place) < 2 ** (31 - self.shift), "a top logit that is no number")
        return place

    def logit_at(self, place: int) -> float:
        return float_of((place < 0) << 31 | (abs(place) << self.shift) % 2**31)

    def mass(self, level: int) -> int:
        """Probability of a level, in units of 2^-40."""
        knee_level = 2 / self.c - 2 / self.d
        if level < knee_level:
            root = 1 - level * (self.c / 2)
            return math.floor(root * root * 2**40)
        knee_root = self.c / self.d
        return math.floor(knee_root * knee_root * exponential((knee_level - level) * self.d) * 2**40)

    def logprob(self, row: int, level: int) -> float:
        if self.kind == GRID:
            knee_level = 2 / self.c - 2 / self.d
            if level < knee_level:
                return float32(2 * math.log1p(-level * self.c / 2))
            return float32(2 * math.log(self.c / self.d) - (level - knee_level) * self.d)
        top = self.tops[row] if self.tops is not None else None
        if self.kind == BITS or (self.kind in (BF16_LOGITS, FP16_LOGITS) and top is None):
            return float_of(level if level >= 2**31 else 2**31 - 1 - level)
        if self.kind == COUNTS:
            return float32(math.log((self.draws - level) / self.draws))
        assert top is not None
        assert self.firsts is not None
        gap = float32(self.logit_at(top - level) - self.logit_at(top))
        return float32(gap + self.firsts[row])


def is_grid(c: int, d: int) -> bool:
    """Whether c and D, as integers, are within their bounds."""
    return 150 <= c <= 500_000 and 400 <= d <= 500_000 and c <= 10 * d


def grid_of(dictionary: Dictionary, mode: int) -> Scale:
    """The grid that a dictionary names."""
    c, d = dictionary.grid
    check(c > 0 and mode not in (EXACT, SAMPLED), "a dictionary's scale that does not suit the mode")
    return Scale(GRID, 65_535, c * 1e-6, d * 1e-5)


def read_scale(reader: ByteReader, mode: int) -> Scale:
    """The scale that a block names."""
    kind = reader.take(1)[0]
    if kind > COUNTS:
        raise NewerError(f"scale {kind}; this reader knows 0 to 4")
    suits = {EXACT: (BITS, BF16_LOGITS, FP16_LOGITS), SAMPLED: (COUNTS,)}.get(mode, (GRID,))
    check(kind in suits, "a scale that does not suit the mode")
    if kind == GRID:
        c, d = reader.varint(), reader.varint()
        check(is_grid(c, d), "c or D")
        return Scale(kind, 65_535, c * 1e-6, d * 1e-5)
    if kind == COUNTS:
        draws = reader.varint()
        check(1 <= draws <= 65_536, "draws")
        return Scale(kind, draws - 1, draws=draws)
    return Scale(kind)
