"""What the codec's benchmarks measure: bits, distances between rows, and CPU time.

Bits are those of whole blocks, with headers, checksums and metadata. Distances are between the rows that
were given and those that `decode_rows` returned. Shape legend: N = positions, K = entries kept.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from codec_corpus import Float32Array, FloatArray, IntArray, count_tokens, group_traces

from lynearm.wire.adaptive import keep_likely
from lynearm.wire.blocks import split_block
from lynearm.wire.codec import decode_rows, encode_block
from lynearm.wire.dictionaries import Dictionary, DictionaryReader
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.fields import ByteReader
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import Trace

Blocks = Sequence[Sequence[Trace]]

_Result = TypeVar("_Result")

_SPEED_BLOCK_BYTES = 1_000_000
"""Blocks of the speed figures hold the power of two of positions that fits: half a megabyte to one."""


@dataclass(frozen=True, slots=True)
class Coder:
    """How blocks are encoded, and decoded again."""

    spec: CodecSpec
    vocab_size: int
    dictionary: Dictionary | None = None

    @staticmethod
    def train(blocks: Blocks, spec: CodecSpec, vocab_size: int) -> Coder:
        return Coder(spec, vocab_size, train_dictionary(blocks, codec=spec, vocab_size=vocab_size))

    def without_dictionary(self) -> Coder:
        return Coder(self.spec, self.vocab_size)

    @property
    def dictionary_bytes(self) -> int:
        return len(self.dictionary.encoded) if self.dictionary else 0

    def encode(self, blocks: Blocks) -> list[bytes]:
        return [
            encode_block(block, codec=self.spec, vocab_size=self.vocab_size, dictionary=self.dictionary)
            for block in blocks
        ]

    def reader(self) -> DictionaryReader:
        """Reads the dictionary as a trainer does: from its bytes."""
        encoded = self.dictionary.encoded if self.dictionary else b""
        return DictionaryReader(lambda _digest: encoded)

    def bits_per_token(self, blocks: Blocks) -> float:
        return sum(map(len, self.encode(blocks))) * 8 / sum(map(count_tokens, blocks))


@dataclass(frozen=True, slots=True)
class Rows:
    """Distributions: the kept entries, −inf where padded, and the mass outside them."""

    token_ids_NK: IntArray
    logprobs_NK: Float32Array
    tail_mass_N: Float32Array

    @staticmethod
    def of(traces: Sequence[Trace]) -> Rows:
        """Rows of traces of one K."""
        return Rows(
            np.concatenate([trace.top_k.token_ids for trace in traces]),
            np.concatenate([trace.top_k.logprobs for trace in traces]),
            np.concatenate([trace.top_k.tail_mass for trace in traces]),
        )

    def by_token(self) -> Rows:
        """Entries of each row ascending by token id, padding last."""
        padding_NK = np.isneginf(self.logprobs_NK)
        order_NK = np.argsort(np.where(padding_NK, 1 << 30, self.token_ids_NK), axis=1, kind="stable")
        return Rows(
            np.take_along_axis(np.where(padding_NK, -1, self.token_ids_NK), order_NK, 1).astype(np.int32),
            np.take_along_axis(self.logprobs_NK, order_NK, 1),
            self.tail_mass_N,
        )

    def distribution(self) -> FloatArray:
        """Probabilities of the entries and of the tail as one bucket, shape [N, K + 1]."""
        kept_NK = np.exp(self.logprobs_NK.astype(np.float64))
        joined: FloatArray = np.c_[kept_NK, np.maximum(self.tail_mass_N.astype(np.float64), 1e-12)]
        total_N1: FloatArray = joined.sum(axis=1, keepdims=True)
        return joined / total_N1

    @property
    def mean_kept(self) -> float:
        """Entries of a row."""
        return float((self.logprobs_NK > -np.inf).sum(axis=1).mean())

    @property
    def mean_mass(self) -> float:
        """Mass of a row's entries."""
        return float(np.exp(self.logprobs_NK.astype(np.float64)).sum(axis=1).mean())


