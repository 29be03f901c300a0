from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynearm.wire.alphabet import NUMBER_SYMBOLS, STEP_SYMBOLS, SYMBOL_BITS, number_symbols
from lynearm.wire.code_tables import (
    GROUPS_OF_MERGE,
    NUMBER_CONTEXTS,
    CodeTables,
    LevelRule,
    SymbolCounts,
    build_tables,
)
from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.number_kernels import LOOKAHEAD_BYTES, read_fixed, read_numbers
from lynearm.wire.prefix_codes import (
    MAX_CODE_LENGTH,
    canonical_codes,
    check_lengths,
    code_lengths,
    fill_tables,
)
from lynearm.wire.write_kernels import write_fixed, write_numbers

COUNTS = st.lists(
    st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 1 << 40)), min_size=1, max_size=216
).map(lambda counts: np.array(counts, np.int64))


def best_cost(counts: npt.NDArray[np.int64]) -> int:
    """Bits of the best code of lengths up to the limit: over all numbers of leaves and room, slowly."""
    used = sorted((int(count) for count in counts if count), reverse=True)
    # Cost of codes of the symbols so far, by the room that they leave, in units of the longest word.
    costs = {1 << MAX_CODE_LENGTH: 0}
    for count in used:
        reached: dict[int, int] = {}
        for room, cost in costs.items():
            for length in range(1, MAX_CODE_LENGTH + 1):
                left = room - (1 << (MAX_CODE_LENGTH - length))
                if left >= 0:
                    reached[left] = min(reached.get(left, cost + count * length), cost + count * length)
        costs = reached
    return min(costs.values())


def huffman_cost(counts: npt.NDArray[np.int64]) -> int:
    """Bits of the best code without a limit to its lengths."""
    heap = [int(count) for count in counts if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        cost += both
        heapq.heappush(heap, both)
    return cost


@given(counts=COUNTS)
@settings(deadline=None)
def test_codes_fit_the_limit_and_are_the_best_without_it_or_nearly(counts: npt.NDArray[np.int64]) -> None:
    lengths = code_lengths(counts).astype(np.int64)
    np.testing.assert_array_equal(lengths > 0, counts > 0)
    assert lengths.max(initial=0) <= MAX_CODE_LENGTH
    used = lengths[lengths > 0]
    assert (2.0**-used).sum() <= 1
    cost, best = int((counts * lengths).sum()), huffman_cost(counts)
    assert cost >= best
    if used.max(initial=0) < MAX_CODE_LENGTH:
        assert cost == best
    assert cost <= 1.05 * best + counts.sum() * 0.1


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=16))
@settings(deadline=None, max_examples=25)
def test_codes_at_the_limit_are_the_best_there_are(counts: list[int]) -> None:
    """Counts that double make a code as deep as it can be."""
    doubling = np.array([1 << count for count in counts], np.int64)
    lengths = code_lengths(doubling).astype(np.int64)
    assert int((doubling * lengths).sum()) == best_cost(doubling)


@given(counts=st.lists(COUNTS, min_size=1, max_size=3))
@settings(deadline=None)
def test_tables_read_what_codes_write(counts: list[npt.NDArray[np.int64]]) -> None:
    size = max(row.size for row in counts)
    lengths = np.array([np.pad(code_lengths(row), (0, size - row.size)) for row in counts])
    check_lengths(lengths)
    absent, escape = 1 << 30, size - 1
    tables = np.zeros((len(counts), 1 << MAX_CODE_LENGTH), np.uint32)
    entries = np.arange(size, dtype=np.uint64) << np.uint64(8)
    fill_tables(lengths, entries, absent, 4, escape, tables)
    for row, table in zip(lengths.astype(np.int64), tables, strict=True):
        codes = canonical_codes(row.astype(np.uint8))
        for symbol in np.flatnonzero(row):
            length = int(row[symbol])
            expected = (int(symbol) << 8) + (length << 4) + (0 if symbol == escape else length)
            # Whatever follows the code; no other code was put there, or it would have stayed.
            assert (table[int(codes[symbol]) :: 1 << length] == expected).all()
        room = int((2.0 ** (MAX_CODE_LENGTH - row[row > 0])).sum())
        assert int((table != absent).sum()) == room


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 2, 2, MAX_CODE_LENGTH], [2] * 5])
def test_oversubscribed_codes_are_refused(lengths: list[int]) -> None:
    with pytest.raises(CorruptBlockError, match="oversubscribed"):
        check_lengths(np.array([[1, 0, 0, 0, 0][: len(lengths)], lengths], np.uint8))


