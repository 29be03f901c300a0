"""Tokens drawn from the tails: what comes back, what they cost, what is refused, and adaptive k."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from wire.building import VOCAB_SIZE, build_rows, build_trace, draw_tails, replace_top_k
from wire.mutation import take_apart
from wire.round_trip import ROW_MODES, assert_round_trip, codec_of

from lynearm.wire.adaptive import keep_likely
from lynearm.wire.code_tables import CodeTables, DrawContext
from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.dictionaries import Dictionary, DictionaryReader
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.errors import CodecError
from lynearm.wire.row_layout import OWN_TABLES, TAIL_DRAWS
from lynearm.wire.specs import MAX_TAIL_DRAWS, CodecMode, CodecSpec
from lynearm.wire.traces import Trace

Int32Array = npt.NDArray[np.int32]


def build_drawn(seed: int = 0, *, draws: int = 1, **shape: int) -> Trace:
    return draw_tails(build_trace(seed, **shape), draws)


def drawn_ids(trace: Trace) -> Int32Array:
    assert trace.top_k.tail_draws is not None
    return trace.top_k.tail_draws


@pytest.mark.parametrize("mode", ["exact", "standard"])
@pytest.mark.parametrize("draws", [1, 3, 16])
@pytest.mark.parametrize("rows", [0, 1, 63, 64])
@pytest.mark.parametrize("k", [0, 7])
def test_draws_come_back(mode: CodecMode, draws: int, rows: int, k: int) -> None:
    traces = [build_drawn(1, draws=draws, positions=rows, k=k)]
    if k:
        prompts = build_trace(2, positions=3, k=2, prompt=5, prompt_rows=True)
        traces += [draw_tails(prompts, draws), build_drawn(3, draws=draws, positions=0, k=0)]
    block = assert_round_trip(traces, mode)
    assert take_apart(block).flags & TAIL_DRAWS


@pytest.mark.parametrize("trained_on", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_draws_come_back_with_any_dictionary(trained_on: int, rows: int) -> None:
    known = [build_trace(seed, positions=40, k=8) for seed in range(3)]
    if trained_on:
        known = [draw_tails(trace, trained_on) for trace in known]
    dictionary = train_dictionary([known], codec=codec_of("standard", trained_on), vocab_size=VOCAB_SIZE)
    for draws in (1, 3):
        trace = build_drawn(9, draws=draws, positions=rows, k=8)
        assert_round_trip([trace], "standard", dictionary=dictionary)


def test_draws_come_back_in_ascending_order_of_their_ranks() -> None:
    trace = build_rows([[-0.5], [-0.5]], [[3], [4]])
    trace = replace_top_k(trace, tail_draws=np.array([[9, 2, 9], [8, 7, 0]], np.int32))
    (decoded,) = decode_block(encode_block([trace], codec="exact", vocab_size=10))
    assert drawn_ids(decoded).tolist() == [[2, 9, 9], [0, 7, 8]]
    assert drawn_ids(decoded).dtype == np.int32


def test_traces_without_rows_need_no_draws_and_come_back_with_as_many() -> None:
    """A teacher's record that a prompt gave nothing says nothing of distributions."""
    record = build_trace(1, positions=0, k=0, prompt=0)
    traces = [record, build_drawn(2, draws=2, k=4), record]
    for codec in (CodecSpec("exact", tail_draws=2), "exact"):
        decoded = decode_block(encode_block(traces, codec=codec, vocab_size=VOCAB_SIZE))
        assert [drawn_ids(trace).shape for trace in decoded] == [(0, 2), (24, 2), (0, 2)]
    odd = draw_tails(record, 5)
    decoded = decode_block(encode_block([odd, traces[1]], codec="exact", vocab_size=VOCAB_SIZE))
    assert [drawn_ids(trace).shape for trace in decoded] == [(0, 2), (24, 2)]
    (decoded_odd,) = decode_block(encode_block([odd], codec="exact", vocab_size=VOCAB_SIZE))
    assert drawn_ids(decoded_odd).shape == (0, 5)
    decoded = decode_block(encode_block([odd, draw_tails(record, 1)], codec="exact", vocab_size=VOCAB_SIZE))
    assert [drawn_ids(trace).shape for trace in decoded] == [(0, 5), (0, 5)]
    plain = [odd, build_trace(3, k=4)]
    assert all(
        trace.top_k.tail_draws is None
        for trace in decode_block(encode_block(plain, codec="exact", vocab_size=VOCAB_SIZE))
    )
    spec = CodecSpec("exact", tail_draws=2)
    (alone,) = decode_block(encode_block([record], codec=spec, vocab_size=VOCAB_SIZE))
    assert alone.top_k.tail_draws is None


