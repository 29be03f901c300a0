"""Throws spoiled blocks and dictionaries at the codec; only a LynearmError may come out, soon and cheaply.

    export PYTHONPATH=tests
    python benchmarks/fuzz_codec.py --inputs 5000000 --seed 1          # the fast loop
    python benchmarks/fuzz_codec.py --atheris --inputs 200000          # guided by the coverage of the Python
    NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=runs/checked \
        python benchmarks/fuzz_codec.py --guard --inputs 200000        # with every access checked

Inputs are blocks of every mode, with and without a dictionary, and of version 1, spoiled by `wire.mutation`,
which puts sizes and checksums right. Each has `--seconds` of CPU, and the process `--mebibytes` of address
space beyond what it had when it began, so that a larger allocation fails. An input that breaks a rule is
kept in `--failing`, from where tests/wire/test_hostile_bytes.py replays it; the one in hand is always in a
file of `--scratch`, for what kills the process.

Compiled code is not instrumented by atheris, and reads by address are not checked by numba. `--guard` has
the kernels read copies that end where a page begins that nobody may read; what wanders off is killed.
Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import mmap
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from wire.building import build_rows, build_sampled_trace, build_trace, draw_tails
from wire.mutation import Pieces, put_together, rejoin, spoil_block, spoil_bytes, take_apart, write_rows_part

from lynearm.wire import code_tables, number_stream, row_layout, row_reading
from lynearm.wire.blocks import split_block
from lynearm.wire.codec import decode_block, decode_rows, encode_block
from lynearm.wire.dictionaries import Dictionary, DictionaryReader
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.errors import LynearmError
from lynearm.wire.specs import CODEC_MODES, CodecMode, CodecSpec
from lynearm.wire.traces import Int32Array, TokenSpan, TopK, Trace

VOCAB_SIZE = 300
_REPORT_EVERY = 250_000
_GOLDEN = Path(__file__).parents[1] / "tests" / "wire" / "golden"
_FAILING = Path(__file__).parents[1] / "tests" / "wire" / "failing"


class Corpus:
    """Blocks and dictionaries that hold, small enough to be tried in great number."""

    def __init__(self) -> None:
        self.pieces: list[Pieces] = []
        self.dictionaries: dict[bytes, bytes] = {}
        self.version_1 = [path.read_bytes() for path in sorted(_GOLDEN.glob("version1-*.block"))]
        for mode in CODEC_MODES:
            for dtype in ("float32", "bfloat16", "float16") if mode == "exact" else ("float32",):
                self._add(mode, few_rows(mode, dtype))
        for mode, draws in (("exact", 1), ("standard", 3)):
            self._add(mode, [drawn_rows(group, draws) for group in few_rows(mode, "float32")])
        self.contents = list(map(dictionary_content, self.dictionaries.values()))
        self.reader = DictionaryReader(self._find)

    def _add(self, mode: CodecMode, groups: list[list[Trace]]) -> None:
        tail_draws = groups[0][0].top_k.tail_draw_count
        codec = CodecSpec(mode, draws=6 if mode == "sampled" else 0, tail_draws=tail_draws)
        dictionary = train_dictionary(groups, codec=codec, vocab_size=VOCAB_SIZE)
        self.dictionaries[dictionary.digest] = dictionary.encoded
        for group in groups:
            # Blocks with tables of their own take twice the time.
            for used in (None, dictionary, dictionary):
                block = encode_block(group, codec=codec, vocab_size=VOCAB_SIZE, dictionary=used)
                self.pieces.append(take_apart(block))

    def _find(self, digest: bytes) -> bytes:
        if digest not in self.dictionaries:
            raise LynearmError("no dictionary of that digest")
        return self.dictionaries[digest]

    def next_input(self, rng: Random) -> tuple[str, bytes]:
        """What to decode, "block" or "dictionary", and the bytes."""
        kind = rng.random()
        if kind < 0.94:
            return "block", spoil_block(rng.choice(self.pieces), self.pieces, rng)
        if kind < 0.97 and self.version_1:
            return "block", spoil_version_1(rng.choice(self.version_1), rng)
        content = spoil_bytes(rng.choice(self.contents), rng)
        return "dictionary", b"LYD2" + _compress(content)


def few_rows(mode: CodecMode, dtype: str) -> list[list[Trace]]:
    """Groups of traces: some rows of uneven width, rows of a prompt, and rows enough for four lanes."""
    said: dict[str, Any] = {
        "spans": (TokenSpan("answer", 1, 3),),
        "tags": {"a": "b"},
        "completion_text": "text",
    }
    if mode == "sampled":
        traces = [build_sampled_trace(seed, positions=5, draws=6, vocab_size=VOCAB_SIZE) for seed in range(2)]
        return [traces, [build_sampled_trace(3, positions=66, draws=3, vocab_size=VOCAB_SIZE)]]
    build = functools.partial(build_trace, vocab_size=VOCAB_SIZE, dtype=dtype)
    # One row in nine is not on the grid of the others' logits.
    mixed, plain = (
        build_trace(6, positions=9, k=3, vocab_size=VOCAB_SIZE, dtype=one) for one in (dtype, "float32")
    )
    mixed.top_k.logprobs[4] = plain.top_k.logprobs[4]
    # Gaps of eleven bits, for which no bf16 numbers are close enough to each other.
    gaps = -np.array([[0, 257, 769, 770, 771, 837]] * 2, np.float32) / np.float32(64)
    fine = build_rows(gaps - np.log(np.exp(gaps).sum(axis=1, keepdims=True)), [range(6), range(9, 3, -1)])
    return [
        [mixed],
        [fine],
        [build(0, positions=4, k=5, **said), build(1, positions=3, k=2)],
        [build(2, positions=2, k=3, prompt=4, prompt_rows=True)],
        [build(3, positions=70, k=2)],
        [build(4, positions=66, k=1)],
        [build(5, positions=1, k=40)],
    ]


def drawn_rows(traces: list[Trace], draws: int) -> list[Trace]:
    """The traces with tokens drawn from their tails."""
    return [draw_tails(trace, draws, VOCAB_SIZE) for trace in traces]


def dictionary_content(encoded: bytes) -> bytes:
    """What a dictionary's frame holds."""
    return _decompress(encoded[4:])


