"""What a codec has learned about a teacher: its commonest tokens, what goes with them, prefix codes, a grid.

A dictionary is trained on a stream's own first blocks, or on others of the same teacher; it is sent once,
kept with the stream, and named by its digest in the header of every block that needs it. It saves most
where blocks are small: a large block can afford prefix codes of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from lynearm.wire.alphabet import LIST_PLACES
from lynearm.wire.blocks import MAX_DICTIONARY_BYTES, dictionary_digest
from lynearm.wire.code_tables import CodeTables
from lynearm.wire.compression import decompress
from lynearm.wire.errors import CodecError, CorruptBlockError, UnsupportedFormatError
from lynearm.wire.fields import ByteReader
from lynearm.wire.grids import Grid
from lynearm.wire.specs import MAX_TOP_K, MAX_VOCAB_SIZE

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]

FindDictionary: TypeAlias = "Callable[[bytes], bytes]"
"""Finds the bytes of a dictionary by its digest."""

_MAGIC = b"LYD2"
_HEAD = struct.Struct("<IIIIIIIIIII")
"""Vocabulary size; scale and cap of the grid, 0 for none; usual width of rows; tokens in the order; lists of
followers, and tokens in them; lists of companions, and tokens in them; bytes of the tables, and of those for
short blocks."""

MAX_LISTS = 1 << 14
"""Of each kind. A dictionary's bytes end before, unless its lists are short."""

_MAX_CONTENT_BYTES = _HEAD.size + 4 * MAX_VOCAB_SIZE + 2 * MAX_LISTS * (5 + 4 * LIST_PLACES) + (1 << 16)

_MIN_OCCURRENCES = 3
_MIN_COUNT = 2
"""A token has a list if it was met so often, of the tokens that rows after it kept so often: rarer ones do
not return, and would cost more to send than they save."""


@dataclass(frozen=True)
class TokenLists:
    """Which tokens a teacher holds likely where some others are, the commonest first."""

    owners: Int32Array
    """Tokens that have a list, ascending, shape [lists]."""
    counts: Uint8Array
    """Tokens of each list, 1 to `LIST_PLACES`, shape [lists]."""
    tokens: Int32Array
    """Those of all lists, one after the other."""

    @staticmethod
    def none() -> TokenLists:
        """No lists at all."""
        return TokenLists(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int32))


@dataclass(frozen=True)
class TokenOrder:
    """The vocabulary from the commonest token to the rarest, and what goes with some of them."""

    token_of_rank: Int32Array
    followers: TokenLists = field(default_factory=TokenLists.none)
    """By the token before a row: what the row keeps."""
    companions: TokenLists = field(default_factory=TokenLists.none)
    """By a row's first token: what else the row keeps."""

    @cached_property
    def lists(self) -> Int32Array:
        """An empty list, those of followers, those of companions; shape [rows, LIST_PLACES]."""
        table = np.zeros((self.list_sizes.size, LIST_PLACES), np.int32)
        named = np.concatenate([self.followers.tokens, self.companions.tokens])
        table[np.arange(LIST_PLACES) < self.list_sizes[:, None]] = named
        return table

    @cached_property
    def list_sizes(self) -> Int32Array:
        """Tokens of each row of `lists`."""
        counts = np.concatenate([[0], self.followers.counts, self.companions.counts])
        return counts.astype(np.int32)

    @cached_property
    def list_rows(self) -> Int32Array:
        """Rows of `lists` with each token's followers and companions, shape [V, 2]; 0 where it has none."""
        rows_V2 = np.zeros((self.token_of_rank.size, 2), np.int32)
        start = 1
        for kind, lists in enumerate((self.followers, self.companions)):
            rows_V2[lists.owners, kind] = np.arange(start, start + lists.owners.size)
            start += lists.owners.size
        return rows_V2

    @cached_property
    def rank_of_token(self) -> Int32Array:
        """Rank of each token."""
        ranks_V = np.empty_like(self.token_of_rank)
        ranks_V[self.token_of_rank] = np.arange(ranks_V.size, dtype=np.int32)
        return ranks_V

    @staticmethod
    @lru_cache(maxsize=2)
    def by_id(vocab_size: int) -> TokenOrder:
        """Ascending ids, which for a byte-pair vocabulary is roughly its order already.

        Every block without a dictionary asks for it, of a teacher or two.
        """
        return TokenOrder(np.arange(vocab_size, dtype=np.int32))

    @staticmethod
    def common_first(common: Int32Array, vocab_size: int, *lists: TokenLists) -> TokenOrder:
        """Some distinct tokens, then the others by ascending id; and lists of followers and companions."""
        others_V = np.ones(vocab_size, np.bool_)
        others_V[common] = False
        others = np.flatnonzero(others_V).astype(np.int32)
        return TokenOrder(np.concatenate([common, others]), *lists)


