from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from wire.building import VOCAB_SIZE, build_rows, build_trace
from wire.comparing import added_kl, grid_of, largest_errors

from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.dictionaries import DictionaryReader
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.grids import GRID_LAWS, MAX_GRID_LEVEL, Bits, Counts, Grid, choose_grid
from lynearm.wire.specs import CodecMode
from lynearm.wire.traces import Trace

GRID_MODES = pytest.mark.parametrize("mode", GRID_LAWS)
# Finest and coarsest, and what language models get in each mode.
GRIDS = [
    Grid(150, 4_500),
    Grid(1_500, 4_500),
    Grid(15_000, 50_000),
    Grid(50_000, 100_000),
    Grid(500_000, 500_000),
]


@pytest.mark.parametrize("grid", GRIDS)
def test_levels_cover_every_probability(grid: Grid) -> None:
    lowest = max(float(grid.table()[-1]), -3e4)
    logprobs = -np.concatenate([[0.0], np.geomspace(1e-6, -0.99 * lowest, 5000)]).astype(np.float32)
    levels = grid.to_levels(logprobs)
    assert (np.diff(levels.astype(np.int64)) >= 0).all()
    assert (np.abs(grid.table()[levels] - logprobs) <= largest_errors(grid, logprobs)).all()
    lows = grid.to_levels(np.array([1e-4, 0.0, -np.inf, -1e30], np.float32))
    assert lows[0] == lows[1] == 0
    assert lows[2] == lows[3] == grid.to_levels(np.array([lowest], np.float32))[0]


@pytest.mark.parametrize("grid", GRIDS)
def test_levels_have_distinct_logprobs_that_lead_back_to_them(grid: Grid) -> None:
    table = grid.table()
    assert table[0] == 0
    assert (np.diff(table) < 0).all()
    every = np.arange(MAX_GRID_LEVEL + 1)[table > -3e4]
    np.testing.assert_array_equal(grid.to_levels(table[every]), every)


@pytest.mark.parametrize(
    ("scale", "cap"), [(0, 5000), (1, 5000), (1500, 3), (600_000, 500_000), (60_000, 5000)]
)
def test_grids_that_no_level_fits_are_refused(scale: int, cap: int) -> None:
    with pytest.raises(CorruptBlockError, match="grid"):
        Grid(scale, cap)


def flat(k: int) -> Trace:
    """Rows in which every token is as likely as the others."""
    ids = np.stack([np.random.default_rng(seed).permutation(VOCAB_SIZE)[:k] for seed in range(4)])
    return build_rows(np.full((4, k), np.log(0.9 / k)), ids)


@GRID_MODES
@pytest.mark.parametrize("slope", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("k", [1, 16, 64, 512])
def test_a_block_adds_no_more_divergence_than_its_mode_allows(mode: CodecMode, slope: float, k: int) -> None:
    trace = build_trace(1, positions=120, k=k, slope=slope)
    (decoded,) = decode_block(encode_block([trace], codec=mode, vocab_size=VOCAB_SIZE))
    added = added_kl(trace, decoded)
    bound = GRID_LAWS[mode].added_kl
    # The law expects errors to be spread evenly inside a step, which a hundred rows are not quite.
    assert added.mean() <= 1.35 * bound
    if k > 1 and slope == 1.0:
        assert added.mean() >= 0.2 * bound


@GRID_MODES
@pytest.mark.parametrize("k", [1, 30, 300, 600, 900, 1024])
def test_grids_of_flat_rows_meet_the_bound(mode: CodecMode, k: int) -> None:
    rows = flat(k).top_k
    grid = choose_grid(mode, rows.logprobs, rows.tail_mass)
    assert grid.added_kl(rows.logprobs, rows.tail_mass) <= 1.001 * GRID_LAWS[mode].added_kl * 4
    assert grid.cap <= GRID_LAWS[mode].largest_cap


@GRID_MODES
def test_a_block_that_does_not_suit_its_dictionary_gets_a_grid_of_its_own(mode: CodecMode) -> None:
    likely = [build_trace(seed, positions=40, slope=3.0, k=8) for seed in range(3)]
    dictionary = train_dictionary([likely], codec=mode, vocab_size=VOCAB_SIZE)
    reader = DictionaryReader(lambda _: dictionary.encoded)
    assert dictionary.grid is not None
    other = build_trace(9, positions=120, k=512, slope=0.2)
    for traces, same in (([likely[0]], True), ([other], False)):
        block = encode_block(traces, codec=mode, vocab_size=VOCAB_SIZE, dictionary=dictionary)
        assert (grid_of(block, dictionary) == dictionary.grid) == same
        (decoded,) = decode_block(block, dictionaries=reader)
        # On the dictionary's grid a block may add twice of what the stream may in the mean.
        assert added_kl(traces[0], decoded).mean() <= (2.7 if same else 1.35) * GRID_LAWS[mode].added_kl


def test_finer_modes_have_finer_grids_and_larger_blocks() -> None:
    traces = [build_trace(seed, positions=60, k=32) for seed in range(4)]
    modes: tuple[CodecMode, ...] = ("exact", "fine", "standard", "compact")
    blocks = [encode_block(traces, codec=mode, vocab_size=VOCAB_SIZE) for mode in modes]
    sizes = [len(block) for block in blocks]
    assert sizes == sorted(sizes, reverse=True)
    scales = [grid_of(block).scale for block in blocks[1:]]
    assert scales == sorted(scales)
    float16 = sum(trace.completion_token_ids.size for trace in traces) * (2 + 2 + 2 + 32 * 4)
    assert sizes[2] < 0.6 * float16


def test_bits_order_every_float_and_lead_back() -> None:
    falling = -np.geomspace(1e-45, 3.4e38, 999)
    descending = np.array([np.inf, 3.4e38, 1e-45, 0.0, -0.0, *falling, -np.inf]).astype(np.float32)
    levels = Bits().to_levels(descending)
    steps = np.diff(levels.astype(np.int64))
    np.testing.assert_array_equal(steps[np.diff(descending) < 0] > 0, True)
    assert (steps >= 0).all()
    assert Bits().from_levels(levels).tobytes() == descending.tobytes()
    zeros = Bits().to_levels(np.array([0.0, -0.0], np.float32))
    assert zeros[0] < zeros[1]


@pytest.mark.parametrize("draws", [1, 7, 1 << 16])
def test_every_count_of_draws_has_its_level(draws: int) -> None:
    counts: npt.NDArray[np.int64] = np.arange(1, draws + 1)
    logprobs = np.log(counts / draws).astype(np.float32)
    levels = Counts(draws).to_levels(logprobs)
    np.testing.assert_array_equal(levels, draws - counts)
    assert Counts(draws).table()[levels].tobytes() == logprobs.tobytes()
