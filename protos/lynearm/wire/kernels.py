"""The codec's inner loops, compiled: token codes, symbols and bits, in both directions.

Nothing here allocates by a number that a block claims, and every read stays inside what the caller says is
there: `positions` checks sizes before it calls.

Shape legend: N = positions of a block, K = entries of the widest row, V = vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import (
    COMPANION_START,
    ENTRY_STATES,
    LIST_PLACES,
    LISTS_USED,
    LONG_STEP,
    NUMBER_ESCAPE,
    NUMBER_WIDTHS,
    RANK_START,
    RECENT_START,
    RECENT_WINDOW,
    REFRESH_DISTANCE,
    STATE_RUNS,
    STEP_ESCAPE,
    STEP_WIDTHS,
    SYMBOL_BITS,
    gap_symbol,
    next_state,
    number_symbol,
    token_open_value,
    token_symbol,
)
from lynearm.wire.jit import (
    Scalar,
    address_of,
    compiled,
    inlined,
    load8,
    load32,
    load64,
    store32,
    store64,
)
from lynearm.wire.prefix_codes import MAX_CODE_LENGTH

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Uint8Array = npt.NDArray[np.uint8]
Uint16Array = npt.NDArray[np.uint16]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]

U64 = np.uint64

LOOKAHEAD_BYTES = 16
"""What must be readable behind the last bit of a stream while one entry is read."""

MAX_ENTRY_BITS = 2 * MAX_CODE_LENGTH + SYMBOL_BITS + 20 + 32
"""Longest that one entry can be."""

STEP_ESCAPE_TOTAL = 31
"""Marks an escape in a decoding table: a code and its open bits have 30 bits at most."""

_RECIPROCAL_FACTORIALS = 1.0 / np.array([math.factorial(term) for term in range(14)], np.float64)

_LOWEST_POWER = 1010
_POWERS_OF_TWO = 2.0 ** np.arange(-_LOWEST_POWER, 3)
"""e^−700 is about 2^−1010."""

RECENT_RING = 4096
"""Power of two, at least the window and the entries that one row adds."""

AS_SAMPLED = -2
"""In place of the token before a position: the one that was sampled at the position before."""

_CODE_MASK = U64((1 << MAX_CODE_LENGTH) - 1)

_LATE_RANK = 8
"""From there on, a long step is rare enough to guess that there is none."""

_SHORT_SORT = 64
"""Up to so many entries of one level are sorted by counting."""

_NEVER = -1
_FAR = 1 << 30

_MARK_BITS = 7
"""Of a code in one of the two lists."""

LONG_STEP_CONTEXTS = 8

TAIL_STEPS = 8
REST_OCTAVES = 8
"""How many last levels, and how many sizes of a rest, the tables of tails tell apart."""

MAX_GROWN_LISTS = 1 << 14
"""Grown lists of a block: 4 MiB of them."""


@compiled
def assign_token_codes(
    levels_NK: Uint32Array,
    token_ids_NK: Int32Array,
    kept_N: Uint32Array,
    rank_of_V: Int32Array,
    list_rows_V2: Int32Array,
    lists: Int32Array,
    list_sizes: Int32Array,
    grown: Int32Array,
    grown_sizes: Int32Array,
    previous_N: Int32Array,
    sampled_ids_N: Int32Array,
    token_codes_NK: Uint32Array,
    sampled_index_N: Uint32Array,
) -> int:
    """Sort each row by (level, token code), in place, and find the sampled token in it.

    Args:
        levels_NK: Levels; made non-decreasing along each row.
        token_ids_NK: Token ids, each in 0..V − 1; reordered with their entries.
        kept_N: How many entries of each row count.
        rank_of_V: Rank of each token in the vocabulary's order.
        list_rows_V2: Rows of `lists` that hold each token's followers and companions; 0: none. Used up.
        lists: Tokens, shape [rows, LIST_PLACES]; row 0 is empty.
        list_sizes: Tokens of each list, shape [rows].
        grown: Room for the lists that the block grows, shape [n + 1, LIST_PLACES]; n = 0: a list is the last
            row, and is looked up there.
        grown_sizes: Their sizes, shape [n].
        previous_N: Token before each position; −1 for none.
        sampled_ids_N: Sampled tokens.
        token_codes_NK: Filled.
        sampled_index_N: Filled with 1 + index of the sampled token's entry, 0 when it is not there.

    Returns:
        −1, or the number of a row that holds one token twice.
    """
    # Side by side, since they are asked for together: where a token stands in the list of recent ones, the
    # latest row in whose lists it was and its code there (or the latest row that named it), its rank.
    state_V4 = np.full((rank_of_V.size, 4), _NEVER, np.int32)
    state_V4[:, 2] = rank_of_V
    keys = np.empty(token_ids_NK.shape[1], np.int64)
    ordered = np.empty(token_ids_NK.shape[1], np.int64)
    codes = np.empty(token_ids_NK.shape[1], np.int32)
    # The list begins with the commonest tokens, the commonest nearest.
    head = min(rank_of_V.size, RECENT_WINDOW)
    for token in range(rank_of_V.size):
        if rank_of_V[token] < head:
            state_V4[token, 0] = head - 1 - rank_of_V[token]
    lists_grown = 0
    stamps_V = np.full(rank_of_V.size if grown_sizes.size else 0, _NEVER, np.int32)
    for t in range(kept_N.size):
        kept = np.int64(kept_N[t])
        sampled_index_N[t] = 0
        if kept == 0:
            continue
        _mark_list(
            previous_N[t],
            0,
            t,
            token_ids_NK,
            kept_N,
            list_rows_V2,
            lists,
            list_sizes,
            grown,
            grown_sizes,
            state_V4,
        )
        for i in range(1, kept):
            levels_NK[t, i] = max(levels_NK[t, i], levels_NK[t, i - 1])
        start = 0
        while start < kept:
            end = start + 1
            while end < kept and levels_NK[t, end] == levels_NK[t, start]:
                end += 1
            for i in range(start, end):
                entry = np.int64(token_ids_NK[t, i])
                codes[i] = _token_code(entry, t, head, state_V4)
                keys[i] = np.int64(codes[i]) << 20 | entry
                # Where one token is named twice, the places below are too few: something must be there.
                ordered[i] = keys[i]
            if end - start > _SHORT_SORT:
                ordered[start:end] = np.sort(keys[start:end])
            else:
                # Every entry counts the smaller ones: quadratic, but without a branch to guess, and eight at
                # a time.
                for i in range(start, end):
                    code = codes[i]
                    place = np.int32(0)
                    for j in range(start, end):
                        place += np.int32(codes[j] < code)
                    ordered[start + place] = keys[i]
            if start == 0:
                # From here on, the row's first token is known.
                first = ordered[0] & 0xFFFFF
                _mark_list(
                    first,
                    1,
                    t,
                    token_ids_NK,
                    kept_N,
                    list_rows_V2,
                    lists,
                    list_sizes,
                    grown,
                    grown_sizes,
                    state_V4,
                )
            start = end
        # The likeliest enters the recent list last, so that it lies nearest.
        for i in range(kept - 1, -1, -1):
            code = ordered[i] >> 20
            token = ordered[i] & 0xFFFFF
            token_codes_NK[t, i] = code
            token_ids_NK[t, i] = token
            if state_V4[token, 1] == -2 - t:
                return t
            state_V4[token, 1] = -2 - t
            if token == sampled_ids_N[t]:
                sampled_index_N[t] = i + 1
            if not RECENT_START <= code < RECENT_START + REFRESH_DISTANCE:
                state_V4[token, 0] = head
                head += 1
        if grown_sizes.size:
            lists_grown = grow_lists(
                t,
                previous_N[t],
                token_ids_NK,
                kept,
                list_rows_V2,
                lists,
                list_sizes,
                grown,
                grown_sizes,
                lists_grown,
                stamps_V,
            )
            continue
        if 0 <= previous_N[t] < list_rows_V2.shape[0]:
            list_rows_V2[previous_N[t], 0] = -1 - t
        # A dictionary's companions are the better ones.
        if list_rows_V2[token_ids_NK[t, 0], 1] <= 0:
            list_rows_V2[token_ids_NK[t, 0], 1] = -1 - t
    return -1


@inlined
def _token_code(token: Scalar, t: Scalar, head: Scalar, state_V4: Scalar) -> Scalar:
    """The smallest of a token's places and its distance, a place before an equal distance; or its rank."""
    last = np.int64(state_V4[token, 0])
    mark = np.int64(state_V4[token, 1])
    distance = head - 1 - last if last >= 0 else _FAR
    distance = distance if distance < RECENT_WINDOW else _FAR
    place = mark & (LIST_PLACES - 1) if mark >> _MARK_BITS == t else _FAR + 1
    code = RECENT_START + distance if distance < _FAR else RANK_START + np.int64(state_V4[token, 2])
    return mark & (RECENT_START - 1) if place <= distance else code


