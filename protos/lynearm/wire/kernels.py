"""The codec's inner loops, compiled: token codes, symbols and bits, in both directions.

Nothing here allocates by a number that a block claims, and every read stays inside what the caller says is
there: `positions` checks sizes before it calls.

Shape legend: N = positions of a block, K = entries of the widest row, V = vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import (
    COMPANION_START,
    ENTRY_STATES,
    GROWN_PLACES,
    LIST_PLACES,
    LISTS_USED,
    LONG_STEP,
    NEAR_SYMBOLS,
    NUMBER_ESCAPE,
    NUMBER_WIDTHS,
    RANK_START,
    RECENT_START,
    RECENT_WINDOW,
    REFRESH_DISTANCE,
    RUN_BITS,
    STATE_RUNS,
    STEP_BASES,
    STEP_CLASSES,
    STEP_ESCAPE,
    STEP_WIDTHS,
    SYMBOL_BITS,
    TOKEN_CLASSES,
    gap_symbol,
    next_state,
    number_symbol,
    token_symbol,
)
from lynearm.wire.jit import (
    Scalar,
    address_of,
    compiled,
    highest_bit,
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

RECENT_RING = 4096
"""Power of two, at least the window and the entries that one row adds."""

AS_SAMPLED = -2
"""In place of the token before a position: the one that was sampled at the position before."""

LEVEL_DIGITS = 7
"""Most binary digits of a level that contexts tell apart."""

_CODE_MASK = U64((1 << MAX_CODE_LENGTH) - 1)

_LATE_RANK = 8
"""From there on, a long step is rare enough to guess that there is none."""

_SHORT_SORT = 128
"""Up to so many entries are sorted by counting."""

_CODE_BITS = 21
"""Of a token code: ranks are below 2^20."""

_NEVER = -1
_NEVER_NAMED = U64(1 << 31)
_NEVER_LISTED = U64(0xFFFFFFFF)
_NAMED = U64(1 << 31)

_MARK_BITS = 8
"""Of a code in one of the two lists; the row before it stays below `_NAMED`, since there are 2^23 at most."""

LONG_STEP_CONTEXTS = 8

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
    state_V2: Uint32Array,
    token_codes_NK: Uint32Array,
    sampled_index_N: Uint32Array,
) -> np.int64:
    """Sort each row by (level, token code), in place, and find the sampled token in it.

    Args:
        levels_NK: Levels; made non-decreasing along each row.
        token_ids_NK: Token ids, each in 0..V − 1; reordered with their entries.
        kept_N: How many entries of each row count.
        rank_of_V: Rank of each token in the vocabulary's order.
        list_rows_V2: Rows of `lists` that hold each token's followers and companions; 0: none. Used up.
        lists: Tokens, shape [rows, LIST_PLACES]; row 0 is empty.
        list_sizes: Tokens of each list, shape [rows].
        grown: Room for the lists that the block grows, shape [n + 1, GROWN_PLACES]; n = 0: a list is the last
            row, and is looked up there.
        grown_sizes: Their sizes, shape [n].
        previous_N: Token before each position; −1 for none.
        sampled_ids_N: Sampled tokens.
        state_V2: To work in, shape [V, 2]. Where a token stands in the list of recent ones, or its rank and
            `_NEVER_NAMED`; the latest row in whose lists it was and its code there, or the latest row that
            named it and `_NAMED`. Side by side, since they are asked for together. The caller's: see
            `read_rows`.
        token_codes_NK: Filled.
        sampled_index_N: Filled with 1 + index of the sampled token's entry, 0 when it is not there.

    Returns:
        −1, or the number of a row that holds one token twice.
    """
    state_at, rank_at, list_rows_at = address_of(state_V2), address_of(rank_of_V), address_of(list_rows_V2)
    ids_at, lists_at, sizes_at = address_of(token_ids_NK), address_of(lists), address_of(list_sizes)
    grows = grown_sizes.size > 0
    latest_at = address_of(grown) if grows else ids_at
    latest_sizes_at = address_of(grown_sizes) if grows else address_of(kept_N)
    latest_width = U64(GROWN_PLACES) if grows else U64(token_ids_NK.shape[1])
    skipped = U64(0) if grows else U64(1)
    vocab_size = U64(rank_of_V.size)
    # The list begins with the commonest tokens, the commonest nearest.
    head = min(vocab_size, U64(RECENT_WINDOW))
    for index in range(vocab_size):
        rank = U64(rank_of_V[index])
        state_V2[index, 0] = head - U64(1) - rank if rank < head else _NEVER_NAMED | rank
        state_V2[index, 1] = _NEVER_LISTED
    codes = np.empty(token_ids_NK.shape[1], np.uint32)
    keys = np.empty(_up_to_four(U64(token_ids_NK.shape[1])), np.uint32)
    places = np.empty(keys.size, np.uint32)
    lists_grown = 0
    stamps_V = np.full(rank_of_V.size if grows else 0, _NEVER, np.int32)
    for t in range(U64(0), U64(kept_N.size)):
        kept = U64(kept_N[t])
        sampled_index_N[t] = 0
        if kept == U64(0):
            continue
        previous_at = U64(0)
        if 0 <= previous_N[t] < list_rows_V2.shape[0]:
            previous_at = list_rows_at + U64(previous_N[t]) * U64(8)
            list_at, size = _find_list(
                load32(previous_at), U64(0), latest_at, latest_width, latest_sizes_at, lists_at, sizes_at
            )
            _mark_followers(list_at, size, t, state_at)
        # By the number of its level in the row, and by its token code, an entry finds its place.
        keys[0] = 0
        for i in range(U64(1), kept):
            level, before = levels_NK[t, i], levels_NK[t, i - U64(1)]
            levels_NK[t, i] = max(level, before)
            keys[i] = keys[i - U64(1)] + (U64(level > before) << U64(_CODE_BITS))
        first_code, first, end = U64(1 << 32), U64(0), U64(0)
        while end < kept and keys[end] == 0:
            entry = U64(token_ids_NK[t, end])
            code = _token_code(entry, t, head, rank_at, state_at)
            codes[end] = code
            first = entry if code < first_code else first
            first_code = min(code, first_code)
            end += U64(1)
        # From here on, the row's first token is known.
        first_at = list_rows_at + first * U64(8) + U64(4)
        list_row = load32(first_at)
        list_at, size = _find_list(
            list_row, skipped, latest_at, latest_width, latest_sizes_at, lists_at, sizes_at
        )
        _mark_companions(list_at, size, t, state_at)
        for i in range(end, kept):
            codes[i] = _token_code(U64(token_ids_NK[t, i]), t, head, rank_at, state_at)
        for i in range(kept):
            keys[i] |= codes[i]
        if not _find_places(keys, places, kept):
            return np.int64(t)
        for i in range(kept):
            place = U64(places[i])
            token_codes_NK[t, place] = codes[i]
            keys[place] = token_ids_NK[t, i]
        # The likeliest enters the recent list last, so that it lies nearest.
        sampled_index = U64(0)
        sampled = U64(sampled_ids_N[t])
        for back in range(U64(1), kept + U64(1)):
            last = kept - back
            code = U64(token_codes_NK[t, last])
            token = U64(keys[last])
            token_ids_NK[t, last] = token
            state = load64(state_at + (token << U64(3)))
            if state >> U64(32) == _NAMED | t:
                return np.int64(t)
            sampled_index = last + U64(1) if token == sampled else sampled_index
            # Without a branch: whether an entry lies near is hard to guess. Unsigned: places in lists wrap
            # round to the largest numbers, and enter too.
            enters = U64(code - U64(RECENT_START) >= U64(REFRESH_DISTANCE))
            stands = head if enters else state & U64(0xFFFFFFFF)
            store64(state_at + (token << U64(3)), stands | (_NAMED | t) << U64(32))
            head += enters
        sampled_index_N[t] = sampled_index
        if grows:
            lists_grown = grow_lists(
                np.int64(t),
                np.int64(previous_N[t]),
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
            continue
        this_row = U64(0xFFFFFFFF) - t
        if previous_at:
            store32(previous_at, this_row)
        # A dictionary's companions are the better ones.
        store32(first_at, this_row if list_row - U64(1) >= U64(0x7FFFFFFF) else list_row)
    return np.int64(-1)


@inlined
def _up_to_four(size: Scalar) -> Scalar:
    """The next multiple of four."""
    return (size + U64(3)) & ~U64(3)


@compiled
def _find_places(keys: Uint32Array, places: Uint32Array, size: Scalar) -> bool:
    """Where each of the first keys stands in ascending order; whether they are all different.

    Both arrays are used up to a multiple of four.
    """
    if size > U64(_SHORT_SORT):
        order = np.argsort(keys[:size])
        for place in range(size):
            places[order[place]] = place
            if place and keys[order[place]] == keys[order[place - U64(1)]]:
                return False
        return True
    # Every key is compared with every other one: quadratic, but many at a time, without a branch to guess.
    for i in range(size, _up_to_four(size)):
        keys[i] = 0xFFFFFFFF
    for i in range(U64(0), size, U64(4)):
        key0, key1, key2, key3 = keys[i], keys[i + U64(1)], keys[i + U64(2)], keys[i + U64(3)]
        below0 = below1 = below2 = below3 = np.uint32(0)
        for j in range(size):
            key = keys[j]
            below0 = np.uint32(below0 + np.uint32(key < key0))
            below1 = np.uint32(below1 + np.uint32(key < key1))
            below2 = np.uint32(below2 + np.uint32(key < key2))
            below3 = np.uint32(below3 + np.uint32(key < key3))
        places[i], places[i + U64(1)] = below0, below1
        places[i + U64(2)], places[i + U64(3)] = below2, below3
    total = U64(0)
    for i in range(size):
        total += U64(places[i])
    # Equal keys get one place, the lowest.
    return bool(U64(2) * total == size * (size - U64(1)))


@inlined
def _token_code(token: Scalar, t: Scalar, head: Scalar, rank_at: Scalar, state_at: Scalar) -> Scalar:
    """The smallest of a token's places and its distance, a place before an equal distance; or its rank."""
    state = load64(state_at + (token << U64(3)))
    last, mark = state & U64(0xFFFFFFFF), state >> U64(32)
    distance = head - U64(1) - last
    code = U64(RECENT_START) + distance
    if distance >= U64(RECENT_WINDOW):
        code = U64(RANK_START) + (last ^ _NEVER_NAMED)
        if last < _NEVER_NAMED:
            code = U64(RANK_START) + load32(rank_at + (token << U64(2)))
    # An equal distance is the larger code.
    is_near = (mark & U64(LIST_PLACES - 1)) + U64(RECENT_START) <= code
    return mark & U64(RECENT_START - 1) if (mark >> U64(_MARK_BITS) == t) & is_near else code


