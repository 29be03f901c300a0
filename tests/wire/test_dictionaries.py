from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from wire.building import VOCAB_SIZE, build_sampled_trace, build_trace
from wire.comparing import assert_equal_exactly
from wire.mutation import put_together, take_apart

from lynearm.v1 import trace_pb2
from lynearm.wire.blocks import DIGEST_BYTES, dictionary_digest, verify_block
from lynearm.wire.codec import decode_block, decode_rows, encode_block
from lynearm.wire.dictionaries import (
    Dictionary,
    DictionaryReader,
    TokenLists,
    TokenOrder,
    list_tokens,
    order_tokens,
)
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.errors import (
    CodecError,
    CorruptBlockError,
    DictionaryNotFoundError,
    UnsupportedFormatError,
)
from lynearm.wire.metadata import NO_ENTRIES
from lynearm.wire.row_layout import ORDER_OF_DICTIONARY, OWN_TABLES, SCALE_OF_DICTIONARY, SHORT_TABLES
from lynearm.wire.specs import CodecMode, CodecSpec

SMALL = 400
TRACES = [build_trace(seed, positions=40, k=8, vocab_size=SMALL) for seed in range(3)]
DICTIONARY = train_dictionary([TRACES[:2]], codec="exact", vocab_size=SMALL)
BLOCK = encode_block(TRACES[2:], codec="exact", vocab_size=SMALL, dictionary=DICTIONARY)


def reader_of(*dictionaries: Dictionary) -> DictionaryReader:
    found = {dictionary.digest: dictionary.encoded for dictionary in dictionaries}
    return DictionaryReader(found.__getitem__)


def test_a_block_names_its_dictionary_and_needs_it() -> None:
    assert verify_block(BLOCK).dictionary_digest == DICTIONARY.digest
    assert len(DICTIONARY.digest) == DIGEST_BYTES
    (decoded,) = decode_block(BLOCK, dictionaries=reader_of(DICTIONARY))
    assert_equal_exactly(decoded, TRACES[2])
    for decode in (decode_block, decode_rows):
        with pytest.raises(CodecError, match=f"needs dictionary {DICTIONARY.digest.hex()}.*DictionaryReader"):
            decode(BLOCK)


def test_a_block_without_one_asks_for_none() -> None:
    def find(digest: bytes) -> bytes:
        raise AssertionError(digest)

    block = encode_block(TRACES, codec="exact", vocab_size=SMALL)
    assert verify_block(block).dictionary_digest == b""
    assert len(decode_block(block, dictionaries=DictionaryReader(find))) == 3


def test_other_bytes_under_a_dictionarys_name_are_refused() -> None:
    other = train_dictionary([TRACES[:1]], codec="exact", vocab_size=SMALL)
    for found in (other.encoded, DICTIONARY.encoded + b"\0", b""):
        with pytest.raises(CorruptBlockError, match="digest"):
            decode_block(BLOCK, dictionaries=DictionaryReader(lambda _, found=found: found))


def test_what_finding_a_dictionary_raises_comes_through() -> None:
    def find(digest: bytes) -> bytes:
        raise DictionaryNotFoundError(f"no dictionary {digest.hex()}")

    with pytest.raises(DictionaryNotFoundError):
        decode_block(BLOCK, dictionaries=DictionaryReader(find))


def test_a_dictionary_is_fetched_once_and_some_are_kept() -> None:
    asked: list[bytes] = []
    many = [
        train_dictionary(
            [[build_trace(seed, positions=2, k=2, vocab_size=SMALL)]], codec="exact", vocab_size=SMALL
        )
        for seed in range(20)
    ]
    found = {dictionary.digest: dictionary.encoded for dictionary in many}

    def find(digest: bytes) -> bytes:
        asked.append(digest)
        return found[digest]

    reader = DictionaryReader(find)
    digests = [dictionary.digest for dictionary in many]
    assert reader.get(digests[0]) is reader.get(digests[0])
    for digest in digests:
        reader.get(digest)
    assert asked == digests
    reader.get(digests[-1])
    reader.get(digests[0])
    assert asked == [*digests, digests[0]]