@inlined
def _mark_list(
    token: Scalar,
    kind: Scalar,
    t: Scalar,
    token_ids_NK: Scalar,
    kept_N: Scalar,
    list_rows_V2: Scalar,
    lists: Scalar,
    list_sizes: Scalar,
    grown: Scalar,
    grown_sizes: Scalar,
    state_V4: Scalar,
) -> None:
    """Note the places of a list's tokens for row t: a token's followers (kind 0) or companions (1)."""
    if 0 <= token < list_rows_V2.shape[0]:
        row = list_rows_V2[token, kind]
        if row < 0:
            row = -1 - row
            if grown_sizes.size:
                for place in range(grown_sizes[row]):
                    _mark(grown[row, place], kind, place, t, state_V4)
            else:
                size = min(np.int64(kept_N[row]) - kind, LIST_PLACES)
                for place in range(size):
                    _mark(token_ids_NK[row, place + kind], kind, place, t, state_V4)
        else:
            for place in range(list_sizes[row]):
                _mark(lists[row, place], kind, place, t, state_V4)


@inlined
def _mark(token: Scalar, kind: Scalar, place: Scalar, t: Scalar, state_V4: Scalar) -> None:
    mark = np.int64(t) << _MARK_BITS | kind * COMPANION_START | place
    if kind:
        # A follower stays one, unless its place is the larger number.
        old = np.int64(state_V4[token, 1])
        stays = (old >> _MARK_BITS == t) & (old & (LIST_PLACES - 1) <= place)
        mark = old if stays else mark
    state_V4[token, 1] = mark


@compiled
def grow_lists(
    t: Scalar,
    previous: Scalar,
    token_ids_NK: Int32Array,
    kept: Scalar,
    list_rows_V2: Int32Array,
    lists: Int32Array,
    list_sizes: Int32Array,
    grown: Int32Array,
    grown_sizes: Int32Array,
    count: int,
    stamps_V: Int32Array,
) -> int:
    """Add a row's tokens to the followers of the token before it, and to the companions of its first token.

    The row's tokens go before the followers that were there, and behind the companions; each token is there
    once, and what lies behind `LIST_PLACES` is dropped.

    Args:
        t: Number of the row, which has entries.
        previous: Token before it.
        token_ids_NK: Its tokens; those outside 0..V − 1 are left out.
        kept: Its entries.
        list_rows_V2: As for `assign_token_codes`; −1 − i: grown list i.
        lists: As for `assign_token_codes`.
        list_sizes: As for `assign_token_codes`.
        grown: The grown lists, and a row to work in, shape [n + 1, LIST_PLACES].
        grown_sizes: Shape [n].
        count: How many there are; when there are n, lists that were not grown yet stay as they are.
        stamps_V: This function's own, −1 in the beginning: the list that each token was put into last.

    Returns:
        How many there are now.
    """
    work = grown_sizes.size
    for kind in range(2):
        owner = np.int64(token_ids_NK[t, 0]) if kind else np.int64(previous)
        if not 0 <= owner < list_rows_V2.shape[0]:
            continue
        old: Scalar = np.int64(list_rows_V2[owner, kind])
        old_size = grown_sizes[-1 - old] if old < 0 else list_sizes[old]
        if (old >= 0 and count == work) or (kind == 1 and old_size == LIST_PLACES):
            continue
        size = 0
        for part in range(2):
            is_row = part == kind
            for i in range(kept - kind if is_row else old_size):
                if size == LIST_PLACES:
                    break
                if is_row:
                    token = token_ids_NK[t, i + kind]
                else:
                    token = grown[-1 - old, i] if old < 0 else lists[old, i]
                if 0 <= token < stamps_V.size:
                    # Without a branch: half of the tokens are there already.
                    grown[work, size] = token
                    size += stamps_V[token] != 2 * t + kind
                    stamps_V[token] = 2 * t + kind
        if old >= 0:
            old = -1 - count
            count += 1
            list_rows_V2[owner, kind] = old
        grown[-1 - old, :size] = grown[work, :size]
        grown_sizes[-1 - old] = size
    return count


