"""Writes the worked example of docs/format.md: a small block, taken apart by the reference reader.

    python docs/examples/format_example.py           # prints the section
    python docs/examples/format_example.py --write   # encodes the traces anew, and replaces the section

Run it with --write whenever the format changes; tests/wire/test_reference_reader.py holds the page to it.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from wire import reference_reader as reference  # noqa: E402  # found by the line above

from lynearm.v1 import trace_pb2  # noqa: E402
from lynearm.wire.codec import encode_block  # noqa: E402
from lynearm.wire.traces import SamplingParams, TokenSpan, TopK, Trace  # noqa: E402

PAGE = ROOT / "docs" / "format.md"
HEADING = "## A worked example\n"
VOCAB_SIZE = 1000


def example_traces() -> list[Trace]:
    """One trace of three rows: a tie, a recent token, a row that keeps less, a sampled token outside."""
    probabilities = np.array([[0.55, 0.2, 0.2], [0.6, 0.25, 0.1], [0.5, 0.1, 0.0]], np.float32)
    logprobs = np.full(probabilities.shape, -np.inf, np.float32)
    np.log(probabilities, out=logprobs, where=probabilities > 0)
    token_ids = np.array([[7, 5, 9], [5, 700, 7], [9, 7, 0]], np.int32)
    sampled_logprobs = np.array([logprobs[0, 0], logprobs[1, 1], -4.0], np.float32)
    return [
        Trace(
            prompt_id="p1",
            prompt_token_ids=np.array([1, 300], np.int32),
            completion_token_ids=np.array([7, 700, 12], np.int32),
            sampled_logprobs=sampled_logprobs,
            top_k=TopK(token_ids, logprobs, np.array([0.05, 0.05, 0.4], np.float32)),
            finish_reason="length",
            spans=(TokenSpan("answer", 0, 3),),
            sampling=SamplingParams(temperature=0.5, max_tokens=3, seed=7),
            tags={"set": "a"},
        )
    ]


def render(block: bytes) -> str:
    """The section that takes a block apart, without its heading.

    Args:
        block: One trace, one lane, tables of its own, metadata that are not compressed, mode standard.
    """
    hex_digits = block.hex()
    lines = [hex_digits[start : start + 64] for start in range(0, len(hex_digits), 64)]
    part = _NotedRows(block)
    rows = part.read()
    parts = [
        f"One trace in mode `standard`, without a dictionary, as a block of {len(block)} bytes. "
        "`docs/examples/format_example.py` wrote this section.",
        _fence(lines),
        "Its bytes, one part after the other:",
        _fence(_byte_lines(block)),
        "The codes that its tables hold, canonical words in the order in which their bits are read. The "
        "codes that are not listed have no symbols:",
        _fence(part.code_lines()),
        _explain_nibbles(block),
        "The number stream with the lane in it, bit by bit in reading order: a code word, then plain bits, "
        "lowest first. An entry's symbol 42 + 71 · step + c is shown as its step and its token class c.",
        _fence(part.lines()),
        part.explain_first_entry(),
        "Read back (−4 is bit for bit; the other logprobs and masses are from the grid):",
        _json(_values(block, part, rows)),
    ]
    return "\n\n".join(parts) + "\n"


class _NotedBits(reference.BitReader):
    """Bits, and how they were read: runs that belong together, with a blank between them."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.runs: list[str] = []
        self.symbols: list[int] = []

    def word(self, code: reference.Code) -> int:
        start = self.position
        symbol = super().word(code)
        self._note(start)
        self.symbols.append(symbol)
        return symbol

    def plain(self, width: int) -> int:
        start = self.position
        value = super().plain(width)
        self._note(start)
        return value

    def taken(self) -> tuple[list[str], list[int]]:
        """Runs and symbols since the last call."""
        runs, symbols = self.runs, self.symbols
        self.runs, self.symbols = [], []
        return runs, symbols

    def rest(self) -> str:
        """Bits that are left over."""
        bits = range(self.position, 8 * len(self.data))
        return "".join(str(self.data[bit >> 3] >> (bit & 7) & 1) for bit in bits)

    def _note(self, start: int) -> None:
        run = (str(self.data[bit >> 3] >> (bit & 7) & 1) for bit in range(start, self.position))
        self.runs += ["".join(run)] if self.position > start else []


