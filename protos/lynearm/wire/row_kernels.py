"""Reading a block's rows, compiled: bits to levels, token codes and tokens.

Nothing here allocates by a number that a block claims, and every read stays inside what the caller says is
there: `positions` checks sizes before it calls.

Shape legend: N = positions of a block, K = entries of the widest row, V = vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import (
    COMPANION_START,
    GROWN_PLACES,
    RANK_START,
    RECENT_START,
    RECENT_WINDOW,
    REFRESH_DISTANCE,
    RUN_BITS,
    STATE_RUNS,
)
from lynearm.wire.entry_kernels import read_entry, read_late_entry
from lynearm.wire.jit import Scalar, address_of, compiled, inlined, load32, load64, store32
from lynearm.wire.list_kernels import find_list, grow_lists
from lynearm.wire.token_kernels import AS_SAMPLED

Int32Array = npt.NDArray[np.int32]
Uint8Array = npt.NDArray[np.uint8]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]

U64 = np.uint64

RECENT_RING = 4096
"""Power of two, at least the window and the entries that one row adds."""

_LATE_RANK = 8
"""From there on, a long step is rare enough to guess that there is none."""


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
                p0, c0, l0 = read_entry(
                    stream_at, p0, context_at + s0, plain_at, long_steps_at, shift, c0, l0
                )
                p1, c1, l1 = read_entry(
                    stream_at, p1, context_at + s1, plain_at, long_steps_at, shift, c1, l1
                )
                p2, c2, l2 = read_entry(
                    stream_at, p2, context_at + s2, plain_at, long_steps_at, shift, c2, l2
                )
                p3, c3, l3 = read_entry(
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
                p0, c0, l0 = read_late_entry(
                    stream_at, p0, context_at + s0, plain_at, long_steps_at, shift, c0, l0
                )
                p1, c1, l1 = read_late_entry(
                    stream_at, p1, context_at + s1, plain_at, long_steps_at, shift, c1, l1
                )
                p2, c2, l2 = read_late_entry(
                    stream_at, p2, context_at + s2, plain_at, long_steps_at, shift, c2, l2
                )
                p3, c3, l3 = read_late_entry(
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
                position, code, level = read_entry(
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
            followers_at, followers = find_list(
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
                companions_at, companions = find_list(
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