@pytest.mark.parametrize("mode", ["exact", "fine", "standard", "compact", "sampled"])
def test_a_dictionary_comes_back_from_its_bytes(mode: CodecMode) -> None:
    traces = TRACES
    if mode == "sampled":
        traces = [build_sampled_trace(seed, draws=9, vocab_size=SMALL) for seed in range(3)]
    spec = CodecSpec(mode, draws=9 if mode == "sampled" else 0)
    first, second = (train_dictionary([traces], codec=spec, vocab_size=SMALL) for _ in range(2))
    assert first.encoded == second.encoded
    decoded = Dictionary.decode(first.encoded)
    assert decoded.encoded == first.encoded
    assert decoded.digest == first.digest == dictionary_digest(first.encoded)
    assert (decoded.grid is None) == (mode in ("exact", "sampled"))
    assert decoded.grid == first.grid
    assert decoded.top_k == first.top_k
    assert first.top_k in {trace.top_k.k for trace in traces}
    np.testing.assert_array_equal(decoded.order.token_of_rank, first.order.token_of_rank)


def test_small_blocks_are_smaller_with_a_dictionary_and_large_ones_no_larger() -> None:
    traces = [build_trace(seed, positions=60, k=32) for seed in range(12)]
    dictionary = train_dictionary([traces[6:]], codec="standard", vocab_size=VOCAB_SIZE)
    for group in (traces[:1], traces[:6]):
        sizes = [
            len(encode_block(group, vocab_size=VOCAB_SIZE, dictionary=used)) for used in (dictionary, None)
        ]
        assert sizes[0] < sizes[1]


def test_a_block_may_use_a_dictionarys_order_with_tables_of_its_own() -> None:
    # Flat rows, which the dictionary does not expect, and enough of them to pay for tables.
    traces = [build_trace(seed, positions=90, k=64, slope=0.1) for seed in range(2)]
    peaked = [build_trace(7, positions=90, k=8, slope=3.0)]
    dictionary = train_dictionary([peaked], codec="exact", vocab_size=VOCAB_SIZE)
    block = encode_block(traces, codec="exact", vocab_size=VOCAB_SIZE, dictionary=dictionary)
    assert take_apart(block).flags & (OWN_TABLES | ORDER_OF_DICTIONARY) == OWN_TABLES | ORDER_OF_DICTIONARY
    for actual, expected in zip(decode_block(block, dictionaries=reader_of(dictionary)), traces, strict=True):
        assert_equal_exactly(actual, expected)


def test_short_blocks_have_codes_of_their_own_in_a_dictionary() -> None:
    traces = [build_trace(seed, positions=16, k=32) for seed in range(12)]
    dictionary = train_dictionary([traces[6:]], codec="standard", vocab_size=VOCAB_SIZE)
    short = encode_block(traces[:1], vocab_size=VOCAB_SIZE, dictionary=dictionary)
    assert take_apart(short).flags & (OWN_TABLES | SHORT_TABLES) == SHORT_TABLES
    bare = dataclasses.replace(dictionary, short_tables=None)
    assert Dictionary.decode(bare.encoded).short_tables is None
    assert len(short) < len(encode_block(traces[:1], vocab_size=VOCAB_SIZE, dictionary=bare))
    pieces = take_apart(short)
    header = dataclasses.replace(pieces.header, dictionary_digest=bare.digest)
    with pytest.raises(CorruptBlockError, match="its dictionary has none"):
        decode_block(put_together(dataclasses.replace(pieces, header=header)), dictionaries=reader_of(bare))


def test_codes_for_short_blocks_with_another_level_rule_are_left_alone() -> None:
    """Rows are named by the rule of the first tables, and would be read by that of the second."""
    traces = [build_trace(seed, positions=16, k=32) for seed in range(12)]
    dictionary = train_dictionary([traces[6:]], codec="standard", vocab_size=VOCAB_SIZE)
    assert dictionary.short_tables is not None
    rule = dataclasses.replace(dictionary.tables.level_rule, step_shift=0)
    short_tables = dataclasses.replace(dictionary.short_tables, level_rule=rule)
    foreign = dataclasses.replace(dictionary, short_tables=short_tables)
    block = encode_block(traces[:1], vocab_size=VOCAB_SIZE, dictionary=foreign)
    assert not take_apart(block).flags & SHORT_TABLES
    (decoded,) = decode_block(block, dictionaries=reader_of(foreign))
    assert np.array_equal(decoded.completion_token_ids, traces[0].completion_token_ids)


