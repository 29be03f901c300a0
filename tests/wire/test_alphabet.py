"""Tables that stand for the alphabet's rules, and rows of more entries than are sorted by counting."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from wire.building import VOCAB_SIZE, build_trace

from lynearm.wire.alphabet import (
    LISTS_USED,
    NEAR_SYMBOLS,
    RANK_START,
    RUN_BITS,
    STATE_RUNS,
    STATES_BEHIND,
    STEP_BASES,
    STEP_WIDTHS,
    Uint16Array,
    Uint64Array,
    gap_symbol,
    next_state,
    token_symbol,
)
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.errors import CodecError
from lynearm.wire.jit import compiled
from lynearm.wire.traces import TopK, Trace


@compiled
def _name_all(symbols: Uint16Array) -> None:
    for value in range(symbols.shape[1]):
        symbols[0, value] = token_symbol(0, value)
        symbols[1, value] = gap_symbol(value)


@compiled
def _states_behind(states: Uint64Array) -> None:
    for code in range(states.size):
        states[code] = next_state(np.uint64(0), np.uint64(code), np.uint64(LISTS_USED))


def test_the_table_of_near_symbols_names_what_the_rules_name() -> None:
    symbols = np.empty((2, RANK_START), np.uint16)
    _name_all(symbols)
    assert np.array_equal(symbols, NEAR_SYMBOLS)


def test_a_near_value_is_its_symbols_base_and_its_open_bits() -> None:
    values = np.arange(RANK_START)
    for symbols in NEAR_SYMBOLS:
        open_bits = values - STEP_BASES[symbols].astype(np.int64)
        assert (open_bits >= 0).all()
        assert (open_bits >> STEP_WIDTHS[symbols].astype(np.int64) == 0).all()


def test_the_table_of_states_holds_the_state_behind_every_first_token_code() -> None:
    states = np.empty(2 * RANK_START, np.uint64)
    _states_behind(states)
    runs = np.minimum(np.arange(states.size) >> RUN_BITS, STATE_RUNS - 1)
    assert np.array_equal(states, STATES_BEHIND[runs])


@pytest.mark.parametrize("k", [127, 128, 129, 300])
def test_wide_rows_with_many_entries_on_a_level_come_back(k: int) -> None:
    trace = build_trace(k=k, slope=0.05)
    (decoded,) = decode_block(encode_block([trace], codec="compact", vocab_size=VOCAB_SIZE))
    assert np.array_equal(np.sort(decoded.top_k.token_ids, axis=1), np.sort(trace.top_k.token_ids, axis=1))
    assert np.array_equal(decoded.completion_token_ids, trace.completion_token_ids)


@pytest.mark.parametrize("k", [128, 129])
@pytest.mark.parametrize("places", [(5, 6), (0, 1), (0, -1)])
def test_a_wide_row_that_names_a_token_twice_is_refused(k: int, places: tuple[int, int]) -> None:
    with pytest.raises(CodecError, match="position 3 of the block names one token twice"):
        encode_block(
            [_repeat(build_trace(k=k, slope=0.05), 3, *places)], codec="compact", vocab_size=VOCAB_SIZE
        )


def _repeat(trace: Trace, row: int, kept: int, repeated: int) -> Trace:
    token_ids = trace.top_k.token_ids.copy()
    token_ids[row, repeated] = token_ids[row, kept]
    return dataclasses.replace(trace, top_k=TopK(token_ids, trace.top_k.logprobs, trace.top_k.tail_mass))