class _NotedRows(reference.RowsPart):
    """The rows part, read by the reference reader, with a line for everything that it reads."""

    _NAMES = {  # noqa: RUF012
        **{8 + digits: f"KEPT, level of {digits} digits" for digits in range(8)},
        **{16 + digits: f"SAMPLED, level of {digits} digits" for digits in range(8)},
        24: "OUTSIDE",
        25: "LEVEL",
        26: "FIRST",
        27: "LOGIT",
    }

    def __init__(self, block: bytes) -> None:
        header, payload = reference.read_outer(block)
        reader = reference.ByteReader(payload)
        (message,) = reference.read_metadata(header, reader.take(reader.varint())).traces
        widths = [message.top_k] * (message.prompt_rows + message.completion_length)
        super().__init__(reader, header.codec_mode, None, widths, reference.tokens_before([message]))
        self.numbers = self._bits = _NotedBits(self.numbers.data)
        self.lanes = [self._bits]
        self._lines: list[str] = []
        self._first_entry = ""
        self._row_begins = 0
        self._rows_read = 0

    def column(self, count: int, code: int, contexts: list[int] | None = None) -> list[int]:
        numbers = []
        for context in contexts or [0] * count:
            numbers += super().column(1, code + context)
            self._note(self._NAMES[code + context], numbers[-1])
        return numbers

    def plain(self, count: int, width: int) -> list[int]:
        numbers = []
        for _ in range(count):
            numbers += super().plain(1, width)
            self._note("loose logprob", f"{numbers[-1]:08x} = {reference.float_of(numbers[-1])}")
        return numbers

    def read_tail(self, levels: list[int], logprobs: list[float]) -> float:
        code, expected = self.tail_code(levels)
        mass = super().read_tail(levels, logprobs)
        level = min(range(self.scale.largest_level), key=lambda q: abs(self._mass(q) - mass))
        said = f"expected {expected} + {level - expected} = level {level}, mass {mass:.7f}"
        self._note(f"TAIL, code {code}", said)
        return mass

    def read_entries(self, bits: reference.BitReader, count: int, level: int) -> reference.Entries:
        self._row_begins = bits.position
        return super().read_entries(bits, count, level)

    def name_tokens(self, entries: reference.Entries, recent: list[int], followers: list[int]) -> None:
        super().name_tokens(entries, recent, followers)
        runs, symbols = self._bits.taken()
        if not self._first_entry:
            self._first_entry = _explain_entry(entries, self._row_begins, runs, symbols[0])
        self._note_entries(entries, iter(runs), iter(symbols))
        self._rows_read += 1

    def code_lines(self) -> list[str]:
        """Every code word of every code."""
        names = {code: f"long step, context {code}" for code in range(8)} | self._NAMES
        names |= {28 + step: f"TAIL, step {step}" for step in range(8)}
        names |= {35 + octave: f"TAIL, rest of octave {octave}" for octave in range(1, 9)}
        codes = [(f"entry code {index}", code) for index, code in enumerate(self.tables.entry_codes)]
        codes += [
            (f"number code {index} ({names[index]})", c) for index, c in enumerate(self.tables.number_codes)
        ]
        lines = []
        for name, code in codes:
            words = ", ".join(
                f"{symbol} {word:0{length}b}" for (length, word), symbol in sorted(code.items())
            )
            lines += [f"{name}: {words}"] if words else []
        return lines

    def lines(self) -> list[str]:
        """Every number and every entry."""
        rest = self._bits.rest()
        return [*self._lines, f"{rest:40} left over"] if rest else self._lines

    def explain_first_entry(self) -> str:
        """The first entry, bit by bit."""
        return self._first_entry

    def _note_entries(self, entries: reference.Entries, runs: Iterator[str], symbols: Iterator[int]) -> None:
        """A line for each entry of a row: its symbol, level, token code and token."""
        for i in range(len(entries.levels)):
            symbol, bits = next(symbols), [next(runs)]
            bits += [next(runs) for _ in range(_open_runs(symbol))]
            meaning = f"gap class {symbol}"
            if symbol >= 42:
                step, token_class = divmod(symbol - 42, 71)
                meaning = f"step {step}, token class {token_class}"
                if step == 3:
                    number = next(symbols)
                    bits += [next(runs) for _ in range(1 + (number >= 8))]
                    meaning += f", long step {entries.levels[i] - entries.levels[i - 1] - 3}"
            name = f"row {self._rows_read} rank {i}: symbol {symbol}, {meaning}"
            said = f"level {entries.levels[i]}, token code {entries.token_codes[i]}"
            self._lines.append(f"{' '.join(bits):40} {name}; {said}, token {entries.token_ids[i]}")

    def _mass(self, level: int) -> float:
        return 2.718281828459045 ** self.scale.logprob(0, level)

    def _note(self, name: str, said: object) -> None:
        runs, symbols = self._bits.taken()
        shown = f", symbol {symbols[0]}" if symbols else ""
        self._lines.append(f"{' '.join(runs):40} {name}{shown}: {said}")