def spoil_version_1(block: bytes, rng: Random) -> bytes:
    """A block of version 1 whose content is spoiled."""
    header, payload = split_block(block)
    content = spoil_bytes(_decompress(payload), rng)
    packed = _compress(content)
    return rejoin(dataclasses.replace(header, uncompressed_size_bytes=len(content)), packed)


class Judge:
    """Decodes inputs and keeps those that break a rule."""

    def __init__(self, corpus: Corpus, *, seconds: float, failing: Path, scratch: Path) -> None:
        self._reader = corpus.reader
        self._pieces = [pieces for pieces in corpus.pieces if pieces.header.dictionary_digest]
        self._seconds = seconds
        self._failing = failing
        scratch.mkdir(parents=True, exist_ok=True)
        path = scratch / f"fuzz-{os.getpid()}.input"
        path.write_bytes(bytes(1 << 16))
        with path.open("r+b") as file:
            self._in_hand = mmap.mmap(file.fileno(), 1 << 16)
        self.decoded = 0
        self.failed = 0
        self.slowest = 0.0

    def try_input(self, kind: str, data: bytes) -> None:
        """Decode one input."""
        record = kind[:1].encode() + len(data).to_bytes(4, "little") + data[: (1 << 16) - 5]
        self._in_hand[: len(record)] = record
        began = time.process_time()
        try:
            if kind == "dictionary":
                self._use(Dictionary.decode(data))
            else:
                self._decode(data)
            self.decoded += 1
        except LynearmError:
            pass
        except Exception as error:
            self._keep(kind, data, f"{type(error).__name__}: {error}")
        took = time.process_time() - began
        self.slowest = max(self.slowest, took)
        if took > self._seconds:
            self._keep(kind, data, f"{took:.2f} s")

    def _use(self, dictionary: Dictionary) -> None:
        """Decode a block that was written with another dictionary than this."""
        pieces = self._pieces[self.decoded % len(self._pieces)]
        header = dataclasses.replace(pieces.header, dictionary_digest=dictionary.digest)
        data = put_together(dataclasses.replace(pieces, header=header, vocab_size=dictionary.vocab_size))
        decode_block(data, dictionaries=DictionaryReader(lambda _: dictionary.encoded))

    def _decode(self, data: bytes) -> None:
        traces = decode_block(data, dictionaries=self._reader)
        if data[-1] & 7:
            return
        # Once more the other way: what differs was read from where nothing had been written.
        if split_block(data)[0].format_version == 1:
            return
        rows = decode_rows(data, dictionaries=self._reader)
        parts: list[tuple[TopK, Any]] = []
        for trace in traces:
            if trace.prompt_top_k is not None:
                parts.append((trace.prompt_top_k, trace.prompt_token_ids[1:]))
            parts.append((trace.top_k, trace.completion_token_ids))
        start = 0
        for top_k, ids in parts:
            here = slice(start, start + top_k.positions)
            same = (
                np.array_equal(rows.positions.token_ids[here, : top_k.k], top_k.token_ids)
                and np.array_equal(rows.positions.logprobs[here, : top_k.k], top_k.logprobs)
                and np.array_equal(rows.positions.tail_mass[here], top_k.tail_mass)
                and np.array_equal(rows.positions.sampled_ids[here], ids)
                and same_draws(rows.positions.tail_draws, here, top_k.tail_draws)
            )
            if not same:
                raise AssertionError("decode_block and decode_rows differ")
            if top_k.token_ids.size and not 0 <= top_k.token_ids.min() <= top_k.token_ids.max() < 1 << 20:
                raise AssertionError("an id beyond every vocabulary")
            start = here.stop

    def _keep(self, kind: str, data: bytes, why: str) -> None:
        self.failed += 1
        self._failing.mkdir(parents=True, exist_ok=True)
        name = f"{hashlib.sha256(data).hexdigest()[:16]}.{kind}"
        if self.failed <= 20:
            (self._failing / name).write_bytes(data)
            print(f"{name}: {why}", flush=True)