@dataclass(frozen=True)
class Dictionary:
    """One teacher's token order, lists, prefix codes and grid."""

    vocab_size: int
    common_tokens: Int32Array
    """Distinct, the commonest first; tokens that are not here follow by id."""
    followers: TokenLists
    companions: TokenLists
    tables: CodeTables
    grid: Grid | None
    """Grid of the blocks that it was trained on; None for exact modes."""
    top_k: int = 0
    """Width of the rows of most traces; these need not say it."""
    short_tables: CodeTables | None = None
    """For blocks of few rows, whose tokens the block has not seen yet; with the level rule of `tables`."""

    @cached_property
    def order(self) -> TokenOrder:
        """The whole vocabulary's order."""
        return TokenOrder.common_first(self.common_tokens, self.vocab_size, self.followers, self.companions)

    @cached_property
    def encoded(self) -> bytes:
        """The dictionary as it is sent and kept."""
        tables = self.tables.to_bytes()
        short_tables = self.short_tables.to_bytes() if self.short_tables else b""
        grid = (self.grid.scale_millionths, self.grid.cap_hundred_thousandths) if self.grid else (0, 0)
        both = (self.followers, self.companions)
        list_sizes = [size for lists in both for size in (lists.owners.size, lists.tokens.size)]
        content = (
            _HEAD.pack(
                self.vocab_size,
                *grid,
                self.top_k,
                self.common_tokens.size,
                *list_sizes,
                len(tables),
                len(short_tables),
            ),
            # Tokens of one octave of frequency ascend by id: their differences are small, and squeeze well.
            _to_planes(np.diff(self.common_tokens, prepend=np.int32(0))),
            *(part for lists in both for part in _write_lists(lists)),
            tables,
            short_tables,
        )
        compressor = zstandard.ZstdCompressor(level=19, write_checksum=True)
        return _MAGIC + compressor.compress(b"".join(content))

    @cached_property
    def digest(self) -> bytes:
        """Its name: the first `DIGEST_BYTES` of the SHA-256 of `encoded`."""
        return dictionary_digest(self.encoded)

    @staticmethod
    def decode(data: bytes) -> Dictionary:
        """The dictionary in some bytes; nothing in them is trusted.

        Raises:
            CorruptBlockError: if they are not one.
            UnsupportedFormatError: if a newer lynearm wrote it.
        """
        if data[:3] == _MAGIC[:3] and data[:4] > _MAGIC:
            raise UnsupportedFormatError("a dictionary of a newer format", "upgrade lynearm")
        if data[:4] != _MAGIC or len(data) > MAX_DICTIONARY_BYTES:
            raise CorruptBlockError("the bytes are not a codec dictionary")
        content = decompress(memoryview(data)[4:], limit=_MAX_CONTENT_BYTES)
        if len(content) < _HEAD.size:
            raise CorruptBlockError("a codec dictionary ends inside its head")
        head = _HEAD.unpack_from(content)
        vocab_size, scale, cap, top_k, common, *list_sizes, table_bytes, short_bytes = head
        owners, listed = sum(list_sizes[::2]), sum(list_sizes[1::2])
        if top_k > MAX_TOP_K:
            raise CorruptBlockError(f"a codec dictionary of rows of {top_k} entries, at most {MAX_TOP_K}")
        if not common <= vocab_size <= MAX_VOCAB_SIZE or vocab_size == 0:
            raise CorruptBlockError(f"a codec dictionary orders {common} of {vocab_size} tokens")
        if len(content) != _HEAD.size + 4 * common + 5 * owners + 4 * listed + table_bytes + short_bytes:
            raise CorruptBlockError(f"a codec dictionary of {len(content)} bytes contradicts its head")
        part = ByteReader(memoryview(content)[_HEAD.size :])
        tokens = _from_planes(part.take(4 * common)).cumsum()
        if common and (tokens.min() < 0 or tokens.max() >= vocab_size or np.unique(tokens).size != common):
            raise CorruptBlockError("a codec dictionary orders tokens that are not there, or one twice")
        followers = _read_lists(part, list_sizes[0], list_sizes[1], vocab_size)
        companions = _read_lists(part, list_sizes[2], list_sizes[3], vocab_size)
        return Dictionary(
            vocab_size=vocab_size,
            common_tokens=tokens.astype(np.int32),
            followers=followers,
            companions=companions,
            tables=CodeTables.from_bytes(part.take(table_bytes)),
            grid=Grid(scale, cap) if scale else None,
            top_k=top_k,
            short_tables=CodeTables.from_bytes(part.rest()) if short_bytes else None,
        )


def _to_planes(numbers: Int32Array) -> bytes:
    """Lowest bytes of all numbers, then the next ones, and so on: like bytes lie together."""
    return numbers.astype("<i4").view(np.uint8).reshape(-1, 4).T.tobytes()


def _from_planes(data: memoryview) -> Int64Array:
    planes = np.frombuffer(data, np.uint8).reshape(4, -1)
    return planes.T.copy().view("<i4").ravel().astype(np.int64)