def _explain_entry(entries: reference.Entries, start: int, runs: list[str], symbol: int) -> str:
    """The first entry in words.

    Args:
        entries: Of its row.
        start: Its first bit in the stream.
        runs: Its bits.
        symbol: Its symbol.
    """
    token_class, token_code = symbol - 42, entries.token_codes[0]
    assert 28 <= token_class < 50, "the words below are about a distance in the list of recent tokens"
    token_bits = runs[1] if _open_runs(symbol) else "none"
    gap_class = token_class - 28
    exponent = 0 if gap_class < 4 else gap_class // 2
    open_bits = max(exponent - 1, 0)
    begins = 256 + (gap_class if gap_class < 4 else (2 + (gap_class & 1)) << (exponent - 1))
    return (
        f"The first entry in words: it begins at bit {start} of the stream, which is bit {start & 7} of byte "
        f"{start >> 3}. `{runs[0]}` is the word of symbol {symbol} = 42 + 71 · 0 + {token_class}: token "
        f"class {token_class}, which begins at token code {begins} and leaves {_bits(open_bits)} open. "
        f"`{token_bits}`, lowest bit first, makes that {token_code}: distance {token_code - 256} in the list "
        f"of recent tokens, which begins as the vocabulary's order, without a dictionary by id, so that this "
        f"is token {entries.token_ids[0]}. Its level is LEVEL's, {entries.levels[0]}. This token code is "
        f"one from 256 to 319: the list of recent tokens stays as it is."
    )


def _explain_nibbles(block: bytes) -> str:
    """The first lengths of the entry codes, in words."""
    line = next(line for line in _byte_lines(block) if "lengths of the entry codes" in line)
    digits = "".join(byte[::-1] for byte in line[:48].split())
    said: list[str] = []
    symbol = at = 0
    while len(said) < 3:
        nibble = int(digits[at], 16)
        if nibble:
            said.append(f"`{digits[at]}` is the length of symbol {symbol}")
            symbol, at = symbol + 1, at + 1
            continue
        run = int(digits[at + 1], 16) + 1
        said.append(f"`{digits[at : at + 2]}` gives symbols {symbol} to {symbol + run - 1} no word")
        symbol, at = symbol + run, at + 2
    spaced = " ".join(digits[: at + 1])
    return f"The lengths begin, low nibbles first, with {spaced} …: " + ", ".join(said) + ", and so on."


def _bits(count: int) -> str:
    return f"{count} bit" if count == 1 else f"{count} bits"


def _open_runs(symbol: int) -> int:
    """1 if open bits follow an entry's code word, else 0."""
    if symbol < 42:
        return int(symbol >= 4)
    token_class = (symbol - 42) % 71
    begins = next(begin for begin in (50, 28, 14, 0) if token_class >= begin)
    return int(token_class - begins >= (2 if begins == 50 else 4))


def _fence(lines: list[str]) -> str:
    return "\n".join(["```", *(line.rstrip() for line in lines), "```"])