@inlined
def _step_context(level: Scalar, level_shift: Scalar) -> Scalar:
    """Context of a long step from a level."""
    return min(level >> level_shift, LONG_STEP_CONTEXTS - 1)


@compiled
def name_entries(
    levels_NK: Uint32Array,
    token_codes_NK: Uint32Array,
    kept_N: Uint32Array,
    bucket_of_rank: Uint8Array,
    level_shift: int,
    symbols_NK: Uint16Array,
    open_bits_NK: Uint32Array,
    counts: Int64Array,
    step_counts: Int64Array,
) -> None:
    """Name every entry by a symbol, and count the symbols of each context.

    Args:
        levels_NK: Sorted.
        token_codes_NK: Ascending inside a level.
        kept_N: How many entries of each row count.
        bucket_of_rank: Shape [≥ K].
        level_shift: 2^level_shift levels share a context of long steps.
        symbols_NK: Filled with context · 2^SYMBOL_BITS + symbol.
        open_bits_NK: Filled with what the symbol leaves open.
        counts: Adds to shape [contexts, STEP_SYMBOLS + 1].
        step_counts: Adds the symbols of long steps to shape [LONG_STEP_CONTEXTS, NUMBER_SYMBOLS + 1].
    """
    for t in range(kept_N.size):
        previous_code = np.int64(-1)
        previous_level = np.int64(0)
        state = U64(0)
        for i in range(np.int64(kept_N[t])):
            code = np.int64(token_codes_NK[t, i])
            level = np.int64(levels_NK[t, i])
            step = level - previous_level if i else 0
            context = np.int64(bucket_of_rank[i]) * ENTRY_STATES + np.int64(state)
            if step == 0 and i > 0:
                value = code - previous_code - 1
                symbol = gap_symbol(value)
            else:
                value = token_open_value(code)
                symbol = token_symbol(step, code)
            symbols_NK[t, i] = context << SYMBOL_BITS | symbol
            open_bits_NK[t, i] = value & ((1 << np.int64(STEP_WIDTHS[symbol])) - 1)
            counts[context, symbol] += 1
            if step >= LONG_STEP:
                context = _step_context(previous_level, level_shift)
                step_counts[context, number_symbol(step - LONG_STEP)] += 1
            previous_code = code
            previous_level = level
            state = next_state(state, U64(code), U64(LISTS_USED))


