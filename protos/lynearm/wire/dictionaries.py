"""What a codec has learned about a teacher: its commonest tokens, its prefix codes, and its grid.

A dictionary is trained on a stream's own first blocks, or on others of the same teacher; it is sent once,
kept with the stream, and named by its digest in the header of every block that needs it. It saves most
where blocks are small: a large block can afford prefix codes of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from lynearm.wire.blocks import MAX_DICTIONARY_BYTES, dictionary_digest
from lynearm.wire.code_tables import CodeTables
from lynearm.wire.compression import decompress
from lynearm.wire.errors import CodecError, CorruptBlockError, UnsupportedFormatError
from lynearm.wire.grids import Grid
from lynearm.wire.specs import MAX_VOCAB_SIZE

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

FindDictionary: TypeAlias = "Callable[[bytes], bytes]"
"""Finds the bytes of a dictionary by its digest."""

_MAGIC = b"LYD2"
_HEAD = struct.Struct("<IIIII")
"""Vocabulary size, scale and cap of the grid (0: none), tokens in the order, bytes of the tables."""

_MAX_CONTENT_BYTES = _HEAD.size + 4 * MAX_VOCAB_SIZE + (1 << 16)


@dataclass(frozen=True)
class TokenOrder:
    """The vocabulary from the commonest token to the rarest."""

    token_of_rank: Int32Array

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
    def common_first(common: Int32Array, vocab_size: int) -> TokenOrder:
        """Some distinct tokens, then the others by ascending id."""
        others_V = np.ones(vocab_size, np.bool_)
        others_V[common] = False
        others = np.flatnonzero(others_V).astype(np.int32)
        return TokenOrder(np.concatenate([common, others]))


@dataclass(frozen=True)
class Dictionary:
    """One teacher's token order, prefix codes and grid."""

    vocab_size: int
    common_tokens: Int32Array
    """Distinct, the commonest first; tokens that are not here follow by id."""
    tables: CodeTables
    grid: Grid | None
    """Grid of the blocks that it was trained on; None for exact modes."""

    @cached_property
    def order(self) -> TokenOrder:
        """The whole vocabulary's order."""
        return TokenOrder.common_first(self.common_tokens, self.vocab_size)

    @cached_property
    def encoded(self) -> bytes:
        """The dictionary as it is sent and kept."""
        tables = self.tables.to_bytes()
        grid = (self.grid.scale_millionths, self.grid.cap_hundred_thousandths) if self.grid else (0, 0)
        head = _HEAD.pack(self.vocab_size, *grid, self.common_tokens.size, len(tables))
        # Tokens of one octave of frequency ascend by id: their differences are small, and squeeze well.
        differences = np.diff(self.common_tokens.astype(np.int64), prepend=0).astype("<i4")
        planes = differences.view(np.uint8).reshape(-1, 4).T.tobytes()
        compressor = zstandard.ZstdCompressor(level=19, write_checksum=True)
        return _MAGIC + compressor.compress(head + planes + tables)

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
        vocab_size, scale, cap, common, table_bytes = _HEAD.unpack_from(content)
        if not common <= vocab_size <= MAX_VOCAB_SIZE or vocab_size == 0:
            raise CorruptBlockError(f"a codec dictionary orders {common} of {vocab_size} tokens")
        if len(content) != _HEAD.size + 4 * common + table_bytes:
            raise CorruptBlockError(f"a codec dictionary of {len(content)} bytes contradicts its head")
        planes = np.frombuffer(content, np.uint8, 4 * common, _HEAD.size).reshape(4, common)
        tokens = planes.T.copy().view("<i4").ravel().astype(np.int64).cumsum()
        if common and (tokens.min() < 0 or tokens.max() >= vocab_size or np.unique(tokens).size != common):
            raise CorruptBlockError("a codec dictionary orders tokens that are not there, or one twice")
        return Dictionary(
            vocab_size=vocab_size,
            common_tokens=tokens.astype(np.int32),
            tables=CodeTables.from_bytes(content[_HEAD.size + 4 * common :]),
            grid=Grid(scale, cap) if scale else None,
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
