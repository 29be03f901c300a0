"""Token codes, compiled: entries named by the lists of what goes with the tokens around them.

What is named here is looked up in `lynearm.wire.row_kernels`, from lists that grow alike.

Shape legend: N = positions of a block, K = entries of the widest row, V = vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import (
    COMPANION_START,
    GROWN_PLACES,
    LIST_PLACES,
    RANK_START,
    RECENT_START,
    RECENT_WINDOW,
    REFRESH_DISTANCE,
)
from lynearm.wire.jit import Scalar, address_of, compiled, inlined, load32, load64, store32, store64
from lynearm.wire.list_kernels import find_list, grow_lists

Int32Array = npt.NDArray[np.int32]
Uint32Array = npt.NDArray[np.uint32]

U64 = np.uint64

AS_SAMPLED = -2
"""In place of the token before a position: the one that was sampled at the position before."""

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
            list_at, size = find_list(
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
        list_at, size = find_list(
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
