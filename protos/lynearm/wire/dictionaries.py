"""What a codec has learned about a teacher: its commonest tokens, what follows them, prefix codes, a grid.

A dictionary is trained on a stream's own first blocks, or on others of the same teacher; it is sent once,
kept with the stream, and named by its digest in the header of every block that needs it. It saves most
where blocks are small: a large block can afford prefix codes of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from lynearm.wire.alphabet import FOLLOWERS
from lynearm.wire.blocks import MAX_DICTIONARY_BYTES, dictionary_digest
from lynearm.wire.code_tables import CodeTables
from lynearm.wire.compression import decompress
from lynearm.wire.errors import CodecError, CorruptBlockError, UnsupportedFormatError
from lynearm.wire.fields import ByteReader
from lynearm.wire.grids import Grid
from lynearm.wire.specs import MAX_VOCAB_SIZE

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]

FindDictionary: TypeAlias = "Callable[[bytes], bytes]"
"""Finds the bytes of a dictionary by its digest."""

_MAGIC = b"LYD2"
_HEAD = struct.Struct("<IIIIIII")
"""Vocabulary size; scale and cap of the grid, 0 for none; tokens in the order; lists, and tokens in them;
bytes of the tables."""

MAX_LISTS = 1 << 16
_MAX_CONTENT_BYTES = _HEAD.size + 4 * MAX_VOCAB_SIZE + MAX_LISTS * (5 + 4 * FOLLOWERS) + (1 << 16)

_MIN_OCCURRENCES = 3
_MIN_COUNT = 2
"""A token has a list if it was met so often, of the tokens that rows after it kept so often: rarer ones do
not return, and would cost more to send than they save."""


@dataclass(frozen=True)
class FollowerLists:
    """Which tokens a teacher holds likely after some others, the commonest first."""

    owners: Int32Array
    """Tokens that have a list, ascending, shape [lists]."""
    counts: Uint8Array
    """Tokens of each list, 1 to `FOLLOWERS`, shape [lists]."""
    tokens: Int32Array
    """Those of all lists, one after the other."""

    @staticmethod
    def none() -> FollowerLists:
        """No lists at all."""
        return FollowerLists(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int32))

    def table(self) -> Int32Array:
        """Lists as rows from 1 on, −1 where they end; row 0 is empty. Shape [lists + 1, FOLLOWERS]."""
        table = np.full((self.owners.size + 1, FOLLOWERS), -1, np.int32)
        table[1:][np.arange(FOLLOWERS) < self.counts[:, None]] = self.tokens
        return table


@dataclass(frozen=True)
class TokenOrder:
    """The vocabulary from the commonest token to the rarest, and what follows some of them."""

    token_of_rank: Int32Array
    lists: FollowerLists = field(default_factory=FollowerLists.none)

    @cached_property
    def followers(self) -> Int32Array:
        """`FollowerLists.table`."""
        return self.lists.table()

    @cached_property
    def list_of_token(self) -> Int32Array:
        """Row of `followers` for each token, shape [V]; shape [0] where there are no lists."""
        if self.lists.owners.size == 0:
            return np.zeros(0, np.int32)
        rows_V = np.zeros(self.token_of_rank.size, np.int32)
        rows_V[self.lists.owners] = np.arange(1, self.lists.owners.size + 1)
        return rows_V

    @cached_property
    def rank_of_token(self) -> Int32Array:
        """Rank of each token."""
        ranks_V = np.empty_like(self.token_of_rank)
        ranks_V[self.token_of_rank] = np.arange(ranks_V.size, dtype=np.int32)
        return ranks_V

    @staticmethod
    def by_id(vocab_size: int) -> TokenOrder:
        """Ascending ids, which for a byte-pair vocabulary is roughly its order already."""
        return TokenOrder(np.arange(vocab_size, dtype=np.int32))

    @staticmethod
    def common_first(common: Int32Array, vocab_size: int, lists: FollowerLists | None = None) -> TokenOrder:
        """Some distinct tokens, then the others by ascending id; and what follows which."""
        others_V = np.ones(vocab_size, np.bool_)
        others_V[common] = False
        others = np.flatnonzero(others_V).astype(np.int32)
        return TokenOrder(np.concatenate([common, others]), lists or FollowerLists.none())


@dataclass(frozen=True)
class Dictionary:
    """One teacher's token order, follower lists, prefix codes and grid."""

    vocab_size: int
    common_tokens: Int32Array
    """Distinct, the commonest first; tokens that are not here follow by id."""
    lists: FollowerLists
    tables: CodeTables
    grid: Grid | None
    """Grid of the blocks that it was trained on; None for exact modes."""

    @cached_property
    def order(self) -> TokenOrder:
        """The whole vocabulary's order."""
        return TokenOrder.common_first(self.common_tokens, self.vocab_size, self.lists)

    @cached_property
    def encoded(self) -> bytes:
        """The dictionary as it is sent and kept."""
        tables = self.tables.to_bytes()
        grid = (self.grid.scale_millionths, self.grid.cap_hundred_thousandths) if self.grid else (0, 0)
        lists = self.lists
        sizes = (self.common_tokens.size, lists.owners.size, lists.tokens.size, len(tables))
        content = (
            _HEAD.pack(self.vocab_size, *grid, *sizes),
            # Tokens of one octave of frequency ascend by id: their differences are small, and squeeze well.
            _to_planes(np.diff(self.common_tokens, prepend=np.int32(0))),
            _to_planes(np.diff(lists.owners, prepend=np.int32(0))),
            lists.counts.tobytes(),
            _to_planes(lists.tokens),
            tables,
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
        vocab_size, scale, cap, common, owners, listed, table_bytes = _HEAD.unpack_from(content)
        if not common <= vocab_size <= MAX_VOCAB_SIZE or vocab_size == 0:
            raise CorruptBlockError(f"a codec dictionary orders {common} of {vocab_size} tokens")
        if len(content) != _HEAD.size + 4 * common + 5 * owners + 4 * listed + table_bytes:
            raise CorruptBlockError(f"a codec dictionary of {len(content)} bytes contradicts its head")
        part = ByteReader(memoryview(content)[_HEAD.size :])
        tokens = _from_planes(part.take(4 * common)).cumsum()
        if common and (tokens.min() < 0 or tokens.max() >= vocab_size or np.unique(tokens).size != common):
            raise CorruptBlockError("a codec dictionary orders tokens that are not there, or one twice")
        lists = _read_lists(part, owners, listed, vocab_size)
        return Dictionary(
            vocab_size=vocab_size,
            common_tokens=tokens.astype(np.int32),
            lists=lists,
            tables=CodeTables.from_bytes(part.rest()),
            grid=Grid(scale, cap) if scale else None,
        )


def _to_planes(numbers: Int32Array) -> bytes:
    """Lowest bytes of all numbers, then the next ones, and so on: like bytes lie together."""
    return numbers.astype("<i4").view(np.uint8).reshape(-1, 4).T.tobytes()


def _from_planes(data: memoryview) -> Int64Array:
    planes = np.frombuffer(data, np.uint8).reshape(4, -1)
    return planes.T.copy().view("<i4").ravel().astype(np.int64)


def _read_lists(part: ByteReader, owner_count: int, token_count: int, vocab_size: int) -> FollowerLists:
    owners = _from_planes(part.take(4 * owner_count)).cumsum()
    counts = np.frombuffer(part.take(owner_count), np.uint8)
    tokens = _from_planes(part.take(4 * token_count))
    problems = {
        f"{owner_count} lists, at most {MAX_LISTS} may be": owner_count > MAX_LISTS,
        "lists of tokens that are not there, or one's twice": owner_count > 0
        and (owners[0] < 0 or owners[-1] >= vocab_size or bool((np.diff(owners) <= 0).any())),
        f"lists that are empty, or longer than {FOLLOWERS}": owner_count > 0
        and (int(counts.min()) == 0 or int(counts.max()) > FOLLOWERS),
        f"lists of {counts.sum(dtype=np.int64)} tokens, and {token_count} tokens": (
            int(counts.sum(dtype=np.int64)) != token_count
        ),
        "listed tokens that are not there": token_count > 0
        and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size),
    }
    for problem, holds in problems.items():
        if holds:
            raise CorruptBlockError(f"a codec dictionary has {problem}")
    return FollowerLists(owners.astype(np.int32), counts.copy(), tokens.astype(np.int32))