def _json(values: dict[str, object]) -> str:
    """One line for each key."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    return f"```json\n{{\n{lines}\n}}\n```"


def _byte_lines(block: bytes) -> list[str]:
    """Parts of a block as hex, and what they are; the hex of all lines is the block."""
    reader = reference.ByteReader(block)
    lines: list[tuple[bytes, str]] = []

    def note(size: int, what: str) -> None:
        lines.append((reader.take(size), what))

    def varint(what: str) -> int:
        start = reader.position
        value = reader.varint()
        lines.append((block[start : reader.position], what.format(value)))
        return value

    note(1, "field 1, header")
    size = varint("{} bytes")
    _note_message(reader, lines, "BlockHeader", size)
    note(1, "field 2, payload")
    varint("{} bytes")
    size = varint("{} bytes of metadata, as they are")
    _note_message(reader, lines, "BlockMetadata", size)
    flags = reader.data[reader.position]
    names = [
        "own tables",
        "kept varies",
        "sampled apart",
        "four lanes",
        "order of the dictionary",
        "its scale",
        "its codes for short blocks",
    ]
    note(1, "flags: " + ", ".join(f"{1 << i} {n}" for i, n in enumerate(names) if flags >> i & 1))
    varint("V = {}")
    note(1, "scale 0, Grid")
    varint("c = {} · 10⁻⁶")
    varint("D = {} · 10⁻⁵")
    varint("{} bytes of tables")
    merge, step_shift, origin, shift, base, slope = struct.unpack_from("<BBIBhh", block, reader.position)
    note(1, f"merge {merge}")
    note(1, f"level rule: step shift {step_shift}")
    note(4, f"origin {origin}")
    note(1, f"shift {shift}")
    note(2, f"base {base}")
    note(2, f"slope {slope}")
    note(_nibble_bytes(reader, (1, 8, 32)[merge], 327), "lengths of the entry codes, in nibbles")
    note(_nibble_bytes(reader, 44, 125), "lengths of the number codes, in nibbles")
    note(len(block) - reader.position, "number stream, with the only lane in it")
    return [line for data, what in lines for line in _wrap(data, what)]


def _nibble_bytes(reader: reference.ByteReader, codes: int, symbols: int) -> int:
    ahead = reference.ByteReader(reader.data)
    ahead.position = reader.position
    reference.Tables.read_codes(ahead, codes, symbols)
    return ahead.position - reader.position


def _note_message(
    reader: reference.ByteReader, lines: list[tuple[bytes, str]], name: str, size: int, indent: str = "  "
) -> None:
    """Lines of a message's fields, and of the messages in them."""
    descriptor = trace_pb2.DESCRIPTOR.message_types_by_name[name]
    end = reader.position + size
    while reader.position < end:
        start = reader.position
        number, wire_type = divmod(reader.varint(), 8)
        field = descriptor.fields_by_number[number]
        label = f"{indent}{number} {field.name}"
        if wire_type == 0:
            value = reader.varint()
            lines.append((reader.data[start : reader.position], f"{label}: {value}"))
        elif wire_type == 1:
            (value,) = struct.unpack("<d", reader.take(8))
            lines.append((reader.data[start : reader.position], f"{label}: {value}"))
        elif wire_type == 5:
            shown = f"{int.from_bytes(reader.take(4), 'little'):08x}"
            lines.append((reader.data[start : reader.position], f"{label}: {shown}"))
        else:
            inner = reader.varint()
            if field.message_type is not None:
                lines.append((reader.data[start : reader.position], f"{label}: {inner} bytes"))
                _note_message(reader, lines, field.message_type.name, inner, indent + "  ")
                continue
            raw = reader.take(inner)
            shown = repr(raw.decode()) if field.type == field.TYPE_STRING else _packed(raw)
            lines.append((reader.data[start : reader.position], f"{label}: {shown}"))


def _packed(raw: bytes) -> str:
    reader = reference.ByteReader(raw)
    values = []
    while reader.position < len(raw):
        values.append(str(reader.varint()))
    return ", ".join(values)


def _wrap(data: bytes, what: str) -> list[str]:
    """Sixteen bytes a line."""
    pieces = [data[start : start + 16].hex(" ") for start in range(0, len(data), 16)]
    return [f"{piece:48} {what if not index else ''}" for index, piece in enumerate(pieces)]


def _values(block: bytes, part: _NotedRows, rows: list[reference.Row]) -> dict[str, object]:
    """What a reader must find, for the page and for the test."""
    (trace,) = reference.read_block(block)
    return {
        "vocab_size": part.vocabulary,
        "prompt_id": trace.metadata.prompt_id,
        "prompt_token_ids": trace.prompt_token_ids,
        "completion_token_ids": trace.completion_token_ids,
        "sampled_logprobs": [round(row.sampled_logprob, 7) for row in rows],
        "token_ids": [row.token_ids for row in rows],
        "logprobs": [[round(logprob, 7) for logprob in row.logprobs] for row in rows],
        "tail_mass": [round(row.tail_mass, 7) for row in rows],
        "temperature": trace.metadata.sampling.temperature,
        "max_tokens": trace.metadata.sampling.max_tokens,
        "seed": trace.metadata.sampling.seed,
        "tags": {tag.key: tag.value for tag in trace.metadata.tags},
    }


if __name__ == "__main__":
    section = render(encode_block(example_traces(), codec="standard", vocab_size=VOCAB_SIZE))
    if "--write" in sys.argv:
        before = PAGE.read_text().split(HEADING)[0]
        PAGE.write_text(f"{before}{HEADING}\n{section}")
    else:
        sys.stdout.write(section)
