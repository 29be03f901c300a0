"""The symbols under which a block's entries and numbers are written.

Every integer becomes a *class*, which a prefix code writes, and the bits that the class leaves open,
which follow as they are. Two alphabets: `STEP` symbols name an entry of a position's row, its step in
level together with the class of its token code; `NUMBER` symbols name everything else.

A token code says which token an entry is. The lowest are places in two short lists: the *followers* of the
token before, and the *companions* of the row's first token. Each is what the last row of the block like this
one kept, or else what the dictionary has seen. The next count back in the list of tokens that the block met
lately, which begins with the vocabulary's commonest; from `RANK_START` on it is a rank in the vocabulary's
order. Inside a row, entries stand ascending by (level, token code). An entry on the level of the one before
it is therefore written as the gap between their token codes, and the order inside a level, which nobody
needs, is not paid for.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from lynearm.wire.jit import Scalar, compiled, highest_bit, inlined

Uint8Array = npt.NDArray[np.uint8]
Uint16Array = npt.NDArray[np.uint16]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]

LIST_PLACES: Final = 128
"""Length of the lists of followers and of companions. Token codes below it are places among the followers."""

GROWN_PLACES: Final = LIST_PLACES // 2
"""Length of the lists that a block grows: longer ones would save 0.6 % and take an eighth of the speed."""

COMPANION_START: Final = LIST_PLACES
"""So many token codes from there on are places among the companions."""

RECENT_START: Final = 2 * LIST_PLACES
RECENT_WINDOW: Final = 1920
"""So many token codes from there on count back in the list of recent tokens."""

RANK_START: Final = RECENT_START + RECENT_WINDOW

_FAR_CODE = RECENT_START + 384
"""From there on, a token code is far."""

REFRESH_DISTANCE: Final = 64
"""An entry enters the list of recent tokens (again) unless it lies nearer than this in it."""

STEP_CLASSES: Final = 4
"""Steps 0, 1 and 2 have symbols of their own; the fourth says that a number, step − 3, follows."""

LONG_STEP: Final = STEP_CLASSES - 1

LONG_STEP_CONTEXTS: Final = 8
"""Codes of long steps, by the level of the entry before."""

GAP_CLASSES: Final = 42
"""One mantissa bit; gaps are below 2^21."""

TOKEN_CLASSES: Final = 71
"""14 for each list, 22 for the window (one mantissa bit each), 21 for ranks (whole octaves)."""

_LIST_CLASSES = 14
_WINDOW_CLASSES = 22

STEP_SYMBOLS: Final = GAP_CLASSES + STEP_CLASSES * TOKEN_CLASSES
STEP_ESCAPE: Final = STEP_SYMBOLS
"""`SYMBOL_BITS` bits follow that name a symbol which has no code of its own in the table."""

SYMBOL_BITS: Final = 9
"""Enough for `STEP_SYMBOLS` and the escape."""

NUMBER_SYMBOLS: Final = 124
"""Two mantissa bits; numbers are below 2^32."""

NUMBER_ESCAPE: Final = NUMBER_SYMBOLS
"""Thirty-two bits follow: the number itself, whose class has no code in the table."""

TOKEN_OCTAVES: Final = 4
"""How many kinds of preceding token code the tables tell apart; see `token_octave`."""

ENTRY_STATES: Final = 4 * TOKEN_OCTAVES
"""What the entries before one say about it; see `next_state`."""

LISTS_USED: Final = ENTRY_STATES - TOKEN_OCTAVES
"""The bits of a state that say which of the two lists the row has used."""

RANK_BUCKETS: Final = 8
"""How many ranges of ranks in a row the tables tell apart: 0, 1, 2–3, 4–7, …, 32–63, and above."""


@inlined
def token_octave(token_code: Scalar) -> Scalar:
    """What the token code of the entry before says about the next one: 0 to 3."""
    return (
        np.uint64(token_code >= np.uint64(COMPANION_START))
        + np.uint64(token_code >= np.uint64(RECENT_START))
        + np.uint64(token_code >= np.uint64(_FAR_CODE))
    )


@inlined
def next_state(state: Scalar, token_code: Scalar, remembered: Scalar) -> Scalar:
    """State behind an entry: its octave; 4 more once the row has named a follower, 8 a companion.

    Whether the lists of a row are there, and good ones, shows in what it takes from them. A row begins in
    state 0.

    Args:
        state: The one before.
        token_code: The entry's.
        remembered: `LISTS_USED`, or 0 to keep the octave alone.
    """
    octave = token_octave(token_code)
    return (state & remembered) | octave | ((np.uint64(TOKEN_OCTAVES) << octave) & remembered)


@inlined
def step_context(level: Scalar, level_shift: Scalar) -> Scalar:
    """Context of a long step from a level."""
    return min(level >> level_shift, np.uint64(LONG_STEP_CONTEXTS - 1))


@inlined
def gap_symbol(gap: Scalar) -> Scalar:
    """Symbol of an entry on its predecessor's level, `gap` token codes behind the next one."""
    if gap < 4:
        return gap
    exponent = highest_bit(gap)
    return 2 * exponent + ((gap >> (exponent - 1)) & 1)