def random_counts(seed: int, density: float) -> SymbolCounts:
    rng = np.random.default_rng(seed)
    counts = SymbolCounts.zeros()
    for array in (counts.steps, counts.numbers):
        array[:, :-1] = rng.geometric(1e-3, array[:, :-1].shape) * (rng.random(array[:, :-1].shape) < density)
    return counts


@pytest.mark.parametrize("merge", range(len(GROUPS_OF_MERGE)))
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("with_escapes", [False, True])
def test_tables_come_back_from_their_bytes(merge: int, density: float, with_escapes: bool) -> None:
    rule = LevelRule(step_shift=30, origin=2**32 - 1, shift=31, base=-(2**15), slope=2**15 - 1)
    counts = random_counts(merge, density)
    tables = build_tables(counts, merge=merge, level_rule=rule, with_escapes=with_escapes)
    encoded = tables.to_bytes()
    decoded = CodeTables.from_bytes(encoded)
    assert (decoded.merge, decoded.level_rule) == (merge, rule)
    np.testing.assert_array_equal(decoded.step_lengths, tables.step_lengths)
    np.testing.assert_array_equal(decoded.number_lengths, tables.number_lengths)
    assert decoded.to_bytes() == encoded
    for spoilt in (
        encoded[:-1],
        encoded[: len(encoded) // 2],
        encoded[:10],
        b"",
        encoded + b"\0",
        encoded * 2,
    ):
        with pytest.raises(CorruptBlockError):
            CodeTables.from_bytes(spoilt)


@pytest.mark.parametrize("head", [b"\4" + bytes(10), b"\0\x20" + bytes(9), bytes(6) + b"\x20" + bytes(4)])
def test_tables_of_an_unknown_kind_are_refused(head: bytes) -> None:
    encoded = build_tables(random_counts(0, 0.1), merge=0, level_rule=LevelRule.none(), with_escapes=False)
    with pytest.raises(CorruptBlockError, match="kind"):
        CodeTables.from_bytes(head + encoded.to_bytes()[11:])


@pytest.mark.parametrize("known", [True, False], ids=["by code", "by escape"])
@pytest.mark.parametrize("start", [0, 5])
def test_numbers_of_every_size_come_back(known: bool, start: int) -> None:
    powers = 2 ** np.arange(33, dtype=np.int64)
    values = np.concatenate([np.arange(300), powers[:-1], powers - 1, powers[:-1] * 5 // 4])
    numbers = values[values < 2**32].astype(np.uint32)
    contexts = (np.arange(numbers.size) % NUMBER_CONTEXTS).astype(np.uint8)
    counts = SymbolCounts.zeros()
    if known:
        counts.numbers[:, :NUMBER_SYMBOLS] = 1
    counts.numbers[:, NUMBER_SYMBOLS] = 1
    tables = build_tables(counts, merge=0, level_rule=LevelRule.none(), with_escapes=True)
    out = np.zeros(numbers.size * 6 + 64, np.uint8)
    end = write_numbers(out, start, numbers, contexts, tables.number_codes)
    stream = np.concatenate([out[: (end + 7) // 8], np.full(LOOKAHEAD_BYTES, 0xFF, np.uint8)])
    read = np.zeros_like(numbers)
    assert read_numbers(stream, start, end, contexts, tables.number_table, read) == end
    np.testing.assert_array_equal(read, numbers)
    assert read_numbers(stream, start, end - 1, contexts, tables.number_table, read) == -1


@pytest.mark.parametrize("width", [1, 23, 32])
def test_fixed_numbers_come_back(width: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << width, 50).astype(np.uint32)
    out = np.zeros(300, np.uint8)
    end = write_fixed(out, 3, numbers, width)
    assert end == 3 + 50 * width
    read = np.zeros_like(numbers)
    assert read_fixed(out, 3, end, width, read) == end
    np.testing.assert_array_equal(read, numbers)
    assert read_fixed(out, 3, end - 1, width, read) == -1


def test_symbols_of_numbers_are_all_used_and_ascend() -> None:
    powers = 2 ** np.arange(32, dtype=np.int64)
    quarters = (powers[3:, None] // 4 * np.arange(4, 8)).ravel()
    values = np.concatenate([np.arange(8), quarters, [2**32 - 1]])
    symbols = number_symbols(values.astype(np.uint32))
    np.testing.assert_array_equal(symbols[:-1], np.arange(NUMBER_SYMBOLS))
    assert symbols[-1] == NUMBER_SYMBOLS - 1
    assert STEP_SYMBOLS < 1 << SYMBOL_BITS