@inlined
def _put(
    at: Scalar, waiting: Scalar, count: Scalar, value: Scalar, width: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """Append at most 56 bits: where the stream stands, the bits that wait for a whole byte, how many."""
    waiting |= U64(value) << count
    count += U64(width)
    store64(at, waiting)
    whole = count >> U64(3)
    return at + whole, waiting >> (whole << U64(3)), count & U64(7)


@inlined
def _put_number(
    at: Scalar, waiting: Scalar, count: Scalar, number: Scalar, codes_at: Scalar, widths_at: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """Append a number by its code, or by an escape."""
    symbol = U64(number_symbol(number))
    code = load32(codes_at + (symbol << U64(2)))
    width = load8(widths_at + symbol)
    if code == U64(0):
        code = load32(codes_at + U64(4 * NUMBER_ESCAPE))
        width = U64(32)
    at, waiting, count = _put(at, waiting, count, code & U64(0xFFFF), code >> U64(16))
    return _put(at, waiting, count, U64(number) & ((U64(1) << width) - U64(1)), width)


@compiled
def write_numbers(
    out: Uint8Array, start: int, numbers: Uint32Array, contexts: Uint8Array, codes: Uint32Array
) -> int:
    """Append numbers, each by the code of its context.

    Args:
        out: Zeros from bit `start` on; has room for 43 bits a number, and for eight bytes more.
        start: Bit at which to begin.
        numbers: Shape [n].
        contexts: Row of `codes` for each, shape [n].
        codes: Code and length · 65536 of each symbol, 0 for none, shape [contexts, NUMBER_SYMBOLS + 1].

    Returns:
        The bit behind the last.
    """
    codes_at, widths_at = address_of(codes), address_of(NUMBER_WIDTHS)
    at, waiting, count = address_of(out) + (U64(start) >> U64(3)), U64(0), U64(start) & U64(7)
    waiting = load8(at) & ((U64(1) << count) - U64(1))
    for index in range(numbers.size):
        row_at = codes_at + U64(contexts[index]) * U64(4 * (NUMBER_ESCAPE + 1))
        at, waiting, count = _put_number(at, waiting, count, np.int64(numbers[index]), row_at, widths_at)
    return int(((at - address_of(out)) << U64(3)) + count)


@compiled
def write_fixed(out: Uint8Array, start: int, numbers: Uint32Array, width: int) -> int:
    """Append numbers of `width` bits, at most 32; as `write_numbers`."""
    at, waiting, count = address_of(out) + (U64(start) >> U64(3)), U64(0), U64(start) & U64(7)
    waiting = load8(at) & ((U64(1) << count) - U64(1))
    for index in range(numbers.size):
        at, waiting, count = _put(at, waiting, count, U64(numbers[index]), U64(width))
    return int(((at - address_of(out)) << U64(3)) + count)


@compiled
def write_rows(
    out: Uint8Array,
    start: int,
    first_row: int,
    lanes: int,
    levels_NK: Uint32Array,
    symbols_NK: Uint16Array,
    open_bits_NK: Uint32Array,
    kept_N: Uint32Array,
    level_shift: int,
    codes: Uint32Array,
    step_codes: Uint32Array,
) -> int:
    """Append every `lanes`-th row from `first_row` on.

    Args:
        out: Has room for `MAX_ENTRY_BITS` an entry, and for eight bytes more.
        start: Bit at which to begin, the first of a byte.
        first_row: First row.
        lanes: Distance of the rows.
        levels_NK: As given to `name_entries`.
        symbols_NK: From `name_entries`.
        open_bits_NK: From `name_entries`.
        kept_N: How many entries of each row count.
        level_shift: As given to `name_entries`.
        codes: Code and length · 65536 of each symbol in each context, 0 for none.
        step_codes: The same for long steps, by context.

    Returns:
        The bit behind the last.
    """
    step_codes_at, widths_at = address_of(step_codes), address_of(NUMBER_WIDTHS)
    at, waiting, count = address_of(out) + (U64(start) >> U64(3)), U64(0), U64(0)
    for t in range(first_row, kept_N.size, lanes):
        level = np.int64(levels_NK[t, 0]) if kept_N[t] else np.int64(0)
        for i in range(np.int64(kept_N[t])):
            context = U64(symbols_NK[t, i]) >> U64(SYMBOL_BITS)
            symbol = U64(symbols_NK[t, i]) & U64((1 << SYMBOL_BITS) - 1)
            code = U64(codes[context, symbol])
            width = U64(STEP_WIDTHS[symbol])
            value = U64(open_bits_NK[t, i])
            if code == U64(0):
                code = U64(codes[context, STEP_ESCAPE])
                value = value << U64(SYMBOL_BITS) | symbol
                width += U64(SYMBOL_BITS)
            length = code >> U64(16)
            at, waiting, count = _put(
                at, waiting, count, (code & U64(0xFFFF)) | (value << length), length + width
            )
            step = np.int64(levels_NK[t, i]) - level
            if step >= LONG_STEP:
                context = U64(_step_context(level, level_shift))
                row_at = step_codes_at + context * U64(4 * (NUMBER_ESCAPE + 1))
                at, waiting, count = _put_number(at, waiting, count, step - LONG_STEP, row_at, widths_at)
            level += step
    return int(((at - address_of(out)) << U64(3)) + count)


@compiled
def read_numbers(
    stream: Uint8Array,
    bit: int,
    end_bit: int,
    contexts: Uint8Array,
    tables: Uint64Array,
    numbers: Uint32Array,
) -> int:
    """Read numbers that `write_numbers` wrote.

    Args:
        stream: Readable for `LOOKAHEAD_BYTES` behind the end.
        bit: Where the first begins.
        end_bit: Where the stream ends.
        contexts: Table of each number, shape [n].
        tables: Shape [tables · 2^11]: bits in all, length << 6, base << 10.
        numbers: Filled, shape [n].

    Returns:
        The bit behind the last; −1 when a code is not in its table or the stream ends before.
    """
    stream_at = address_of(stream)
    position = U64(bit)
    end = U64(end_bit)
    for index in range(numbers.size):
        if position >= end:
            return -1
        word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
        table = U64(contexts[index]) << U64(MAX_CODE_LENGTH)
        entry = tables[table + (word & U64((1 << MAX_CODE_LENGTH) - 1))]
        if entry >> U64(42):
            return -1
        total = entry & U64(63)
        open_bits = (word & ((U64(1) << total) - U64(1))) >> ((entry >> U64(6)) & U64(15))
        numbers[index] = (entry >> U64(10)) + open_bits
        position += total
    # Of int64 and uint64, numba would make a float.
    behind: Scalar = np.int64(position)
    return -1 if position > end else behind


@compiled
def read_fixed(stream: Uint8Array, bit: int, end_bit: int, width: int, numbers: Uint32Array) -> int:
    """Read numbers of `width` bits, at most 32; as `read_numbers`."""
    position = U64(bit)
    if position + U64(numbers.size) * U64(width) > U64(end_bit):
        return -1
    stream_at = address_of(stream)
    mask = (U64(1) << U64(width)) - U64(1)
    for index in range(numbers.size):
        numbers[index] = (load64(stream_at + (position >> U64(3))) >> (position & U64(7))) & mask
        position += U64(width)
    return bit + numbers.size * width


@inlined
def _read_entry(
    stream_at: Scalar,
    position: Scalar,
    table_at: Scalar,
    plain_at: Scalar,
    long_steps_at: Scalar,
    level_shift: Scalar,
    previous: Scalar,
    level: Scalar,
) -> tuple[Scalar, Scalar, Scalar]:
    """One entry: the bit behind it, its token code, and its level.

    Where no code fits, tables hold a token code, or a step, that no block may have: that is noticed later.

    Whether a step is long is a coin's toss for a row's first entries: to look up a number that is not there
    costs less than to guess wrong, which undoes the work of four rows.
    """
    position, code, step, word = _read_symbol(stream_at, position, table_at, plain_at, previous)
    table_at = _long_step_table(long_steps_at, level_shift, level)
    number = load64(table_at + ((word & _CODE_MASK) << U64(3))) & load64(plain_at + (step << U64(3)))
    total = number & U64(63)
    if total > U64(27):
        word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
    step += (number >> U64(10)) + ((word & ((U64(1) << total) - U64(1))) >> ((number >> U64(6)) & U64(15)))
    return position + total, code, level + step


@inlined
def _read_late_entry(
    stream_at: Scalar,
    position: Scalar,
    table_at: Scalar,
    plain_at: Scalar,
    long_steps_at: Scalar,
    level_shift: Scalar,
    previous: Scalar,
    level: Scalar,
) -> tuple[Scalar, Scalar, Scalar]:
    """As `_read_entry`, where long steps are rare: escapes, whose step is long in the tables, lie behind them."""
    word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
    entry = load32(table_at + ((word & _CODE_MASK) << U64(2)))
    total = entry & U64(31)
    step = (entry >> U64(9)) & U64(3)
    if step == U64(LONG_STEP):
        if total == U64(STEP_ESCAPE_TOTAL):
            position, entry, word = _read_escaped(stream_at, position, plain_at, entry, word)
            total = entry & U64(31)
            step = (entry >> U64(9)) & U64(3)
        if step == U64(LONG_STEP):
            behind = position + total
            table_at = _long_step_table(long_steps_at, level_shift, level)
            number = load64(table_at + (((word >> total) & _CODE_MASK) << U64(3)))
            number_total = number & U64(63)
            number_word = load64(stream_at + (behind >> U64(3))) >> (behind & U64(7))
            level += (number >> U64(10)) + (
                (number_word & ((U64(1) << number_total) - U64(1))) >> ((number >> U64(6)) & U64(15))
            )
            position += number_total
    code = (entry >> U64(11)) + ((word & ((U64(1) << total) - U64(1))) >> ((entry >> U64(5)) & U64(15)))
    code += previous if step == U64(0) else U64(0)
    return position + total, code, level + step


@inlined
def _long_step_table(long_steps_at: Scalar, level_shift: Scalar, level: Scalar) -> Scalar:
    context = min(level >> level_shift, U64(LONG_STEP_CONTEXTS - 1))
    return long_steps_at + (context << U64(MAX_CODE_LENGTH + 3))


@inlined
def _read_symbol(
    stream_at: Scalar, position: Scalar, table_at: Scalar, plain_at: Scalar, previous: Scalar
) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """An entry's symbol: the bit behind it, its token code, its step, and at least 27 of the bits behind."""
    word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
    entry = load32(table_at + ((word & _CODE_MASK) << U64(2)))
    total = entry & U64(31)
    if total == U64(STEP_ESCAPE_TOTAL):
        position, entry, word = _read_escaped(stream_at, position, plain_at, entry, word)
        total = entry & U64(31)
    step = (entry >> U64(9)) & U64(3)
    code = (entry >> U64(11)) + ((word & ((U64(1) << total) - U64(1))) >> ((entry >> U64(5)) & U64(15)))
    code += previous if step == U64(0) else U64(0)
    return position + total, code, step, word >> total


@inlined
def _read_escaped(
    stream_at: Scalar, position: Scalar, plain_at: Scalar, entry: Scalar, word: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """A symbol without a code: where its open bits begin, its element, and the bits there."""
    length = (entry >> U64(5)) & U64(15)
    symbol = (word >> length) & U64((1 << SYMBOL_BITS) - 1)
    position += length + U64(SYMBOL_BITS)
    return (
        position,
        load32(plain_at + U64(32) + (symbol << U64(2))),
        load64(stream_at + (position >> U64(3))) >> (position & U64(7)),
    )


@compiled
def read_rows(
    stream: Uint8Array,
    starts: Uint64Array,
    ends: Uint64Array,
    kept_N: Uint32Array,
    first_levels_N: Uint32Array,
    table: Uint32Array,
    bucket_stride: int,
    states: Uint64Array,
    remembered: int,
    plain: Uint32Array,
    long_steps: Uint64Array,
    level_shift: int,
    bucket_of_rank: Uint8Array,
    token_of_rank_V: Int32Array,
    list_rows_V2: Int32Array,
    lists: Int32Array,
    list_sizes: Int32Array,
    grown: Int32Array,
    grown_sizes: Int32Array,
    stamps_V: Int32Array,
    first_previous_N: Int32Array,
    sampled_index_N: Uint32Array,
    outside_ids: Int32Array,
    max_level: int,
    codes: Uint32Array,
    addresses: Uint64Array,
    recent: Int32Array,
    token_ids_NK: Int32Array,
    levels_NK: Uint32Array,
    last_levels_N: Uint32Array,
    sampled_ids_N: Int32Array,
) -> bool:
    """Read rows that `write_rows` wrote.

    Args:
        stream: Readable for `LOOKAHEAD_BYTES` and one row of the longest entries behind every lane's end.
        starts: First bit of each lane, one or four.
        ends: Bit behind each lane's last byte.
        kept_N: Entries of each row.
        first_levels_N: Level of each row's first entry.
        table: Decoding tables of the entries, as in `_step_entries`.
        bucket_stride: Bytes from one bucket's tables to the next one's.
        states: Where the tables of a state are, in bytes from those of state 0, which is how a state is known
            here: behind a token code of so many 64s, in a row that has named no other, shape [`STATE_RUNS`].
        remembered: Bits of such a number that stay along a row.
        plain: Elements for symbols without a code, length 0, shape [2^SYMBOL_BITS].
        long_steps: Decoding tables of long steps, shape [LONG_STEP_CONTEXTS · 2^11].
        level_shift: As for `name_entries`.
        bucket_of_rank: Shape [≥ K].
        token_of_rank_V: The vocabulary's order.
        list_rows_V2: As for `assign_token_codes`. Used up.
        lists: As for `assign_token_codes`.
        list_sizes: As for `assign_token_codes`.
        grown: As for `assign_token_codes`.
        grown_sizes: As for `assign_token_codes`.
        stamps_V: As for `grow_lists`; empty where no lists grow.
        first_previous_N: Token before each position; −1 for none, `AS_SAMPLED` for the position before's.
        sampled_index_N: 1 + index of the sampled token's entry; 0: the next of `outside_ids`.
        outside_ids: Sampled tokens that have no entry.
        max_level: Largest level allowed.
        codes: For the token codes of four rows, shape [4 K]. The caller's, as the next: numba frees an array
            of a compiled function's own after its last use by name, which is not its last use by address.
        addresses: For where the tokens of a row are, shape [K].
        recent: For the list of recent tokens, shape [`RECENT_RING`].
        token_ids_NK: Filled; 0 where a row keeps less than K entries. `LIST_PLACES` + 1 elements behind it
            must be readable.
        levels_NK: Filled where there are entries.
        last_levels_N: Filled with the level of each row's last entry; 0 for a row without entries.
        sampled_ids_N: Filled.

    Returns:
        Whether all codes were in their tables, all token codes and levels in their ranges, and every lane
        ended in its last byte.
    """
    stream_at, table_at = address_of(stream), address_of(table)
    plain_at, long_steps_at = address_of(plain), address_of(long_steps)
    by_bucket, shift = U64(bucket_stride), U64(level_shift)
    width = U64(token_ids_NK.shape[1])
    by_row = width * U64(4)
    codes_at, recent_at = address_of(codes), address_of(recent)
    lists_at, sizes_at, list_rows_at = address_of(lists), address_of(list_sizes), address_of(list_rows_V2)
    grows = grown_sizes.size > 0
    lists_grown = 0
    order_at = address_of(token_of_rank_V)
    ids_at, levels_at, kept_at = address_of(token_ids_NK), address_of(levels_NK), address_of(kept_N)
    # Where the block's own lists are: those that it grows, or else its rows themselves.
    latest_at = address_of(grown) if grows else ids_at
    latest_sizes_at = address_of(grown_sizes) if grows else kept_at
    latest_width = U64(LIST_PLACES) if grows else width
    lanes = U64(starts.size)
    count = U64(kept_N.size)
    highest = U64(max_level)
    bad = U64(0)
    states_at, kept_bits = address_of(states), U64(remembered)
    positions = starts.copy()
    last_codes = np.zeros(4, np.uint64)
    last_levels = np.zeros(4, np.uint64)
    last_states = np.zeros(4, np.uint64)
    head = U64(min(token_of_rank_V.size, RECENT_WINDOW))
    for rank in range(U64(0), head):
        recent[head - U64(1) - rank] = token_of_rank_V[rank]
    highest_code = U64(0)
    sampled = np.int32(-1)
    outside = U64(0)
    last_rank = U64(token_of_rank_V.size - 1)
    t = U64(0)
    while t < count:
        abreast = lanes if t + lanes <= count else U64(count - t)
        done = U64(0)
        if abreast == U64(4):
            p0, p1, p2, p3 = positions[0], positions[1], positions[2], positions[3]
            c0 = c1 = c2 = c3 = U64(0)
            l0, l1 = U64(first_levels_N[t]), U64(first_levels_N[t + U64(1)])
            l2, l3 = U64(first_levels_N[t + U64(2)]), U64(first_levels_N[t + U64(3)])
            s0 = s1 = s2 = s3 = U64(0)
            done = U64(min(kept_N[t], kept_N[t + U64(1)], kept_N[t + U64(2)], kept_N[t + U64(3)]))
            early = min(done, U64(_LATE_RANK))
            to_levels = levels_at + t * by_row - codes_at
            for i in range(U64(0), early):
                context_at = table_at + U64(bucket_of_rank[i]) * by_bucket
                p0, c0, l0 = _read_entry(
                    stream_at, p0, context_at + s0, plain_at, long_steps_at, shift, c0, l0
                )
                p1, c1, l1 = _read_entry(
                    stream_at, p1, context_at + s1, plain_at, long_steps_at, shift, c1, l1
                )
                p2, c2, l2 = _read_entry(
                    stream_at, p2, context_at + s2, plain_at, long_steps_at, shift, c2, l2
                )
                p3, c3, l3 = _read_entry(
                    stream_at, p3, context_at + s3, plain_at, long_steps_at, shift, c3, l3
                )
                s0, s1 = _next_tables(s0, c0, kept_bits, states_at), _next_tables(s1, c1, kept_bits, states_at)
                s2, s3 = _next_tables(s2, c2, kept_bits, states_at), _next_tables(s3, c3, kept_bits, states_at)
                code_at = codes_at + (i << U64(2))
                _put_entry(code_at, to_levels, c0, l0)
                _put_entry(code_at + by_row, to_levels, c1, l1)
                _put_entry(code_at + U64(2) * by_row, to_levels, c2, l2)
                _put_entry(code_at + U64(3) * by_row, to_levels, c3, l3)
            for i in range(early, done):
                context_at = table_at + U64(bucket_of_rank[i]) * by_bucket
                p0, c0, l0 = _read_late_entry(
                    stream_at, p0, context_at + s0, plain_at, long_steps_at, shift, c0, l0
                )
                p1, c1, l1 = _read_late_entry(
                    stream_at, p1, context_at + s1, plain_at, long_steps_at, shift, c1, l1
                )
                p2, c2, l2 = _read_late_entry(
                    stream_at, p2, context_at + s2, plain_at, long_steps_at, shift, c2, l2
                )
                p3, c3, l3 = _read_late_entry(
                    stream_at, p3, context_at + s3, plain_at, long_steps_at, shift, c3, l3
                )
                s0, s1 = _next_tables(s0, c0, kept_bits, states_at), _next_tables(s1, c1, kept_bits, states_at)
                s2, s3 = _next_tables(s2, c2, kept_bits, states_at), _next_tables(s3, c3, kept_bits, states_at)
                code_at = codes_at + (i << U64(2))
                _put_entry(code_at, to_levels, c0, l0)
                _put_entry(code_at + by_row, to_levels, c1, l1)
                _put_entry(code_at + U64(2) * by_row, to_levels, c2, l2)
                _put_entry(code_at + U64(3) * by_row, to_levels, c3, l3)
            positions[0], positions[1], positions[2], positions[3] = p0, p1, p2, p3
            last_codes[0], last_codes[1], last_codes[2], last_codes[3] = c0, c1, c2, c3
            last_levels[0], last_levels[1], last_levels[2], last_levels[3] = l0, l1, l2, l3
            last_states[0], last_states[1], last_states[2], last_states[3] = s0, s1, s2, s3
        for lane in range(U64(0), abreast):
            kept = U64(kept_N[t + lane])
            position = positions[lane]
            code = last_codes[lane] if done else U64(0)
            level = last_levels[lane] if done else U64(first_levels_N[t + lane])
            state = last_states[lane] if done else U64(0)
            lane_at = codes_at + lane * by_row
            to_levels = levels_at + t * by_row - codes_at
            for i in range(done, kept):
                context_at = table_at + U64(bucket_of_rank[i]) * by_bucket + state
                position, code, level = _read_entry(
                    stream_at, position, context_at, plain_at, long_steps_at, shift, code, level
                )
                state = _next_tables(state, code, kept_bits, states_at)
                _put_entry(lane_at + (i << U64(2)), to_levels, code, level)
            # Levels do not fall along a row, so that its last one is its highest.
            bad |= U64(level > highest) | U64(position > ends[lane])
            positions[lane] = min(position, ends[lane])
            last_levels_N[t + lane] = level if kept else U64(0)
            # How far back the list goes; less than the window only in a small vocabulary.
            available = min(head, U64(RECENT_WINDOW))
            if available < U64(RECENT_WINDOW):
                for i in range(U64(0), kept):
                    code = load32(lane_at + (i << U64(2)))
                    bad |= U64(code < U64(RANK_START)) & U64(code >= available + U64(RECENT_START))
            row_at = ids_at + (t + lane) * by_row
            previous = first_previous_N[t + lane]
            previous = sampled if previous == AS_SAMPLED else previous
            previous_at = U64(0)
            if 0 <= previous < list_rows_V2.shape[0]:
                previous_at = list_rows_at + U64(previous) * U64(8)
                list_row = load32(previous_at)
            else:
                list_row = U64(0)
            followers_at, followers = _find_list(
                list_row, U64(0), latest_at, latest_width, latest_sizes_at, lists_at, sizes_at
            )
            companions_at, companions = followers_at, U64(0)
            # Distances are counted from the first token code that is one.
            newest = head - U64(1) + U64(RECENT_START)
            if kept:
                # The first token decides whose companions the others may be.
                code = load32(lane_at)
                token_at = _address_of_token(
                    code, newest, recent_at, order_at, last_rank, followers_at, followers_at
                )
                bad |= U64(code >= U64(COMPANION_START)) & U64(code < U64(RECENT_START))
                first_at = list_rows_at + min(load32(token_at), last_rank) * U64(8) + U64(4)
                list_row = load32(first_at)
                companions_at, companions = _find_list(
                    list_row,
                    U64(0) if grows else U64(1),
                    latest_at,
                    latest_width,
                    latest_sizes_at,
                    lists_at,
                    sizes_at,
                )
                if not grows:
                    # From now on, this row is the latest one; but a dictionary's companions are the better.
                    this_row = U64(0xFFFFFFFF) - (t + lane)
                    if previous_at:
                        store32(previous_at, this_row)
                    store32(first_at, this_row if list_row - U64(1) >= U64(0x7FFFFFFF) else list_row)
            # In a loop of their own, which the compiler turns into one over several entries at a time.
            lane_start = lane * width
            highest_of_row = np.uint32(0)
            behind = U64(0)
            for i in range(U64(0), kept):
                row_code = codes[lane_start + i]
                code = U64(row_code)
                highest_of_row = max(highest_of_row, row_code)
                addresses[i] = _address_of_token(
                    code, newest, recent_at, order_at, last_rank, followers_at, companions_at
                )
                end = followers if code < U64(COMPANION_START) else companions + U64(COMPANION_START)
                behind |= U64(code >= end) & U64(code < U64(RECENT_START))
            highest_code = max(highest_code, U64(highest_of_row))
            bad |= behind
            # At once, since all that the next row looks up waits for it.
            index = U64(sampled_index_N[t + lane])
            if index > U64(0):
                sampled = np.int32(load32(addresses[index - U64(1)]))
            else:
                sampled = outside_ids[outside]
                outside += U64(1)
            sampled_ids_N[t + lane] = sampled
            for back in range(U64(1), kept + U64(1)):
                last = kept - back
                token = load32(addresses[last])
                store32(row_at + (last << U64(2)), token)
                store32(recent_at + ((head & U64(RECENT_RING - 1)) << U64(2)), token)
                # Unsigned: places in lists wrap round to the largest numbers, and enter too.
                code = load32(lane_at + (last << U64(2)))
                head += U64(code - U64(RECENT_START) >= U64(REFRESH_DISTANCE))
            if grows and kept:
                lists_grown = grow_lists(
                    np.int64(t + lane),
                    np.int64(previous),
                    token_ids_NK,
                    np.int64(kept),
                    list_rows_V2,
                    lists,
                    list_sizes,
                    grown,
                    grown_sizes,
                    lists_grown,
                    stamps_V,
                )
            for i in range(kept, width):
                token_ids_NK[t + lane, i] = 0
        t += abreast
    for lane in range(U64(0), lanes):
        bad |= U64((positions[lane] + U64(7)) >> U64(3) != ends[lane] >> U64(3))
    return bool(bad == U64(0) and highest_code <= last_rank + U64(RANK_START))


@inlined
def _put_entry(code_at: Scalar, to_levels: Scalar, code: Scalar, level: Scalar) -> None:
    store32(code_at, code)
    store32(code_at + to_levels, level)


@inlined
def _next_tables(state: Scalar, token_code: Scalar, remembered: Scalar, states_at: Scalar) -> Scalar:
    """`next_state`, where states are offsets of tables."""
    step = min(token_code >> U64(6), U64(STATE_RUNS - 1))
    return (state & remembered) | load64(states_at + (step << U64(3)))


@inlined
def _address_of_token(
    code: Scalar,
    newest: Scalar,
    recent_at: Scalar,
    order_at: Scalar,
    last_rank: Scalar,
    followers_at: Scalar,
    companions_at: Scalar,
) -> Scalar:
    """Where the token of a token code stands; for a rank beyond all, the rarest.

    All four places are found, and one is taken: to guess which one it is would go wrong too often.
    """
    again_at = recent_at + (((newest - code) & U64(RECENT_RING - 1)) << U64(2))
    rank = min(max(code, U64(RANK_START)) - U64(RANK_START), last_rank)
    fresh_at = order_at + (rank << U64(2))
    token_at = again_at if code < U64(RANK_START) else fresh_at
    list_at = followers_at if code < U64(COMPANION_START) else companions_at - U64(4 * COMPANION_START)
    return list_at + (code << U64(2)) if code < U64(RECENT_START) else token_at


@inlined
def _find_list(
    list_row: Scalar,
    skipped: Scalar,
    latest_at: Scalar,
    latest_width: Scalar,
    latest_sizes_at: Scalar,
    lists_at: Scalar,
    sizes_at: Scalar,
) -> tuple[Scalar, Scalar]:
    """Where a list is, the block's or the dictionary's, and its size; `LIST_PLACES` elements are readable."""
    if list_row >> U64(31):
        row = U64(0xFFFFFFFF) - list_row
        size = min(load32(latest_sizes_at + (row << U64(2))) - skipped, U64(LIST_PLACES))
        list_at = latest_at + ((row * latest_width + skipped) << U64(2))
    else:
        size = load32(sizes_at + (list_row << U64(2)))
        list_at = lists_at + list_row * U64(4 * LIST_PLACES)
    return list_at, size


@compiled
def look_up(levels_NK: Uint32Array, kept_N: Uint32Array, table: Float32Array, out_NK: Float32Array) -> None:
    """Value of every level, each below the table's size; −inf where a row keeps less than K entries.

    Args:
        levels_NK: Levels.
        kept_N: Entries of each row.
        table: Value of each level.
        out_NK: Filled; may be the memory of `levels_NK`.
    """
    width = U64(levels_NK.shape[1])
    for t in range(U64(0), U64(kept_N.size)):
        kept = U64(kept_N[t])
        for i in range(U64(0), kept):
            out_NK[t, i] = table[levels_NK[t, i]]
        for i in range(kept, width):
            out_NK[t, i] = -np.inf


@compiled
def foresee_tails(
    levels_NK: Uint32Array,
    kept_N: Uint32Array,
    last_levels_N: Uint32Array,
    rule: tuple[int, int, int, int],
    masses: Int64Array,
    scale: float,
    contexts_N: Uint8Array,
    expected_N: Int64Array,
) -> None:
    """What a row's entries foretell of its tail: the context of its number, and its level.

    Args:
        levels_NK: Levels; below the size of `masses`, if that has any.
        kept_N: Entries of each row.
        last_levels_N: Level of each row's last entry; 0 for a row without entries.
        rule: Origin, shift, base and slope of a `LevelRule`.
        masses: Of a grid: probability of each level, in units of 2^−40, since sums of integers are the same
            on every machine. Of other scales: none.
        scale: The grid's.
        contexts_N: Filled: `TAIL_STEPS` contexts by the last level, then those by what the masses leave of 1.
        expected_N: Filled.
    """
    origin, shift, base, slope = rule
    for t in range(kept_N.size):
        step = min(max(np.int64(last_levels_N[t]) - origin, 0) >> shift, TAIL_STEPS - 1)
        context = step
        expected = base + slope * step
        if masses.size:
            rest = np.int64(1 << 40)
            for i in range(np.int64(kept_N[t])):
                rest -= masses[levels_NK[t, i]]
            if rest > 0:
                mass = np.float64(rest) * 2.0**-40
                # The rest is known about as well as an entry of mass scale² / 12.
                octave = min(_exponent(mass / scale) + 3, REST_OCTAVES)
                if octave > 0:
                    context = TAIL_STEPS - 1 + octave
                    expected = np.int64(np.rint((1.0 - np.sqrt(mass)) * (2.0 / scale)))
        contexts_N[t] = context
        expected_N[t] = expected


@inlined
def _exponent(value: Scalar) -> Scalar:
    """⌊log2⌋ of a float64 above 2^−1022."""
    return (np.float64(value).view(np.int64) >> 52) - 1023


@compiled
def read_tails(
    numbers_N: Uint32Array, expected_N: Int64Array, max_level: int, levels_N: Int64Array
) -> int:
    """Level of each row's tail mass, −1 where there is none.

    Args:
        numbers_N: The tails' numbers.
        expected_N: Level that each is expected at.
        max_level: Largest level allowed.
        levels_N: Filled.

    Returns:
        The highest one; −2 when one is out of range.
    """
    highest = np.int64(-1)
    lowest = np.int64(0)
    for t in range(numbers_N.size):
        number = np.int64(numbers_N[t])
        zigzag = number - 1
        level = expected_N[t] + ((zigzag >> 1) ^ -(zigzag & 1))
        level = level if number > 0 else np.int64(-1)
        lowest = min(lowest, level if number > 0 else np.int64(0))
        highest = max(highest, level)
        levels_N[t] = level
    return highest if lowest >= 0 and highest <= max_level else -2


@compiled
def pick_sampled(
    sampled_index_N: Uint32Array, loose: Float32Array, logprobs_NK: Float32Array, out_N: Float32Array
) -> None:
    """Logprob of each sampled token: its entry's, or the next loose one where it has none (index 0)."""
    next_loose = 0
    for t in range(sampled_index_N.size):
        index = np.int64(sampled_index_N[t])
        if index > 0:
            out_N[t] = logprobs_NK[t, index - 1]
        else:
            out_N[t] = loose[next_loose]
            next_loose += 1


@compiled
def exponentials(values: Float64Array) -> Float64Array:
    """e^x of values up to 1, the same to the bit on every machine."""
    results = np.empty_like(values)
    for index in range(values.size):
        results[index] = _exponential(values[index])
    return results


@compiled
def predict_tails(logprobs_NK: Float32Array, kept_N: Uint32Array, tails_N: Float32Array) -> None:
    """Fill in 1 − Σ p of each row, at least 0, the same to the bit on every machine.

    Sums and products of float64, in this order and never fused: library exponentials differ between
    machines.
    """
    for t in range(kept_N.size):
        rest = 1.0
        for i in range(np.int64(kept_N[t])):
            rest -= _exponential(np.float64(logprobs_NK[t, i]))
        tails_N[t] = max(rest, 0.0)


@inlined
def _exponential(x: Scalar) -> Scalar:
    """e^x to about 1e-15, 0 below −700: e^x = 2^n · e^r, |r| ≤ ln 2 / 2, and Taylor's polynomial for e^r.

    A logprob above 1, or NaN, has some value here: blocks with such are refused by others.
    """
    bounded = min(x, 1.0) if x >= -700.0 else 0.0
    n = np.rint(bounded * 1.4426950408889634)
    r = (bounded - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    result = 0.0
    for term in range(13, -1, -1):
        result = result * r + _RECIPROCAL_FACTORIALS[term]
    result *= _POWERS_OF_TWO[np.int64(n) + _LOWEST_POWER]
    return result if x >= -700.0 else 0.0