@inlined
def _mark_followers(list_at: Scalar, size: Scalar, t: Scalar, state_at: Scalar) -> None:
    """Note the places of a list's tokens for row t."""
    for place in range(size):
        token = load32(list_at + (place << U64(2)))
        store32(state_at + (token << U64(3)) + U64(4), t << U64(_MARK_BITS) | place)


@inlined
def _mark_companions(list_at: Scalar, size: Scalar, t: Scalar, state_at: Scalar) -> None:
    """The same; but a follower stays one, unless its place is the larger number."""
    for place in range(size):
        mark_at = state_at + (load32(list_at + (place << U64(2))) << U64(3)) + U64(4)
        old = load32(mark_at)
        stays = (old >> U64(_MARK_BITS) == t) & (old & U64(LIST_PLACES - 1) <= place)
        store32(mark_at, old if stays else t << U64(_MARK_BITS) | U64(COMPANION_START) | place)


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
    once, and what lies behind `GROWN_PLACES` is dropped.

    Args:
        t: Number of the row, which has entries.
        previous: Token before it.
        token_ids_NK: Its tokens; those outside 0..V − 1 are left out.
        kept: Its entries.
        list_rows_V2: As for `assign_token_codes`; −1 − i: grown list i.
        lists: As for `assign_token_codes`.
        list_sizes: As for `assign_token_codes`.
        grown: The grown lists, and a row to work in, shape [n + 1, GROWN_PLACES].
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
        if (old >= 0 and count == work) or (kind == 1 and old_size >= GROWN_PLACES):
            continue
        size = 0
        for part in range(2):
            is_row = part == kind
            for i in range(kept - kind if is_row else old_size):
                if size == GROWN_PLACES:
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
    return min(level >> level_shift, U64(LONG_STEP_CONTEXTS - 1))


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
    for t in range(U64(0), U64(kept_N.size)):
        previous_code, previous_level, state = U64(0), U64(0), U64(0)
        for i in range(U64(0), U64(kept_N[t])):
            code, level = U64(token_codes_NK[t, i]), U64(levels_NK[t, i])
            step = level - previous_level if i else U64(0)
            is_gap = U64(step == U64(0)) & U64(i > U64(0))
            # Without a branch on what is as likely as not: gaps and token codes are named by one table.
            value = code - previous_code - U64(1) if is_gap else code
            if value < U64(RANK_START):
                symbol = U64(NEAR_SYMBOLS[is_gap, value])
            else:
                symbol = U64(gap_symbol(np.int64(value)) if is_gap else token_symbol(0, np.int64(value)))
            symbol += U64(0) if is_gap else min(step, U64(LONG_STEP)) * U64(TOKEN_CLASSES)
            context = U64(bucket_of_rank[i]) * U64(ENTRY_STATES) + state
            symbols_NK[t, i] = context << U64(SYMBOL_BITS) | symbol
            open_bits_NK[t, i] = value - U64(STEP_BASES[symbol])
            counts[context, symbol] += 1
            if step >= U64(LONG_STEP):
                step_context = _step_context(previous_level, U64(level_shift))
                step_counts[step_context, number_symbol(np.int64(step) - LONG_STEP)] += 1
            previous_code = code
            previous_level = level
            state = next_state(state, code, U64(LISTS_USED))


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
        out: Has room for 43 bits a number, and for eight bytes more.
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
        start: Bit at which to begin.
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
    at, waiting, count = address_of(out) + (U64(start) >> U64(3)), U64(0), U64(start) & U64(7)
    waiting = load8(at) & ((U64(1) << count) - U64(1))
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
                context = _step_context(U64(level), U64(level_shift))
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
        tables: Shape [tables · 2^10]: bits in all, length << 6, base << 10.
        numbers: Filled, shape [n].

    Returns:
        The bit behind the last; −1 when a code is not in its table or the stream ends before.
    """
    stream_at, tables_at = address_of(stream), address_of(tables)
    position, end = U64(bit), U64(end_bit)
    for index in range(numbers.size):
        position, number, bad = read_number(stream_at, position, tables_at, U64(contexts[index]))
        if (position > end) | bad:
            return -1
        numbers[index] = number
    # Of int64 and uint64, numba would make a float.
    return int(np.int64(position))


@compiled
def read_numbers_by_level(
    stream: Uint8Array,
    bit: int,
    end_bit: int,
    first_context: int,
    levels: Uint32Array,
    tables: Uint64Array,
    numbers: Uint32Array,
) -> int:
    """As `read_numbers`, where the binary digits of a level each, at most 7, are added to one context."""
    stream_at, tables_at = address_of(stream), address_of(tables)
    position, end = U64(bit), U64(end_bit)
    for index in range(numbers.size):
        digits = min(highest_bit(np.int64(levels[index]) << 1 | 1), LEVEL_DIGITS)
        position, number, bad = read_number(stream_at, position, tables_at, U64(first_context + digits))
        if (position > end) | bad:
            return -1
        numbers[index] = number
    return int(np.int64(position))


@inlined
def read_number(
    stream_at: Scalar, position: Scalar, tables_at: Scalar, context: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """One number: the bit behind it, the number, and whether its code is not in the table of its context."""
    word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
    entry = load64(tables_at + (((context << U64(MAX_CODE_LENGTH)) + (word & _CODE_MASK)) << U64(3)))
    total = entry & U64(63)
    open_bits = (word & ((U64(1) << total) - U64(1))) >> ((entry >> U64(6)) & U64(15))
    number = (entry >> U64(10)) + open_bits
    return position + total, number, entry >> U64(42) > U64(0)


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
    costs less than to guess wrong, which undoes the work of four rows. The mask is loaded, too, since LLVM
    makes a branch of one that is computed.
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
    """As `_read_entry`, where long steps are rare: one test finds them and the escapes, also long."""
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
        load32(plain_at + U64(8 * STEP_CLASSES) + (symbol << U64(2))),
        load64(stream_at + (position >> U64(3))) >> (position & U64(7)),
    )


@compiled
def read_rows(
    stream: Uint8Array,
    positions: Uint64Array,
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
        positions: First bit of each lane, one or four; moved behind its last.
        ends: Bit behind each lane's last byte.
        kept_N: Entries of each row.
        first_levels_N: Level of each row's first entry.
        table: Decoding tables of the entries, as in `_step_entries`.
        bucket_stride: Bytes from one bucket's tables to the next one's.
        states: Where the tables of a state are, in bytes from those of state 0, which is how a state is known
            here: behind a token code of so many 64s, in a row that has named no other, shape [`STATE_RUNS`].
        remembered: Bits of such a number that stay along a row.
        plain: Masks by step, of two elements each: all ones for a long step, else zeros. Behind them elements
            for symbols without a code, length 0, shape [2^SYMBOL_BITS].
        long_steps: Decoding tables of long steps, shape [LONG_STEP_CONTEXTS · 2^10].
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
        Whether all codes were in their tables, all token codes and levels in their ranges, and no lane went
        beyond its end.
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
    latest_width = U64(GROWN_PLACES) if grows else width
    lanes = U64(positions.size)
    count = U64(kept_N.size)
    highest = U64(max_level)
    bad = U64(0)
    states_at, kept_bits = address_of(states), U64(remembered)
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
                s0, s1 = (
                    _next_tables(s0, c0, kept_bits, states_at),
                    _next_tables(s1, c1, kept_bits, states_at),
                )
                s2, s3 = (
                    _next_tables(s2, c2, kept_bits, states_at),
                    _next_tables(s3, c3, kept_bits, states_at),
                )
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
                s0, s1 = (
                    _next_tables(s0, c0, kept_bits, states_at),
                    _next_tables(s1, c1, kept_bits, states_at),
                )
                s2, s3 = (
                    _next_tables(s2, c2, kept_bits, states_at),
                    _next_tables(s3, c3, kept_bits, states_at),
                )
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
    return bool(bad == U64(0) and highest_code <= last_rank + U64(RANK_START))


@inlined
def _put_entry(code_at: Scalar, to_levels: Scalar, code: Scalar, level: Scalar) -> None:
    store32(code_at, code)
    store32(code_at + to_levels, level)


@inlined
def _next_tables(state: Scalar, token_code: Scalar, remembered: Scalar, states_at: Scalar) -> Scalar:
    """`next_state`, where states are offsets of tables."""
    step = min(token_code >> U64(RUN_BITS), U64(STATE_RUNS - 1))
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