@inlined
def token_symbol(step: Scalar, token_code: Scalar) -> Scalar:
    """Symbol of any other entry: the first of a row, or one on a new level."""
    base = GAP_CLASSES + min(step, LONG_STEP) * TOKEN_CLASSES
    if token_code < COMPANION_START:
        return base + gap_symbol(token_code)
    if token_code < RECENT_START:
        return base + _LIST_CLASSES + gap_symbol(token_code - COMPANION_START)
    base += 2 * _LIST_CLASSES
    if token_code < RANK_START:
        return base + gap_symbol(token_code - RECENT_START)
    base += _WINDOW_CLASSES
    rank = token_code - RANK_START
    return base + rank if rank < 2 else base + 1 + highest_bit(rank)


@inlined
def number_symbol(number: Scalar) -> Scalar:
    """Symbol of a number."""
    if number < 8:
        return number
    exponent = highest_bit(number)
    return 4 * (exponent - 1) + ((number >> (exponent - 2)) & 3)


@compiled
def number_symbols(numbers: Uint32Array) -> Uint8Array:
    """Symbols of numbers, shape [n]."""
    symbols = np.empty(numbers.size, np.uint8)
    for index in range(numbers.size):
        symbols[index] = number_symbol(np.int64(numbers[index]))
    return symbols


def _step_tables() -> tuple[Uint32Array, Uint8Array]:
    """Base and number of open bits of every step symbol; the base of a gap counts from the gap's start."""
    bases = np.zeros(STEP_SYMBOLS, np.uint32)
    widths = np.zeros(STEP_SYMBOLS, np.uint8)
    fine = [(value, 0) for value in range(4)]
    fine += [((2 + half) << (e - 1), e - 1) for e in range(2, 21) for half in (0, 1)]
    octaves = [(0, 0), (1, 0), *((1 << e, e) for e in range(1, 20))]
    tokens = fine[:_LIST_CLASSES]
    tokens += [(COMPANION_START + base, width) for base, width in fine[:_LIST_CLASSES]]
    tokens += [(RECENT_START + base, width) for base, width in fine[:_WINDOW_CLASSES]]
    tokens += [(RANK_START + base, width) for base, width in octaves]
    for symbol, (base, width) in enumerate(fine + tokens * STEP_CLASSES):
        bases[symbol], widths[symbol] = base, width
    return bases, widths


def _number_tables() -> tuple[Uint32Array, Uint8Array]:
    pairs = [(value, 0) for value in range(8)]
    pairs += [((4 + quarter) << (e - 2), e - 2) for e in range(3, 32) for quarter in range(4)]
    return np.array([base for base, _ in pairs], np.uint32), np.array([width for _, width in pairs], np.uint8)


def _symbols_below(bases: Uint32Array, size: int) -> Uint16Array:
    """Number of the base at or below each of the first integers; bases ascend."""
    symbols: Uint16Array = (np.searchsorted(bases, np.arange(size), side="right") - 1).astype(np.uint16)
    return symbols


STEP_BASES, STEP_WIDTHS = _step_tables()
NEAR_SYMBOLS: Final[Uint16Array] = np.stack(
    [
        GAP_CLASSES + _symbols_below(STEP_BASES[GAP_CLASSES : GAP_CLASSES + TOKEN_CLASSES], RANK_START),
        _symbols_below(STEP_BASES[:GAP_CLASSES], RANK_START),
    ]
)
"""`token_symbol` with step 0 of the token codes below `RANK_START`, and `gap_symbol` of the gaps below it."""

NUMBER_BASES, NUMBER_WIDTHS = _number_tables()

BUCKET_OF_RANK: Final[Uint8Array] = np.minimum(
    np.frexp(np.arange(1024, dtype=np.float64))[1], RANK_BUCKETS - 1
).astype(np.uint8)
"""Bucket of each rank of a row, shape [1024]."""


def step_of_symbol(symbol: int) -> int:
    """Step that a symbol says, `LONG_STEP` for any longer one; 0 for gaps, and for a row's first entry."""
    return 0 if symbol < GAP_CLASSES else (symbol - GAP_CLASSES) // TOKEN_CLASSES


RUN_BITS: Final = 7
STATE_RUNS: Final = 6
"""Token codes of one run of 2^RUN_BITS lead to one state; the last run is all that is left."""

_OCTAVE_OF_RUN = np.array([0, 1, 2, 2, 2, 3], np.uint64)
STATES_BEHIND: Final[Uint64Array] = _OCTAVE_OF_RUN | (
    np.left_shift(np.uint64(TOKEN_OCTAVES), _OCTAVE_OF_RUN) & np.uint64(LISTS_USED)
)
"""`next_state` behind a row's first entry, by the run of its token code, shape [`STATE_RUNS`]."""