def same_draws(draws_ND: Int32Array | None, rows: slice, draws_TD: Int32Array | None) -> bool:
    """Whether some rows have the same draws from their tails, which are tokens or −1."""
    if draws_ND is None or draws_TD is None:
        return draws_ND is draws_TD
    return np.array_equal(draws_ND[rows], draws_TD) and not ((draws_TD < -1) | (draws_TD >= 1 << 20)).any()


def guard_kernels() -> None:
    """Have the kernels read copies of everything, each before a page that nobody may read."""
    guards: dict[int, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {}

    def guarded(kernel: Callable[..., Any], *inputs: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            copies = list(arguments)
            for place in inputs:
                copies[place] = guards.setdefault(place, _Guard().put)(arguments[place])
            return kernel(*copies)

        return call

    numbers: Any = number_stream
    rows: Any = row_reading
    numbers.read_numbers = guarded(numbers.read_numbers, 0, 4)
    numbers.read_numbers_by_level = guarded(numbers.read_numbers_by_level, 0, 4, 5)
    numbers.read_fixed = guarded(numbers.read_fixed, 0)
    # Stream, tables, levels, kept, last levels, and the values and masses of levels.
    numbers.read_grid_values = guarded(numbers.read_grid_values, 0, 3, 5, 6, 7, 9, 10)
    # Draws, kept entries, and how many these are.
    rows.find_kept_draw = guarded(rows.find_kept_draw, 0, 1, 2)
    # Stream, ends, kept, first levels, tables, states, plain elements, long steps, buckets, order, lists, and
    # what the rows' codes and their tokens' addresses are put into.
    rows.read_rows = guarded(rows.read_rows, 0, 2, 3, 4, 5, 7, 9, 10, 12, 13, 14, 15, 16, 24, 25)


class _Guard:
    """Memory whose last byte lies before a page that nobody may read."""

    _BYTES = 20 << 20

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, self._BYTES + mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(begin + self._BYTES), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._memory = np.frombuffer(self._map, np.uint8, self._BYTES)

    def put(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        # Where nothing is, a view would not know its type.
        copy = self._memory[self._BYTES - array.nbytes :].view(array.dtype) if array.nbytes else array.copy()
        copy = copy.reshape(array.shape)
        copy[:] = array
        return copy


def limit_memory(mebibytes: int) -> None:
    """Refuse allocations that take the process so much beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_loop(corpus: Corpus, judge: Judge, inputs: int, seed: int) -> None:
    """Inputs made from a seed."""
    rng = Random(seed)
    began = time.monotonic()
    for count in range(1, inputs + 1):
        judge.try_input(*corpus.next_input(rng))
        if count % _REPORT_EVERY == 0 or count == inputs:
            _report(judge, count, time.monotonic() - began)


def run_atheris(corpus: Corpus, judge: Judge, inputs: int, seed: int, scratch: Path) -> None:
    """Inputs that libFuzzer makes: a block's rows, or bytes out of which the mutator's choices are drawn."""
    import atheris

    seeds = scratch / f"fuzz-{os.getpid()}.seeds"
    seeds.mkdir()
    for index, pieces in enumerate(corpus.pieces):
        (seeds / str(index)).write_bytes(bytes((index, 0)) + write_rows_part(pieces))

    began = time.monotonic()
    count = 0

    def one_input(data: bytes) -> None:
        nonlocal count
        count += 1
        pieces = corpus.pieces[data[0] % len(corpus.pieces)] if data else corpus.pieces[0]
        if len(data) > 1 and data[1] < 128:
            # The bytes are the block's rows, or their beginning.
            judge.try_input("block", put_together(pieces, data[2:]))
        else:
            judge.try_input(*corpus.next_input(Random(data)))
        if count % (_REPORT_EVERY // 10) == 0:
            _report(judge, count, time.monotonic() - began)
        if judge.failed:
            raise AssertionError("an input broke a rule; it was kept")

    for module in (row_reading, number_stream, row_layout, code_tables):
        for name, function in list(vars(module).items()):
            if getattr(function, "__module__", "") == module.__name__ and hasattr(function, "__code__"):
                setattr(module, name, atheris.instrument_func(function))
    options = [
        f"-runs={inputs}",
        f"-seed={seed}",
        "-max_len=600",
        "-timeout=10",
        "-rss_limit_mb=1024",
        f"-artifact_prefix={scratch}/",
        str(seeds),
    ]
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


def warm_up(corpus: Corpus) -> None:
    """Compile everything before limits are set."""
    for pieces in corpus.pieces:
        decode_block(put_together(pieces), dictionaries=corpus.reader)
        decode_rows(put_together(pieces), dictionaries=corpus.reader)
    for block in corpus.version_1:
        decode_block(block)
    for encoded in corpus.dictionaries.values():
        Dictionary.decode(encoded)


def _report(judge: Judge, count: int, seconds: float) -> None:
    print(
        f"{count} inputs, {count / seconds:.0f} a second; {judge.decoded} decoded, {judge.failed} failed, "
        f"slowest {judge.slowest * 1e3:.0f} ms of CPU",
        flush=True,
    )


def _compress(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=1).compress(content)


def _decompress(data: bytes | memoryview) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompress(data)


def main() -> None:
    """Parse the command line and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU of one input")
    parser.add_argument("--mebibytes", type=int, default=512, help="memory beyond what the process has")
    parser.add_argument("--atheris", action="store_true", help="let libFuzzer choose the inputs")
    parser.add_argument("--guard", action="store_true", help="kernels read before a forbidden page")
    parser.add_argument("--failing", type=Path, default=_FAILING)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    corpus = Corpus()
    if arguments.guard:
        guard_kernels()
    warm_up(corpus)
    judge = Judge(corpus, seconds=arguments.seconds, failing=arguments.failing, scratch=arguments.scratch)
    if arguments.atheris:
        run_atheris(corpus, judge, arguments.inputs, arguments.seed, arguments.scratch)
        return
    limit_memory(arguments.mebibytes)
    run_loop(corpus, judge, arguments.inputs, arguments.seed)
    sys.exit(1 if judge.failed else 0)


if __name__ == "__main__":
    main()