@dataclass(frozen=True, slots=True)
class Distances:
    """Of what came back from what was given: KL divergence in nats, and total variation."""

    kl_mean: float
    kl_p999: float
    variation: float

    @staticmethod
    def between(given: Rows, returned: Rows) -> Distances:
        """Of rows whose entries stand in the same order."""
        p, q = given.distribution(), returned.distribution()
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
        kl_N = terms.sum(axis=1)
        return Distances(
            float(kl_N.mean()),
            float(np.quantile(kl_N, 0.999)),
            float(np.abs(p - q).sum(axis=1).mean() / 2),
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a CPU second, one core, and the size of the blocks."""

    encode_per_second: float
    decode_per_second: float
    block_bytes: int


def decode_checked(encoded: Sequence[bytes], blocks: Blocks, coder: Coder) -> tuple[Rows, Rows]:
    """The rows that were given, after adaptive k, and those that came back; entries by token id.

    Raises:
        ValueError: if a token id, a sampled token or, in exact mode, any float32 differs.
    """
    reader = coder.reader()
    given_parts: list[Rows] = []
    returned_parts: list[Rows] = []
    for data, block in zip(encoded, blocks, strict=True):
        traces = [keep_likely(trace, coder.spec.min_probability) for trace in block]
        positions = decode_rows(data, dictionaries=reader).positions
        given = Rows.of(traces).by_token()
        returned = Rows(positions.token_ids, positions.logprobs, positions.tail_mass).by_token()
        sampled_ids = np.concatenate([trace.completion_token_ids for trace in traces])
        sampled_logprobs = np.concatenate([trace.sampled_logprobs for trace in traces])
        pairs: list[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]] = [
            (given.token_ids_NK, returned.token_ids_NK),
            (sampled_ids, positions.sampled_ids),
            (_draws(*(trace.top_k.tail_draws for trace in traces)), _draws(positions.tail_draws)),
        ]
        if coder.spec.mode == "exact":
            pairs += [
                (_bits(given.logprobs_NK), _bits(returned.logprobs_NK)),
                (_bits(given.tail_mass_N), _bits(returned.tail_mass_N)),
                (_bits(sampled_logprobs), _bits(positions.sampled_logprobs)),
            ]
        if not all(np.array_equal(before, after) for before, after in pairs):
            raise ValueError(f"a block in mode {coder.spec.mode!r} came back changed")
        given_parts.append(given)
        returned_parts.append(returned)
    return _join(given_parts), _join(returned_parts)


def rows_bytes(block: bytes) -> int:
    """Bytes of a block that hold its rows; the others are framing, header and metadata."""
    _, payload = split_block(block)
    reader = ByteReader(payload)
    reader.take(reader.varint())
    return len(reader.rest())


def measure_speed(traces: Sequence[Trace], coder: Coder, bits_per_token: float, runs: int) -> Speed:
    """Encoding from arrays and decoding to arrays, over the traces, again and again until blocks are full."""
    positions = 1 << int(np.log2(_SPEED_BLOCK_BYTES * 8 / bits_per_token))
    wanted = -(-count_tokens(traces) // positions) * positions
    supply = itertools.cycle(traces)
    filled: list[Trace] = []
    while wanted > 0:
        filled.append(next(supply))
        wanted -= filled[-1].completion_token_ids.size
    blocks = group_traces(filled, positions)
    tokens = sum(map(count_tokens, blocks))
    encoded, encode_seconds = best_seconds(lambda: coder.encode(blocks), runs)
    reader = coder.reader()
    _, decode_seconds = best_seconds(
        lambda: [decode_rows(data, dictionaries=reader) for data in encoded], runs
    )
    return Speed(tokens / encode_seconds, tokens / decode_seconds, sum(map(len, encoded)) // len(encoded))


def best_seconds(work: Callable[[], _Result], runs: int) -> tuple[_Result, float]:
    """What the work returns, and the CPU seconds of its fastest run after one that warms up.

    The CPU time is the process's, so that a helper thread's would count.
    """
    result = work()
    times: list[float] = []
    for _ in range(runs):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return result, min(times)


def _draws(*parts: IntArray | None) -> IntArray:
    """Draws from the tails of rows, ascending by token id; none where there are none."""
    drawn = [np.sort(part, axis=1) for part in parts if part is not None]
    return np.concatenate(drawn) if drawn else np.zeros(0, np.int32)


def _bits(values: Float32Array) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def _join(parts: Sequence[Rows]) -> Rows:
    return Rows(
        np.concatenate([part.token_ids_NK for part in parts]),
        np.concatenate([part.logprobs_NK for part in parts]),
        np.concatenate([part.tail_mass_N for part in parts]),
    )