def test_rows_without_draws_are_written_as_if_there_were_no_such_thing() -> None:
    traces = [build_trace(seed, k=8) for seed in range(3)]
    block = encode_block(traces, codec=CodecSpec("exact"), vocab_size=VOCAB_SIZE)
    pieces = take_apart(block)
    assert not pieces.flags & TAIL_DRAWS
    assert CodeTables.from_bytes(pieces.tables).draw_lengths is None
    assert all(trace.top_k.tail_draws is None for trace in decode_block(block))
    dictionary = train_dictionary([traces], codec="exact", vocab_size=VOCAB_SIZE)
    assert dictionary.tables.draw_lengths is None
    assert dictionary.short_tables is not None
    assert dictionary.short_tables.draw_lengths is None


# What draws cost.


def zipf_draws(seed: int, rows: int) -> Trace:
    """Rows that keep two tokens, and draws of the others by a law that is known."""
    rng = np.random.default_rng(seed)
    trace = build_rows(np.full((rows, 2), -1.0), np.tile([0, 1], (rows, 1)))
    others = 2 + rng.choice(1022, (rows, 1), p=zipf_law())
    return replace_top_k(trace, tail_draws=others.astype(np.int32))


def zipf_law() -> npt.NDArray[np.float64]:
    weights = 1 / np.arange(1, 1023)
    law: npt.NDArray[np.float64] = weights / weights.sum()
    return law


def bits_of_draws(trace: Trace, dictionary: Dictionary | None = None) -> float:
    """Of each row, what a block is longer for its draws."""
    without = dataclasses.replace(trace, top_k=dataclasses.replace(trace.top_k, tail_draws=None))
    sizes = [len(encode_block([one], vocab_size=1024, dictionary=dictionary)) for one in (trace, without)]
    return 8 * (sizes[0] - sizes[1]) / trace.top_k.positions


def test_a_draw_costs_what_its_law_says() -> None:
    entropy = float(-(zipf_law() * np.log2(zipf_law())).sum())
    blocks = [[zipf_draws(seed, 500)] for seed in range(4)]
    dictionary = train_dictionary(blocks, codec=CodecSpec(tail_draws=1), vocab_size=1024)
    assert entropy - 0.1 < bits_of_draws(zipf_draws(9, 2000), dictionary) < entropy + 0.25
    assert bits_of_draws(zipf_draws(9, 2000)) < entropy + 0.5
    # Without codes each number takes the eleven bits of 0 to 1024, and little more.
    bare = train_dictionary([[zipf_draws(1, 20)]], codec=CodecSpec(tail_draws=1), vocab_size=1024)
    bare = dataclasses.replace(bare, tables=without_draw_codes(bare.tables), short_tables=None)
    assert bits_of_draws(zipf_draws(9, 100), bare) == pytest.approx(11, abs=0.2)


def without_draw_codes(tables: CodeTables) -> CodeTables:
    return dataclasses.replace(tables, draw_lengths=None)


def test_the_order_of_draws_is_not_paid_for() -> None:
    """log2(16!) is 44 bits a row, 2.8 a draw."""
    single, many = (build_drawn(1, draws=draws, positions=400, k=0) for draws in (1, 16))
    plain = dataclasses.replace(single, top_k=dataclasses.replace(single.top_k, tail_draws=None))
    sizes = [len(encode_block([trace], vocab_size=VOCAB_SIZE)) for trace in (plain, single, many)]
    assert (sizes[2] - sizes[0]) / 16 < (sizes[1] - sizes[0]) - 400 * 2.2 * 0.8 / 8


def test_a_few_draws_have_no_codes_of_their_own() -> None:
    pieces = [
        take_apart(encode_block([build_drawn(positions=rows, k=8)], vocab_size=VOCAB_SIZE))
        for rows in (3, 300)
    ]
    assert all(one.flags & OWN_TABLES for one in pieces)
    lengths = [CodeTables.from_bytes(one.tables).draw_lengths for one in pieces]
    assert lengths[0] is None
    assert lengths[1] is not None


def test_code_tables_with_codes_of_draws_come_back_from_their_bytes() -> None:
    traces = [build_drawn(seed, draws=2, positions=60, k=12) for seed in range(4)]
    dictionary = train_dictionary([traces], codec=CodecSpec(tail_draws=2), vocab_size=VOCAB_SIZE)
    for tables in (dictionary.tables, dictionary.short_tables):
        assert tables is not None
        assert tables.draw_lengths is not None
        assert tables.draw_lengths[DrawContext.GAP].any()
        again = CodeTables.from_bytes(tables.to_bytes())
        np.testing.assert_array_equal(again.draw_lengths, tables.draw_lengths)
    assert Dictionary.decode(dictionary.encoded).encoded == dictionary.encoded


