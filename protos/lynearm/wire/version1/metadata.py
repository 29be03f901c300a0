"""Columns with one element, or one list, per trace: everything that is not a distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.traces import FinishReason, Int32Array, SamplingParams, SpanKind, TokenSpan
from lynearm.wire.version1.columns import Column, ColumnReader

MAX_PROMPT_ID_BYTES = 256

MAX_BLOCK_ITEMS = 1 << 20
"""Bound on the spans of a block, and on its tags: each becomes an object in memory."""

FINISH_REASON_CODES: dict[FinishReason, int] = {"stop": 1, "length": 2, "abort": 3}
SPAN_KIND_CODES: dict[SpanKind, int] = {"reasoning": 1, "answer": 2, "truncated_reasoning": 3}

_Name = TypeVar("_Name")
_FINISH_REASONS: dict[int, FinishReason] = {code: reason for reason, code in FINISH_REASON_CODES.items()}
_SPAN_KINDS: dict[int, SpanKind] = {code: kind for kind, code in SPAN_KIND_CODES.items()}


@dataclass(frozen=True, slots=True)
class TraceMetadata:
    """What a trace says besides its positions."""

    prompt_id: str
    prompt_token_ids: Int32Array
    finish_reason: FinishReason
    sample_index: int
    spans: tuple[TokenSpan, ...]
    sampling: SamplingParams
    tags: dict[str, str]
    completion_text: str


def read_metadata(
    reader: ColumnReader, prompt_lengths: Sequence[int], *, vocab_size: int
) -> list[TraceMetadata]:
    """The metadata that `write_metadata` wrote, one for each trace.

    Raises:
        CorruptBlockError: if the columns contradict each other.
        UnsupportedFormatError: if an encoding is unknown.
    """
    count = len(prompt_lengths)
    prompt_ids = reader.strings(Column.PROMPT_IDS, count)
    reasons = [
        _look_up(_FINISH_REASONS, code, "finish reason")
        for code in reader.small_integers(Column.FINISH_REASONS, count)
    ]
    sample_indices = reader.integers(Column.SAMPLE_INDICES, count)
    sampling = _read_sampling(reader, count)
    spans = _read_spans(reader, count)
    tags = _read_tags(reader, count)
    prompt_tokens = reader.tokens(Column.PROMPT_TOKENS, sum(prompt_lengths), vocab_size)
    prompts = np.split(prompt_tokens, np.cumsum(prompt_lengths)[:-1])
    has_text = reader.has(Column.COMPLETION_TEXTS)
    texts = reader.strings(Column.COMPLETION_TEXTS, count) if has_text else [""] * count
    fields = (prompt_ids, prompts, reasons, sample_indices, spans, sampling, tags, texts)
    return [TraceMetadata(*values) for values in zip(*fields, strict=True)]


def _read_sampling(reader: ColumnReader, count: int) -> list[SamplingParams]:
    floats = reader.doubles(Column.SAMPLING_FLOATS, 3 * count)
    integers = reader.integers(Column.SAMPLING_INTEGERS, 2 * count)
    seeded = reader.small_integers(Column.SEEDED, count)
    if any(flag > 1 for flag in seeded):
        raise CorruptBlockError("SEEDED holds more than 0 and 1")
    seeds = iter(reader.integers(Column.SEEDS, sum(seeded)))
    return [
        SamplingParams(
            temperature=floats[i],
            top_p=floats[count + i],
            min_p=floats[2 * count + i],
            top_k=integers[i],
            max_tokens=integers[count + i],
            seed=next(seeds) if seeded[i] else None,
        )
        for i in range(count)
    ]


def _read_spans(reader: ColumnReader, count: int) -> list[tuple[TokenSpan, ...]]:
    counts = reader.lengths(Column.SPAN_COUNTS, count, _bounded(reader.count(Column.SPAN_KINDS)))
    kinds = reader.small_integers(Column.SPAN_KINDS, sum(counts))
    bounds = reader.numbers(Column.SPAN_BOUNDS, 2 * len(kinds)).tolist()
    names: Iterator[SpanKind] = (_look_up(_SPAN_KINDS, kind, "span kind") for kind in kinds)
    spans = map(TokenSpan, names, bounds[::2], bounds[1::2])
    return [tuple(next(spans) for _ in range(length)) for length in counts]


def _read_tags(reader: ColumnReader, count: int) -> list[dict[str, str]]:
    counts = reader.lengths(Column.TAG_COUNTS, count, _bounded(reader.count(Column.TAG_STRINGS) // 2))
    texts = reader.strings(Column.TAG_STRINGS, 2 * sum(counts))
    pairs = iter(zip(texts[::2], texts[1::2], strict=True))
    tags = [dict(next(pairs) for _ in range(length)) for length in counts]
    if sum(map(len, tags)) != sum(counts):
        raise CorruptBlockError("a trace has the same tag twice")
    return tags


def _bounded(items: int) -> int:
    if items > MAX_BLOCK_ITEMS:
        raise CorruptBlockError(f"{items} spans or tags exceed a block's limit of {MAX_BLOCK_ITEMS}")
    return items


def _look_up(names: dict[int, _Name], code: int, what: str) -> _Name:
    if code not in names:
        raise CorruptBlockError(f"{what} {code} is none of {sorted(names)}")
    return names[code]
