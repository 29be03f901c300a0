"""Lists that grow: which tokens they hold, and where they end."""

from __future__ import annotations

import numpy as np

from lynearm.wire.alphabet import GROWN_PLACES, LIST_PLACES
from lynearm.wire.list_kernels import grow_lists


class Lists:
    """Followers and companions of a block over 300 tokens; token 1 has a dictionary's companions 50, 51."""

    def __init__(self, room: int) -> None:
        self.rows_V2 = np.zeros((300, 2), np.int32)
        self.rows_V2[1, 1] = 1
        self.listed = np.zeros((2, LIST_PLACES), np.int32)
        self.listed[1, :2] = 50, 51
        self.listed_sizes = np.array([0, 2], np.int32)
        self.grown = np.zeros((room + 1, GROWN_PLACES), np.int32)
        self.sizes = np.zeros(room, np.int32)
        self.stamps_V = np.full(300, -1, np.int32)
        self.count = 0
        self.t = 0

    def add(self, previous: int, *tokens: int) -> None:
        token_ids_NK = np.zeros((self.t + 1, len(tokens)), np.int32)
        token_ids_NK[self.t] = tokens
        self.count = grow_lists(
            self.t,
            previous,
            token_ids_NK,
            len(tokens),
            self.rows_V2,
            self.listed,
            self.listed_sizes,
            self.grown,
            self.sizes,
            self.count,
            self.stamps_V,
        )
        self.t += 1

    def read(self, kind: int, owner: int) -> list[int]:
        row = int(self.rows_V2[owner, kind])
        tokens: list[int] = (
            self.grown[-1 - row, : self.sizes[-1 - row]]
            if row < 0
            else self.listed[row, : self.listed_sizes[row]]
        ).tolist()
        return tokens


def test_a_row_goes_before_the_followers_and_behind_the_companions() -> None:
    lists = Lists(room=8)
    lists.add(7, 1, 51, 60)
    assert lists.read(0, 7) == [1, 51, 60]
    assert lists.read(1, 1) == [50, 51, 60]
    lists.add(7, 2, 60)
    assert lists.read(0, 7) == [2, 60, 1, 51]
    assert lists.read(1, 2) == [60]


def test_lists_end_at_their_last_place() -> None:
    lists = Lists(room=8)
    lists.add(7, 1, *range(60, 60 + GROWN_PLACES - 1))
    lists.add(7, 1, *range(200, 200 + GROWN_PLACES - 1))
    assert lists.read(0, 7) == [1, *range(200, 200 + GROWN_PLACES - 1)]
    assert lists.read(1, 1) == [50, 51, *range(60, 60 + GROWN_PLACES - 2)]


def test_longer_lists_of_a_dictionary_are_cut_or_stay() -> None:
    lists = Lists(room=8)
    lists.listed[1] = range(100, 100 + LIST_PLACES)
    lists.listed_sizes[1] = LIST_PLACES
    lists.rows_V2[7, 0] = 1
    lists.add(7, 1, 60, 61)
    assert lists.read(0, 7) == [1, 60, 61, *range(100, 100 + GROWN_PLACES - 3)]
    assert lists.read(1, 1) == [*range(100, 100 + LIST_PLACES)]
    assert lists.count == 1


def test_without_room_only_lists_that_grew_before_grow() -> None:
    lists = Lists(room=1)
    lists.add(7, 1, 60)
    lists.add(8, 3, 61)
    lists.add(7, 4, 62)
    assert lists.count == 1
    assert (lists.read(0, 7), lists.read(0, 8)) == ([4, 62, 1, 60], [])
    assert (lists.read(1, 1), lists.read(1, 3)) == ([50, 51], [])


def test_nothing_is_written_for_tokens_that_are_not_there() -> None:
    lists = Lists(room=8)
    lists.add(-1, -1, 300, 5)
    assert lists.count == 0
    lists.add(300, 5, -1, 300)
    assert lists.read(1, 5) == []