def list_followers(
    previous_N: Int32Array, token_ids_NK: Int32Array, kept_NK: npt.NDArray[np.bool_]
) -> FollowerLists:
    """The tokens that rows keep most often after each token that came often enough.

    Args:
        previous_N: Token before each row; −1 for none.
        token_ids_NK: Entries of the rows.
        kept_NK: Which of them count.
    """
    order = np.argsort(previous_N, kind="stable")
    owners, starts, occurrences = np.unique(previous_N[order], return_index=True, return_counts=True)
    worthy = np.flatnonzero((occurrences >= _MIN_OCCURRENCES) & (owners >= 0))
    if worthy.size > MAX_LISTS:
        worthy = np.sort(worthy[np.argsort(-occurrences[worthy], kind="stable")[:MAX_LISTS]])
    found: list[tuple[int, Int32Array]] = []
    for index in worthy.tolist():
        rows = order[starts[index] : starts[index] + occurrences[index]]
        tokens, counts = np.unique(token_ids_NK[rows][kept_NK[rows]], return_counts=True)
        tokens, counts = tokens[counts >= _MIN_COUNT], counts[counts >= _MIN_COUNT]
        likeliest = tokens[np.argsort(-counts, kind="stable")[:FOLLOWERS]]
        if likeliest.size:
            found.append((int(owners[index]), likeliest.astype(np.int32)))
    return FollowerLists(
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
