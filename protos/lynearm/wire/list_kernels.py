"""Lists of followers and companions, compiled: found, and grown by the rows of a block.

Shape legend: N = positions of a block, K = entries of the widest row, V = vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import GROWN_PLACES, LIST_PLACES
from lynearm.wire.jit import Scalar, compiled, inlined, load32

Int32Array = npt.NDArray[np.int32]

U64 = np.uint64

MAX_GROWN_LISTS = 1 << 14
"""Grown lists of a block: 4 MiB of them."""


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
def find_list(
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