def test_a_block_with_two_kinds_of_tables_is_refused() -> None:
    pieces = take_apart(encode_block(TRACES[2:], codec="exact", vocab_size=SMALL))
    both = dataclasses.replace(pieces, flags=pieces.flags | SHORT_TABLES)
    with pytest.raises(CorruptBlockError, match="tables of its own"):
        decode_block(put_together(both))


def test_metadata_leave_out_the_width_that_the_dictionary_has() -> None:
    known, other, none = (build_trace(seed, k=k) for seed, k in enumerate((16, 9, 0)))
    dictionary = train_dictionary([[known]], codec="exact", vocab_size=VOCAB_SIZE)
    block = encode_block([known, other, none], codec="exact", vocab_size=VOCAB_SIZE, dictionary=dictionary)
    said = trace_pb2.BlockMetadata.FromString(take_apart(block).metadata).traces
    assert [trace.top_k for trace in said] == [0, 9, NO_ENTRIES]
    decoded = decode_block(block, dictionaries=reader_of(dictionary))
    assert [trace.top_k.k for trace in decoded] == [16, 9, 0]


def test_a_dictionary_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(CodecError, match="400 tokens for traces over 300"):
        encode_block([build_trace(vocab_size=300)], codec="exact", vocab_size=300, dictionary=DICTIONARY)
    pieces = take_apart(BLOCK)
    with pytest.raises(CorruptBlockError, match="over 500 tokens, a dictionary over 400"):
        decode_block(
            put_together(dataclasses.replace(pieces, vocab_size=500)), dictionaries=reader_of(DICTIONARY)
        )


def test_a_payload_that_needs_a_dictionary_which_its_header_hides_is_refused() -> None:
    pieces = take_apart(BLOCK)
    assert not pieces.flags & OWN_TABLES
    header = dataclasses.replace(pieces.header, dictionary_digest=b"")
    for flags in (pieces.flags, 0):
        hidden = put_together(dataclasses.replace(pieces, header=header, flags=flags))
        with pytest.raises(CorruptBlockError, match="names none"):
            decode_block(hidden, dictionaries=reader_of(DICTIONARY))


def test_training_needs_traces() -> None:
    for blocks in ([], [[]]):
        with pytest.raises(CodecError, match="0 traces"):
            train_dictionary(blocks, codec="exact", vocab_size=SMALL)


def test_tokens_stand_by_octave_of_their_count_and_then_by_id() -> None:
    counts = np.array([0, 1, 3, 2, 9, 8, 0, 15, 1])
    common = order_tokens(counts)
    assert common.tolist() == [4, 5, 7, 2, 3, 1, 8]
    order = TokenOrder.common_first(common, counts.size)
    assert order.token_of_rank.tolist() == [4, 5, 7, 2, 3, 1, 8, 0, 6]
    assert order.token_of_rank[order.rank_of_token].tolist() == list(range(9))


def test_a_block_needs_no_grid_where_its_dictionary_has_one() -> None:
    for mode, expected in (("standard", SCALE_OF_DICTIONARY), ("exact", 0)):
        dictionary = train_dictionary([TRACES], codec=mode, vocab_size=SMALL)
        block = encode_block(TRACES, codec=mode, vocab_size=SMALL, dictionary=dictionary)
        assert take_apart(block).flags & SCALE_OF_DICTIONARY == expected


def test_a_block_on_the_grid_of_a_dictionary_that_has_none_is_refused() -> None:
    dictionary = train_dictionary([TRACES], codec="exact", vocab_size=SMALL)
    pieces = take_apart(encode_block(TRACES, codec="exact", vocab_size=SMALL, dictionary=dictionary))
    for mode in ("exact", "standard"):
        header = dataclasses.replace(pieces.header, codec_mode=mode)
        flags = pieces.flags | SCALE_OF_DICTIONARY
        spoilt = dataclasses.replace(pieces, header=header, flags=flags, scale=b"")
        with pytest.raises(CorruptBlockError, match="scale of a dictionary without one"):
            decode_block(put_together(spoilt), dictionaries=reader_of(dictionary))