# What is refused.

REFUSED: dict[str, tuple[Callable[[], Trace], str]] = {
    "a kept entry": (lambda: with_draws([[3], [0]]), "tail draws of tokens that the position keeps"),
    "beyond the vocabulary": (lambda: with_draws([[10], [0]]), "tail draws outside 0..9"),
    "below −1": (lambda: with_draws([[-2], [0]]), "tail draws outside 0..9"),
    "some of a row": (lambda: with_draws([[0, -1], [0, 0]]), "−1 for some of a row"),
    "some of a row, the first not": (lambda: with_draws([[-1, 0], [0, 0]]), "−1 for some of a row"),
    "too many": (lambda: with_draws([[0] * 17] * 2), "17 tail draws a position, at most 16"),
}


def with_draws(draws: list[list[int]]) -> Trace:
    return replace_top_k(build_rows([[-0.5], [-0.5]], [[3], [4]]), tail_draws=np.array(draws, np.int32))


def test_more_draws_than_there_may_be_are_refused_of_no_positions_too() -> None:
    with pytest.raises(CodecError, match="17 tail draws a position, at most 16"):
        encode_block([build_drawn(draws=17, positions=0)], vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("name", REFUSED)
def test_draws_that_cannot_be_are_refused(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(CodecError, match=message):
        encode_block([build()], codec="exact", vocab_size=10)
    with pytest.raises(CodecError, match=message):
        train_dictionary([[build()]], codec="exact", vocab_size=10)


def test_padding_is_no_kept_entry() -> None:
    trace = build_rows([[-0.5, -np.inf]], [[3, 4]])
    trace = replace_top_k(trace, tail_draws=np.array([[4]], np.int32))
    (decoded,) = decode_block(encode_block([trace], codec="exact", vocab_size=10))
    assert drawn_ids(decoded).tolist() == [[4]]


def test_draws_have_to_be_as_many_as_the_stream_has() -> None:
    one, two, none = build_drawn(1), build_drawn(2, draws=2), build_trace(3)
    for traces, wanted, found in (([one], 2, 1), ([one], 0, 1), ([none], 1, 0), ([one, two], 1, 2)):
        with pytest.raises(CodecError, match=f"has {found} tail draws a position, expected {wanted}"):
            encode_block(traces, codec=CodecSpec(tail_draws=wanted), vocab_size=VOCAB_SIZE)
    for traces in ([one, two], [one, none], [none, one]):
        with pytest.raises(CodecError, match="tail draws a position, expected"):
            encode_block(traces, vocab_size=VOCAB_SIZE)


def test_draws_of_the_mode_of_draws_have_no_tail() -> None:
    trace = build_rows([[0.0]], [[3]])
    trace = replace_top_k(trace, tail_draws=np.array([[4]], np.int32))
    empty = build_drawn(positions=0, k=0)
    for codec in (CodecSpec("sampled", draws=2, tail_draws=1), CodecSpec("sampled", draws=2)):
        for some in ([trace], [empty]):
            with pytest.raises(CodecError, match="mode 'sampled' has no tails"):
                encode_block(some, codec=codec, vocab_size=10)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (np.zeros((24, 0), np.int32), r"shape \(24, 0\), expected \(24, 1\)"),
        (np.zeros((23, 1), np.int32), r"shape \(23, 1\), expected \(24, 1\)"),
        (np.zeros((24, 1), np.int64), "dtype int64"),
        (np.zeros(24, np.int32), r"shape \(24,\), expected \(24, 1\)"),
    ],
)
def test_a_trace_has_draws_for_every_position(draws: Int32Array, message: str) -> None:
    with pytest.raises(CodecError, match=f"top_k.tail_draws has {message}"):
        replace_top_k(build_trace(), tail_draws=draws)


def test_a_prompts_rows_have_as_many_draws_as_the_completions() -> None:
    trace = draw_tails(build_trace(1, prompt=5, prompt_rows=True), 2)
    assert trace.prompt_top_k is not None
    for draws, message in ((None, "or neither has"), (np.zeros((4, 1), np.int32), r"expected \(4, 2\)")):
        prompt = dataclasses.replace(trace.prompt_top_k, tail_draws=draws)
        with pytest.raises(CodecError, match=message):
            dataclasses.replace(trace, prompt_top_k=prompt)


# Adaptive k.


