"""There and back: a block of some traces, decoded, and compared by the law of its mode."""

from __future__ import annotations

import numpy as np
import pytest
from wire.building import VOCAB_SIZE
from wire.comparing import (
    assert_close,
    assert_equal_exactly,
    assert_same_bits,
    grid_of,
    parts,
)

from lynearm.wire.codec import decode_block, decode_rows, encode_block
from lynearm.wire.dictionaries import Dictionary, DictionaryReader
from lynearm.wire.specs import CODEC_MODES, CodecMode, CodecSpec
from lynearm.wire.traces import Trace

MODES = pytest.mark.parametrize("mode", CODEC_MODES)
ROW_MODES = pytest.mark.parametrize("mode", ["exact", "fine", "standard", "compact"])
DRAWS = 6


def codec_of(mode: CodecMode, tail_draws: int = 0) -> CodecSpec:
    return CodecSpec(mode, draws=DRAWS if mode == "sampled" else 0, tail_draws=tail_draws)


def assert_round_trip(
    traces: list[Trace],
    mode: CodecMode,
    vocab_size: int = VOCAB_SIZE,
    dictionary: Dictionary | None = None,
) -> bytes:
    codec = codec_of(mode, max(trace.top_k.tail_draw_count for trace in traces))
    block = encode_block(traces, codec=codec, vocab_size=vocab_size, dictionary=dictionary)
    reader = DictionaryReader(lambda _: dictionary.encoded if dictionary else b"")
    decoded = decode_block(block, dictionaries=reader)
    assert len(decoded) == len(traces)
    for actual, expected in zip(decoded, traces, strict=True):
        if mode in ("exact", "sampled"):
            assert_equal_exactly(actual, expected)
        else:
            assert_close(actual, expected, grid_of(block, dictionary))
    assert_rows_agree(block, decoded, reader)
    return block


def assert_rows_agree(block: bytes, decoded: tuple[Trace, ...], reader: DictionaryReader) -> None:
    """decode_rows says the same as decode_block."""
    rows = decode_rows(block, dictionaries=reader)
    start = 0
    for trace, count, prompt_count in zip(decoded, rows.row_counts, rows.prompt_row_counts, strict=True):
        found = parts(trace)[::-1]
        assert count == sum(top_k.positions for top_k, _ in found)
        assert prompt_count == count - trace.completion_token_ids.size
        for top_k, sampled in found:
            here = slice(start, start + top_k.positions)
            assert_same_bits(rows.positions.token_ids[here, : top_k.k], top_k.token_ids)
            assert_same_bits(np.ascontiguousarray(rows.positions.logprobs[here, : top_k.k]), top_k.logprobs)
            assert (rows.positions.logprobs[here, top_k.k :] == -np.inf).all()
            assert_same_bits(rows.positions.tail_mass[here], top_k.tail_mass)
            assert (rows.positions.tail_draws is None) == (top_k.tail_draws is None)
            if rows.positions.tail_draws is not None and top_k.tail_draws is not None:
                assert_same_bits(rows.positions.tail_draws[here], top_k.tail_draws)
            assert_same_bits(rows.positions.sampled_logprobs[here], sampled)
            start = here.stop
    assert start == rows.positions.kept.size
