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
    FOLLOWERS,
    LONG_STEP,
    NUMBER_ESCAPE,
    NUMBER_WIDTHS,
    RANK_START,
    RECENT_WINDOW,
    REFRESH_DISTANCE,
    STEP_ESCAPE,
    STEP_WIDTHS,
    TOKEN_OCTAVES,
    gap_symbol,
    number_symbol,
    token_octave,
    token_open_value,
    token_symbol,
)
from lynearm.wire.jit import Scalar, address_of, compiled, inlined, load8, load32, load64, store32, store64
from lynearm.wire.prefix_codes import MAX_CODE_LENGTH

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Uint8Array = npt.NDArray[np.uint8]
Uint16Array = npt.NDArray[np.uint16]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]

U64 = np.uint64

LOOKAHEAD_BYTES = 16
"""What must be readable behind the last bit of a stream while one entry is read."""

MAX_ENTRY_BITS = 2 * MAX_CODE_LENGTH + 8 + 20 + 32
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

_LATE_RANK = 16
"""From there on, a long step is rare enough to guess that there is none."""

_SHORT_SORT = 24
"""Up to so many entries of one level are sorted by counting."""

_NEVER = -1


@compiled
def assign_token_codes(
    levels_NK: Uint32Array,
    token_ids_NK: Int32Array,
    kept_N: Uint32Array,
    rank_of_V: Int32Array,
    list_of_V: Int32Array,
    followers: Int32Array,
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
        list_of_V: Row of `followers` for each token; empty where there are no lists.
        followers: Tokens that often follow, −1 where a list ends, shape [lists, FOLLOWERS].
        previous_N: Token before each position; −1 for none.
        sampled_ids_N: Sampled tokens.
        token_codes_NK: Filled.
        sampled_index_N: Filled with 1 + index of the sampled token's entry, 0 when it is not there.

    Returns:
        −1, or the number of a row that holds one token twice.
    """
    # Side by side, since a token's four are asked for together: where it stands in the list of recent ones,
    # the row that named it last, the row and place where it was a follower last, and its rank.
    state_V4 = np.full((rank_of_V.size, 4), _NEVER, np.int32)
    state_V4[:, 3] = rank_of_V
    keys = np.empty(token_ids_NK.shape[1], np.int64)
    ordered = np.empty(token_ids_NK.shape[1], np.int64)
    # The list begins with the commonest tokens, the commonest nearest.
    head = min(rank_of_V.size, RECENT_WINDOW)
    for token in range(rank_of_V.size):
        if rank_of_V[token] < head:
            state_V4[token, 0] = head - 1 - rank_of_V[token]
    for t in range(kept_N.size):
        kept = np.int64(kept_N[t])
        previous = previous_N[t]
        if 0 <= previous < list_of_V.size:
            for place in range(FOLLOWERS):
                token = followers[list_of_V[previous], place]
                if token < 0:
                    break
                state_V4[token, 2] = t * FOLLOWERS + place
        for i in range(kept):
            token = token_ids_NK[t, i]
            if state_V4[token, 1] == t:
                return t
            state_V4[token, 1] = t
            last = state_V4[token, 0]
            distance = head - 1 - last
            is_recent = last >= 0 and distance < RECENT_WINDOW
            code = FOLLOWERS + distance if is_recent else RANK_START + state_V4[token, 3]
            # The smaller number is the likelier; a follower's place says more than a distance.
            place = state_V4[token, 2] - t * FOLLOWERS
            if place >= 0 and (not is_recent or place <= distance):
                code = place
            keys[i] = np.int64(code) << 20 | token
            if i and levels_NK[t, i] < levels_NK[t, i - 1]:
                levels_NK[t, i] = levels_NK[t, i - 1]
        start = 0
        while start < kept:
            end = start + 1
            while end < kept and levels_NK[t, end] == levels_NK[t, start]:
                end += 1
            if end - start > _SHORT_SORT:
                ordered[start:end] = np.sort(keys[start:end])
            else:
                # Every entry counts the smaller ones: quadratic, but without a branch to guess.
                for i in range(start, end):
                    key = keys[i]
                    place = start
                    for j in range(start, end):
                        place += keys[j] < key
                    ordered[place] = key
            start = end
        sampled_index_N[t] = 0
        # The likeliest enters the recent list last, so that it lies nearest.
        for i in range(kept - 1, -1, -1):
            code = ordered[i] >> 20
            token = ordered[i] & 0xFFFFF
            token_codes_NK[t, i] = code
            token_ids_NK[t, i] = token
            if token == sampled_ids_N[t]:
                sampled_index_N[t] = i + 1
            if not FOLLOWERS <= code < FOLLOWERS + REFRESH_DISTANCE:
                state_V4[token, 0] = head
                head += 1
    return -1


@compiled
def name_entries(
    levels_NK: Uint32Array,
    token_codes_NK: Uint32Array,
    kept_N: Uint32Array,
    bucket_of_rank: Uint8Array,
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
        symbols_NK: Filled with context · 256 + symbol.
        open_bits_NK: Filled with what the symbol leaves open.
        counts: Adds to shape [contexts, STEP_SYMBOLS + 1].
        step_counts: Adds the symbols of long steps to shape [buckets, NUMBER_SYMBOLS + 1].
    """
    for t in range(kept_N.size):
        previous_code = np.int64(-1)
        previous_level = np.int64(0)
        octave = np.int64(0)
        for i in range(np.int64(kept_N[t])):
            code = np.int64(token_codes_NK[t, i])
            step = np.int64(levels_NK[t, i]) - previous_level
            bucket = np.int64(bucket_of_rank[i])
            context = bucket * TOKEN_OCTAVES + octave
            if step == 0 and i > 0:
                value = code - previous_code - 1
                symbol = gap_symbol(value)
            else:
                value = token_open_value(code)
                symbol = token_symbol(step, code)
            symbols_NK[t, i] = context * 256 + symbol
            open_bits_NK[t, i] = value & ((1 << np.int64(STEP_WIDTHS[symbol])) - 1)
            counts[context, symbol] += 1
            if step >= LONG_STEP:
                step_counts[bucket, number_symbol(step - LONG_STEP)] += 1
            previous_code = code
            previous_level += step
            octave = np.int64(token_octave(U64(code)))


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
    bucket_of_rank: Uint8Array,
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
        bucket_of_rank: Shape [≥ K].
        codes: Code and length · 65536 of each symbol in each context, 0 for none.
        step_codes: The same for long steps, by bucket.

    Returns:
        The bit behind the last.
    """
    step_codes_at, widths_at = address_of(step_codes), address_of(NUMBER_WIDTHS)
    at, waiting, count = address_of(out) + (U64(start) >> U64(3)), U64(0), U64(0)
    for t in range(first_row, kept_N.size, lanes):
        level = np.int64(0)
        for i in range(np.int64(kept_N[t])):
            context = U64(symbols_NK[t, i]) >> U64(8)
            symbol = U64(symbols_NK[t, i]) & U64(0xFF)
            code = U64(codes[context, symbol])
            width = U64(STEP_WIDTHS[symbol])
            value = U64(open_bits_NK[t, i])
            if code == U64(0):
                code = U64(codes[context, STEP_ESCAPE])
                value = value << U64(8) | symbol
                width += U64(8)
            length = code >> U64(16)
            at, waiting, count = _put(
                at, waiting, count, (code & U64(0xFFFF)) | (value << length), length + width
            )
            step = np.int64(levels_NK[t, i]) - level
            level += step
            if step >= LONG_STEP:
                bucket_at = step_codes_at + U64(bucket_of_rank[i]) * U64(4 * (NUMBER_ESCAPE + 1))
                at, waiting, count = _put_number(at, waiting, count, step - LONG_STEP, bucket_at, widths_at)
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
    previous: Scalar,
    level: Scalar,
) -> tuple[Scalar, Scalar, Scalar]:
    """One entry: the bit behind it, its token code, and its level.

    Where no code fits, tables hold a token code, or a step, that no block may have: that is noticed later.

    Whether a step is long is a coin's toss for a row's first entries: to look up a number that is not there
    costs less than to guess wrong, which undoes the work of four rows.
    """
    position, code, step, word = _read_symbol(stream_at, position, table_at, plain_at, previous)
    is_long = U64(step == U64(LONG_STEP))
    number = load64(long_steps_at + ((word & _CODE_MASK) << U64(3))) & (U64(0) - is_long)
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
    previous: Scalar,
    level: Scalar,
) -> tuple[Scalar, Scalar, Scalar]:
    """As `_read_entry`, where long steps are rare."""
    position, code, step, word = _read_symbol(stream_at, position, table_at, plain_at, previous)
    if step == U64(LONG_STEP):
        number = load64(long_steps_at + ((word & _CODE_MASK) << U64(3)))
        total = number & U64(63)
        word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
        step += (number >> U64(10)) + (
            (word & ((U64(1) << total) - U64(1))) >> ((number >> U64(6)) & U64(15))
        )
        position += total
    return position, code, level + step


@inlined
def _read_symbol(
    stream_at: Scalar, position: Scalar, table_at: Scalar, plain_at: Scalar, previous: Scalar
) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """An entry's symbol: the bit behind it, its token code, its step, and at least 27 of the bits behind."""
    word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
    entry = load32(table_at + ((word & _CODE_MASK) << U64(2)))
    total = entry & U64(31)
    if total == U64(STEP_ESCAPE_TOTAL):
        length = (entry >> U64(5)) & U64(15)
        symbol = (word >> length) & U64(255)
        position += length + U64(8)
        entry = load32(plain_at + (symbol << U64(2)))
        word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
        total = entry & U64(31)
    step = (entry >> U64(9)) & U64(3)
    code = (entry >> U64(11)) + ((word & ((U64(1) << total) - U64(1))) >> ((entry >> U64(5)) & U64(15)))
    code += previous if step == U64(0) else U64(0)
    return position + total, code, step, word >> total


@compiled
def read_rows(
    stream: Uint8Array,
    starts: Uint64Array,
    ends: Uint64Array,
    kept_N: Uint32Array,
    table: Uint32Array,
    bucket_stride: int,
    octave_stride: int,
    plain: Uint32Array,
    long_steps: Uint64Array,
    bucket_of_rank: Uint8Array,
    token_of_rank_V: Int32Array,
    list_of_V: Int32Array,
    followers: Int32Array,
    first_previous_N: Int32Array,
    sampled_index_N: Uint32Array,
    outside_ids: Int32Array,
    max_level: int,
    scratch: Uint64Array,
    recent: Int32Array,
    token_ids_NK: Int32Array,
    levels_NK: Uint32Array,
    sampled_ids_N: Int32Array,
) -> bool:
    """Read rows that `write_rows` wrote into 1 or 4 lanes.

    Four rows are read side by side, since one row alone waits for its own table look-ups. What is wrong is
    noted, and reading goes on inside the bounds.

    Args:
        stream: Readable behind every end for `LOOKAHEAD_BYTES` plus K times `MAX_ENTRY_BITS`.
        starts: Bit at which each lane begins, shape [lanes].
        ends: Bit at which each lane ends, shape [lanes].
        kept_N: Entries of each row.
        table: Decoding tables: bits in all, length << 5, step << 9, base << 11.
        bucket_stride: Bytes from one rank bucket's tables to the next one's.
        octave_stride: Bytes from one token octave's table to the next one's.
        plain: Elements for symbols without a code, length 0, shape [256].
        long_steps: Decoding tables of long steps, by bucket.
        bucket_of_rank: Shape [≥ K].
        token_of_rank_V: The vocabulary's order.
        list_of_V: As for `assign_token_codes`.
        followers: As for `assign_token_codes`; its first list is empty.
        first_previous_N: Token before each position; −1 for none, `AS_SAMPLED` for the position before's.
        sampled_index_N: 1 + index of the sampled token's entry; 0: the next of `outside_ids`.
        outside_ids: Sampled tokens that have no entry.
        max_level: Largest level allowed.
        scratch: For token code and level of the entries of four rows, shape [≥ 4 K]. The caller's, as the
            next: numba frees an array of a compiled function's own after its last use by name, which is
            not its last use by address.
        recent: For the list of recent tokens, shape [`RECENT_RING`].
        token_ids_NK: Filled; 0 where a row keeps less than K entries.
        levels_NK: Filled where there are entries.
        sampled_ids_N: Filled.

    Returns:
        Whether every row was there, and nothing beside them.
    """
    stream_at, table_at = address_of(stream), address_of(table)
    plain_at, long_steps_at = address_of(plain), address_of(long_steps)
    by_bucket, by_octave = U64(bucket_stride), U64(octave_stride)
    width = U64(token_ids_NK.shape[1])
    scratch_at, recent_at = address_of(scratch), address_of(recent)
    ids_at, levels_at = address_of(token_ids_NK), address_of(levels_NK)
    lanes = U64(starts.size)
    count = U64(kept_N.size)
    highest = U64(max_level)
    bad = U64(0)
    positions = starts.copy()
    codes = np.zeros(4, np.uint64)
    levels = np.zeros(4, np.uint64)
    head = U64(min(token_of_rank_V.size, RECENT_WINDOW))
    for rank in range(U64(0), head):
        recent[head - U64(1) - rank] = token_of_rank_V[rank]
    highest_code = U64(0)
    sampled = np.int32(-1)
    outside = U64(0)
    signs = U64(0)
    last_rank = U64(token_of_rank_V.size - 1)
    t = U64(0)
    while t < count:
        abreast = min(lanes, count - t)
        done = U64(0)
        if abreast == U64(4):
            p0, p1, p2, p3 = positions[0], positions[1], positions[2], positions[3]
            c0 = c1 = c2 = c3 = U64(0)
            l0 = l1 = l2 = l3 = U64(0)
            o0 = o1 = o2 = o3 = U64(0)
            done = U64(min(kept_N[t], kept_N[t + U64(1)], kept_N[t + U64(2)], kept_N[t + U64(3)]))
            early = min(done, U64(_LATE_RANK))
            for i in range(U64(0), early):
                bucket = U64(bucket_of_rank[i])
                context_at = table_at + bucket * by_bucket
                steps_at = long_steps_at + (bucket << U64(MAX_CODE_LENGTH + 3))
                p0, c0, l0 = _read_entry(
                    stream_at, p0, context_at + o0 * by_octave, plain_at, steps_at, c0, l0
                )
                p1, c1, l1 = _read_entry(
                    stream_at, p1, context_at + o1 * by_octave, plain_at, steps_at, c1, l1
                )
                p2, c2, l2 = _read_entry(
                    stream_at, p2, context_at + o2 * by_octave, plain_at, steps_at, c2, l2
                )
                p3, c3, l3 = _read_entry(
                    stream_at, p3, context_at + o3 * by_octave, plain_at, steps_at, c3, l3
                )
                o0, o1, o2, o3 = token_octave(c0), token_octave(c1), token_octave(c2), token_octave(c3)
                rank_at = scratch_at + (i << U64(5))
                store64(rank_at, c0 | (l0 << U64(32)))
                store64(rank_at + U64(8), c1 | (l1 << U64(32)))
                store64(rank_at + U64(16), c2 | (l2 << U64(32)))
                store64(rank_at + U64(24), c3 | (l3 << U64(32)))
            for i in range(early, done):
                bucket = U64(bucket_of_rank[i])
                context_at = table_at + bucket * by_bucket
                steps_at = long_steps_at + (bucket << U64(MAX_CODE_LENGTH + 3))
                p0, c0, l0 = _read_late_entry(
                    stream_at, p0, context_at + o0 * by_octave, plain_at, steps_at, c0, l0
                )
                p1, c1, l1 = _read_late_entry(
                    stream_at, p1, context_at + o1 * by_octave, plain_at, steps_at, c1, l1
                )
                p2, c2, l2 = _read_late_entry(
                    stream_at, p2, context_at + o2 * by_octave, plain_at, steps_at, c2, l2
                )
                p3, c3, l3 = _read_late_entry(
                    stream_at, p3, context_at + o3 * by_octave, plain_at, steps_at, c3, l3
                )
                o0, o1, o2, o3 = token_octave(c0), token_octave(c1), token_octave(c2), token_octave(c3)
                rank_at = scratch_at + (i << U64(5))
                store64(rank_at, c0 | (l0 << U64(32)))
                store64(rank_at + U64(8), c1 | (l1 << U64(32)))
                store64(rank_at + U64(16), c2 | (l2 << U64(32)))
                store64(rank_at + U64(24), c3 | (l3 << U64(32)))
            positions[0], positions[1], positions[2], positions[3] = p0, p1, p2, p3
            codes[0], codes[1], codes[2], codes[3] = c0, c1, c2, c3
            levels[0], levels[1], levels[2], levels[3] = l0, l1, l2, l3
        for lane in range(U64(0), abreast):
            kept = U64(kept_N[t + lane])
            position = positions[lane]
            code = codes[lane] if done else U64(0)
            level = levels[lane] if done else U64(0)
            octave = token_octave(code) if done else U64(0)
            lane_at = scratch_at + (lane << U64(3))
            for i in range(done, kept):
                bucket = U64(bucket_of_rank[i])
                position, code, level = _read_entry(
                    stream_at,
                    position,
                    table_at + bucket * by_bucket + octave * by_octave,
                    plain_at,
                    long_steps_at + (bucket << U64(MAX_CODE_LENGTH + 3)),
                    code,
                    level,
                )
                octave = token_octave(code)
                store64(lane_at + (i << U64(5)), code | (level << U64(32)))
            # Levels do not fall along a row, so that its last one is its highest.
            bad |= U64(level > highest) | U64(position > ends[lane])
            positions[lane] = min(position, ends[lane])
            # Distances are counted from the first token code that is one.
            newest = head - U64(1) + U64(FOLLOWERS)
            previous = first_previous_N[t + lane]
            previous = sampled if previous == AS_SAMPLED else previous
            list_row = U64(list_of_V[previous]) if 0 <= previous < list_of_V.size else U64(0)
            # How far back the list goes; less than the window only in a small vocabulary.
            available = min(head, U64(RECENT_WINDOW))
            if available < U64(RECENT_WINDOW):
                for i in range(U64(0), kept):
                    code = load64(lane_at + (i << U64(5))) & U64(0xFFFFFFFF)
                    bad |= U64(code < U64(RANK_START)) & U64(code >= available + U64(FOLLOWERS))
            row_at = (t + lane) * width * U64(4)
            for back in range(U64(1), kept + U64(1)):
                last = kept - back
                packed = load64(lane_at + (last << U64(5)))
                code = packed & U64(0xFFFFFFFF)
                highest_code = max(highest_code, code)
                again = U64(recent[(newest - code) & U64(RECENT_RING - 1)])
                rank = max(code, U64(RANK_START)) - U64(RANK_START)
                fresh = U64(token_of_rank_V[min(rank, last_rank)])
                follower = U64(followers[list_row, min(code, U64(FOLLOWERS - 1))])
                token = again if code < U64(RANK_START) else fresh
                token = follower if code < U64(FOLLOWERS) else token
                # A list that is too short yields −1, whose sign stays.
                signs |= token
                store32(ids_at + row_at + (last << U64(2)), token)
                store32(levels_at + row_at + (last << U64(2)), packed >> U64(32))
                store32(recent_at + ((head & U64(RECENT_RING - 1)) << U64(2)), token)
                # Unsigned: followers wrap round to the largest numbers, and enter too.
                head += U64(code - U64(FOLLOWERS) >= U64(REFRESH_DISTANCE))
            for i in range(kept, width):
                token_ids_NK[t + lane, i] = 0
            index = np.int64(sampled_index_N[t + lane])
            if index > 0:
                sampled = token_ids_NK[t + lane, index - 1]
            else:
                sampled = outside_ids[outside]
                outside += U64(1)
            sampled_ids_N[t + lane] = sampled
        t += abreast
    for lane in range(U64(0), lanes):
        bad |= U64((positions[lane] + U64(7)) >> U64(3) != ends[lane] >> U64(3))
    return bool(bad == U64(0) and signs >> U64(31) == U64(0) and highest_code <= last_rank + U64(RANK_START))


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