def adaptive_trace(positions: int, draws: int, *, tail: float, drawn: int) -> Trace:
    """Rows of 0.5, 0.15 and 0.05, of which a threshold of 0.2 drops two, and a tail."""
    rows = np.tile(np.log([0.5, 0.15, 0.05]), (positions, 1))
    trace = build_rows(rows, np.tile([1, 2, 3], (positions, 1)), prompt_id="adaptive")
    return replace_top_k(
        trace,
        tail_mass=np.full(positions, tail, np.float32),
        tail_draws=np.full((positions, draws), drawn, np.int32),
    )


@pytest.mark.parametrize("draws", [1, 4])
def test_draws_from_a_tail_that_grows_are_draws_from_the_larger_one(draws: int) -> None:
    trace = keep_likely(adaptive_trace(20_000 // draws, draws, tail=0.3, drawn=9), 0.2)
    shares = np.bincount(drawn_ids(trace).ravel(), minlength=10) / 20_000
    # Of the larger tail's 0.5; the standard deviation of a share is at most 0.0035.
    expected = np.array([0, 0, 0.3, 0.1, 0, 0, 0, 0, 0, 0.6])
    np.testing.assert_allclose(shares, expected, atol=0.015)
    np.testing.assert_allclose(trace.top_k.tail_mass, 0.5, rtol=1e-6)
    if draws > 1:
        # Independent ones: pairs of draws are as frequent as the product of what they are made of.
        both = (drawn_ids(trace)[:, :2] == 9).all(axis=1).mean()
        assert both == pytest.approx(0.36, abs=0.03)


def test_a_tail_of_dropped_entries_alone_gives_only_those() -> None:
    trace = keep_likely(adaptive_trace(1000, 2, tail=0.0, drawn=-1), 0.2)
    assert set(drawn_ids(trace).ravel().tolist()) == {2, 3}


def test_where_nothing_was_drawn_from_a_tail_nothing_is_drawn_from_a_larger_one() -> None:
    trace = keep_likely(adaptive_trace(1000, 2, tail=0.3, drawn=-1), 0.2)
    assert (drawn_ids(trace) == -1).all()


def test_draws_from_a_tail_that_stays_stay() -> None:
    trace = adaptive_trace(100, 2, tail=0.3, drawn=9)
    assert (drawn_ids(keep_likely(trace, 0.01)) == 9).all()
    empty = build_drawn(positions=5, k=0)
    np.testing.assert_array_equal(drawn_ids(keep_likely(empty, 0.1)), drawn_ids(empty))


def test_a_trace_becomes_the_same_bytes_each_time_and_another_one_other_draws() -> None:
    spec = CodecSpec("exact", min_probability=0.2, tail_draws=1)
    trace = adaptive_trace(500, 1, tail=0.3, drawn=9)
    blocks = [encode_block([trace], codec=spec, vocab_size=10) for _ in range(2)]
    assert blocks[0] == blocks[1]
    other = dataclasses.replace(trace, sample_index=1)
    assert (drawn_ids(keep_likely(trace, 0.2)) != drawn_ids(keep_likely(other, 0.2))).mean() > 0.2


@ROW_MODES
@pytest.mark.parametrize("rows", [20, 150])
def test_adaptive_rows_with_draws_are_traces_again(mode: CodecMode, rows: int) -> None:
    """No draw is an entry that is kept, in a prompt's rows neither, with and without a dictionary."""
    trace = draw_tails(build_trace(4, positions=rows, k=32, prompt=9, prompt_rows=True), 3)
    spec = dataclasses.replace(codec_of(mode, 3), min_probability=1e-2)
    dictionary = train_dictionary([[trace]], codec=spec, vocab_size=VOCAB_SIZE)
    expected = keep_likely(trace, 1e-2)
    for used in (None, dictionary):
        block = encode_block([trace], codec=spec, vocab_size=VOCAB_SIZE, dictionary=used)
        reader = DictionaryReader(lambda _, used=used: used.encoded if used else b"")
        (decoded,) = decode_block(block, dictionaries=reader)
        np.testing.assert_array_equal(np.sort(drawn_ids(decoded)), np.sort(drawn_ids(expected)))
        assert not np.array_equal(np.sort(drawn_ids(decoded)), np.sort(drawn_ids(trace)))


def test_no_more_than_the_most_draws_are_known() -> None:
    trace = build_drawn(draws=MAX_TAIL_DRAWS, positions=3, k=2)
    (decoded,) = decode_block(encode_block([trace], vocab_size=VOCAB_SIZE))
    assert drawn_ids(decoded).shape == (3, MAX_TAIL_DRAWS)