def test_tokens_that_go_with_others_stand_by_how_often_they_do() -> None:
    owners = np.array([7, 7, 7, 5, 5, -1, -1, -1], np.int32)
    tokens = np.array([[1, 2], [2, 3], [2, 1], [4, 4], [4, 4], [9, 9], [9, 9], [9, 9]], np.int32)
    lists = list_tokens(owners, tokens, np.ones(tokens.shape, np.bool_))
    # Token 5 was met twice only, and 3 was kept once.
    assert (lists.owners.tolist(), lists.counts.tolist(), lists.tokens.tolist()) == ([7], [2], [2, 1])
    order = TokenOrder.common_first(np.zeros(0, np.int32), 10, TokenLists.none(), lists)
    assert order.list_rows[7].tolist() == [0, 1]
    assert (order.list_sizes.tolist(), order.lists[1, :2].tolist()) == ([0, 2], [2, 1])


LISTED = train_dictionary([TRACES[:2] * 3], codec="standard", vocab_size=SMALL)
"""Every token of it was met three times, so that it has lists of both kinds."""


def rebuild(change: Callable[[bytearray], object]) -> bytes:
    content = bytearray(zstandard.ZstdDecompressor().decompress(LISTED.encoded[4:]))
    change(content)
    return LISTED.encoded[:4] + zstandard.ZstdCompressor().compress(bytes(content))


def set_head(place: int, value: int) -> Callable[[bytearray], object]:
    return lambda content: struct.pack_into("<I", content, 4 * place, value)


HEAD_BYTES = 44


def repeat_token(content: bytearray) -> None:
    # The four planes of the second difference.
    (common,) = struct.unpack_from("<I", content, 16)
    for plane in range(4):
        content[HEAD_BYTES + plane * common + 1] = 0


def change_lists(kind: int, part: str, value: int) -> Callable[[bytearray], object]:
    """Sets the lowest byte of the first owner, count or token of the followers (0) or companions (1)."""

    def change(content: bytearray) -> None:
        common, lists, listed, more_lists = struct.unpack_from("<4I", content, 16)
        start = HEAD_BYTES + 4 * common + kind * (5 * lists + 4 * listed)
        count = more_lists if kind else lists
        content[start + {"owner": 3 * count, "count": 4 * count, "token": 5 * count}[part]] = value

    return change


SPOILT: dict[str, Callable[[bytearray], object]] = {
    "no vocabulary": set_head(0, 0),
    "vocabulary below its tokens": set_head(0, 100),
    "vocabulary beyond any": set_head(0, (1 << 20) + 1),
    "grid too fine": set_head(1, 1),
    "rows wider than any": set_head(3, 1025),
    "more tokens than bytes": set_head(4, 1 << 19),
    "lists of followers that are not there": set_head(5, 1 << 30),
    "lists of companions that are not there": set_head(7, 1 << 30),
    "tokens of lists that are not there": set_head(6, 1 << 30),
    "tables that are not there": set_head(9, 1 << 30),
    "tables for short blocks that are not there": set_head(10, 1 << 30),
    "tables for short blocks in those of others": set_head(10, 0),
    "owner that is not there": change_lists(0, "owner", 0xFF),
    "owner of companions that is not there": change_lists(1, "owner", 0xFF),
    "list without tokens": change_lists(0, "count", 0),
    "list of too many tokens": change_lists(1, "count", 129),
    "one token twice": repeat_token,
    "tokens that are not there": lambda content: content.__setitem__(HEAD_BYTES + 3, 0xFF),
    "bytes too many": lambda content: content.append(0),
    "bytes too few": lambda content: content.pop(),
    "no head": lambda content: content.__delitem__(slice(10, None)),
    "nothing": bytearray.clear,
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_dictionary_that_lies_is_refused(name: str) -> None:
    whole = Dictionary.decode(rebuild(lambda _: None))
    assert whole.vocab_size == SMALL
    assert whole.followers.owners.size
    assert whole.companions.owners.size
    with pytest.raises(CorruptBlockError):
        Dictionary.decode(rebuild(SPOILT[name]))


def test_bytes_that_are_no_dictionary_are_refused_politely() -> None:
    for data in (b"", b"LYD", b"LYD2", b"LYD1" + DICTIONARY.encoded[4:], b"x" * 100):
        with pytest.raises(CorruptBlockError):
            Dictionary.decode(data)
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        Dictionary.decode(b"LYD3" + DICTIONARY.encoded[4:])


def test_a_bomb_for_a_dictionary_takes_no_memory() -> None:
    bomb = b"LYD2" + zstandard.ZstdCompressor(level=1).compress(bytes(256 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptBlockError, match="declares"):
            Dictionary.decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