def _write_lists(lists: TokenLists) -> tuple[bytes, bytes, bytes]:
    owners = np.diff(lists.owners, prepend=np.int32(0))
    return _to_planes(owners), lists.counts.tobytes(), _to_planes(lists.tokens)


def _read_lists(part: ByteReader, owner_count: int, token_count: int, vocab_size: int) -> TokenLists:
    owners = _from_planes(part.take(4 * owner_count)).cumsum()
    counts = np.frombuffer(part.take(owner_count), np.uint8)
    tokens = _from_planes(part.take(4 * token_count))
    problems = {
        f"{owner_count} lists, at most {MAX_LISTS} may be": owner_count > MAX_LISTS,
        "lists of tokens that are not there, or one's twice": owner_count > 0
        and (owners[0] < 0 or owners[-1] >= vocab_size or bool((np.diff(owners) <= 0).any())),
        f"lists that are empty, or longer than {LIST_PLACES}": owner_count > 0
        and (int(counts.min()) == 0 or int(counts.max()) > LIST_PLACES),
        f"lists of {counts.sum(dtype=np.int64)} tokens, and {token_count} tokens": (
            int(counts.sum(dtype=np.int64)) != token_count
        ),
        "listed tokens that are not there": token_count > 0
        and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size),
    }
    for problem, holds in problems.items():
        if holds:
            raise CorruptBlockError(f"a codec dictionary has {problem}")
    return TokenLists(owners.astype(np.int32), counts.copy(), tokens.astype(np.int32))


def list_tokens(owner_N: Int32Array, token_ids_NK: Int32Array, kept_NK: npt.NDArray[np.bool_]) -> TokenLists:
    """The tokens that rows keep most often where their owner came often enough.

    Args:
        owner_N: Token that decides each row's list; −1 for none.
        token_ids_NK: Entries of the rows.
        kept_NK: Which of them count.
    """
    order = np.argsort(owner_N, kind="stable")
    owners, starts, occurrences = np.unique(owner_N[order], return_index=True, return_counts=True)
    worthy = np.flatnonzero((occurrences >= _MIN_OCCURRENCES) & (owners >= 0))
    if worthy.size > MAX_LISTS:
        worthy = np.sort(worthy[np.argsort(-occurrences[worthy], kind="stable")[:MAX_LISTS]])
    found: list[tuple[int, Int32Array]] = []
    for index in worthy.tolist():
        rows = order[starts[index] : starts[index] + occurrences[index]]
        tokens, counts = np.unique(token_ids_NK[rows][kept_NK[rows]], return_counts=True)
        tokens, counts = tokens[counts >= _MIN_COUNT], counts[counts >= _MIN_COUNT]
        likeliest = tokens[np.argsort(-counts, kind="stable")[:LIST_PLACES]]
        if likeliest.size:
            found.append((int(owners[index]), likeliest.astype(np.int32)))
    return TokenLists(
        owners=np.array([owner for owner, _ in found], np.int32),
        counts=np.array([tokens.size for _, tokens in found], np.uint8),
        tokens=np.concatenate([np.zeros(0, np.int32), *(tokens for _, tokens in found)]),
    )


def order_tokens(counts_V: Int64Array) -> Int32Array:
    """Tokens that were counted, by octave of their count, descending, then by id.

    Ranks are written by octave, so that a finer order would save a fraction of a bit and cost many to send.
    """
    tokens = np.flatnonzero(counts_V)
    octaves = np.frexp(counts_V[tokens].astype(np.float64))[1]
    return tokens[np.argsort(-octaves, kind="stable")].astype(np.int32)


class DictionaryReader:
    """Decoded dictionaries by digest, so that each is fetched and parsed once.

    Args:
        find: Finds the bytes; None where no block may need a dictionary.
    """

    _KEPT = 16

    def __init__(self, find: FindDictionary | None = None) -> None:
        self._find = find
        self._decoded: dict[bytes, Dictionary] = {}

    def get(self, digest: bytes) -> Dictionary:
        """The dictionary of that digest.

        Raises:
            CodecError: if there is no way to find it.
            CorruptBlockError: if what was found has another digest, or is not a dictionary.
        """
        known = self._decoded.get(digest)
        if known is not None:
            return known
        if self._find is None:
            raise CodecError(
                f"the block needs dictionary {digest.hex()}",
                "give decode_block a DictionaryReader over TraceClient.get_dictionary",
            )
        data = self._find(digest)
        if dictionary_digest(data) != digest:
            raise CorruptBlockError(
                f"the dictionary found for {digest.hex()} has digest {dictionary_digest(data).hex()}",
                "fetch it again",
            )
        dictionary = Dictionary.decode(data)
        if len(self._decoded) >= self._KEPT:
            self._decoded.pop(next(iter(self._decoded)))
        self._decoded[digest] = dictionary
        return dictionary
