"""Draws from the tail: their law, what is never drawn, and how they get out of a real vLLM engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lynearm.teacher.distributions import TopLogprobs, top_logprobs
from lynearm.teacher.draws import keep_and_draw

VOCAB = 5003
"""Fills neither the blocks of torch's way nor the parts of the compiled one."""

TopOf = Callable[..., TopLogprobs]


@pytest.fixture(params=[1, 64], ids=["compiled", "torch"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few threads, where compiled code looks at rows, and many, where torch does."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> list[TopOf]:
    def with_threads(threads: int) -> TopOf:
        def top(*arguments: Any, **keywords: Any) -> TopLogprobs:
            monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
            return top_logprobs(*arguments, **keywords)

        return top

    return [with_threads(1), with_threads(64)]


def some_logits(rows: int, vocab_size: int = VOCAB, *, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def some_chances(rows: int, draws: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, draws, dtype=torch.float64, generator=generator)


def draw(logits: torch.Tensor, k: int, draws: int = 4, seed: int = 1) -> torch.Tensor:
    return top_logprobs(logits, k, chances_ND=some_chances(logits.shape[0], draws, seed)).tail_ids_ND


def tail_of(logits_V: torch.Tensor, k: int) -> np.ndarray:
    """The distribution over what is not among the k largest, float64."""
    tail = logits_V.double().clone()
    tail[torch.topk(logits_V, k).indices] = -math.inf
    return np.asarray(torch.softmax(tail, dim=-1).numpy())


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """In standard deviations from its mean, over tokens of 10 expected draws and more and the rest as one."""
    expected = p * counts.sum()
    large = expected >= 10
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    freedom = observed.size - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(("k", "draws"), [(0, 1), (1, 1), (16, 1), (16, 4), (300, 2)])
def test_draws_follow_the_distribution_over_what_is_not_kept(k: int, draws: int) -> None:
    logits_V = some_logits(1, 2500, scale=1.5)[0]
    rows = 40_000 // draws
    drawn = draw(logits_V.expand(rows, -1).contiguous(), k, draws)
    p = tail_of(logits_V, k)
    counts = np.bincount(drawn.numpy().ravel(), minlength=p.size)
    assert (counts[p == 0] == 0).all()
    assert abs(chi_square(counts, p)) < 4


@pytest.mark.usefixtures("ways")
def test_draws_of_a_row_do_not_depend_on_each_other() -> None:
    drawn = draw(some_logits(1, 600, scale=0.0).expand(20_000, -1).contiguous(), 100, 2)
    assert bool((drawn >= 0).all())
    halves = (drawn < int(drawn.median())).double()
    # Of independent halves the correlation is within 4 / √rows.
    assert abs(float(torch.corrcoef(halves.T)[0, 1])) < 4 / math.sqrt(20_000)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("tail", [1e-2, 1e-6, 1e-12])
def test_a_tail_is_drawn_from_as_exactly_where_it_is_small(tail: float) -> None:
    # Subtracted from a float32 sum, a tail of 1e-6 would have lost all but its first digit.
    shape = some_logits(1, 3000, scale=1.5)[0].double()
    shape[:3] = -math.inf
    logits = torch.log_softmax(shape, dim=-1) + math.log(tail)
    logits[:3] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    rows = 30_000
    drawn = draw(logits.float().expand(rows, -1).contiguous(), 3, 1)
    p = np.asarray(torch.softmax(shape, dim=-1).numpy())
    assert abs(chi_square(np.bincount(drawn.numpy().ravel(), minlength=3000), p)) < 4


@pytest.mark.parametrize("k", [0, 1, 64])
@pytest.mark.parametrize("vocab_size", [70, 1024, VOCAB, 49_152])
def test_compiled_code_and_torch_draw_the_same(both_ways: list[TopOf], vocab_size: int, k: int) -> None:
    logits = some_logits(200, vocab_size)
    compiled, by_torch = [top(logits, k, chances_ND=some_chances(200, 16)).tail_ids_ND for top in both_ways]
    assert compiled.dtype == by_torch.dtype == torch.int32
    # A chance within rounding of the border of two tokens may fall on either.
    assert (compiled != by_torch).double().mean() < 1e-3


def test_vllms_whole_rows_are_drawn_from_as_logits_are() -> None:
    logits_V = some_logits(1, 1000, scale=1.5)[0]
    logprobs, ids = torch.log_softmax(logits_V, dim=-1).sort(descending=True)
    rows, k = 40_000, 8
    whole = np.tile(ids.numpy(), (rows, 1)), np.tile(logprobs.numpy(), (rows, 1))
    tokens, kept = keep_and_draw(*whole, k, some_chances(rows, 1).numpy())
    assert tokens.shape == kept.shape == (rows, k + 1)
    assert (tokens[:, :k] == ids[:k].numpy()).all()
    np.testing.assert_array_equal(kept[:, -1], torch.log_softmax(logits_V, dim=-1).numpy()[tokens[:, -1]])
    assert abs(chi_square(np.bincount(tokens[:, -1], minlength=1000), tail_of(logits_V, k))) < 4


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("chance", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_kept_and_impossible_tokens_are_never_drawn(chance: float) -> None:
    logits = some_logits(8, 5003)
    logits[:, ::3] = -math.inf
    logits[:, 4000:] = -math.inf
    top = top_logprobs(logits, 64, chances_ND=torch.full((8, 2), chance, dtype=torch.float64))
    drawn = top.tail_ids_ND.long()
    assert bool((drawn >= 0).all())
    assert bool(logits.gather(1, drawn).isfinite().all())
    assert not (drawn[:, :, None] == top.token_ids_NK[:, None].long()).any()


@pytest.mark.usefixtures("ways")
def test_padding_of_a_wider_row_is_never_drawn() -> None:
    padded = torch.zeros(500, 1088)
    padded[:, 1000:] = math.inf
    drawn = draw(padded[:, :1000], 4)
    assert bool(((drawn >= 0) & (drawn < 1000)).all())


@pytest.mark.usefixtures("ways")
def test_rows_without_a_tail_give_no_draw() -> None:
    logits = some_logits(4, 100)
    assert bool((draw(logits, 100) == -1).all())
    logits[1, 20:] = -math.inf
    logits[2] = -math.inf
    logits[3, 7] = math.nan
    drawn = draw(logits, 20)
    assert bool((drawn[0] >= 0).all())
    assert bool((drawn[1:] == -1).all())


@pytest.mark.usefixtures("ways")
def test_a_tail_that_float32_cannot_tell_from_nothing_is_none() -> None:
    logits = torch.full((1, 3000), -1000.0)
    logits[0, 5] = 0.0
    assert bool((draw(logits, 1) == -1).all())


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("k", [0, 16, 600])
def test_logits_are_as_before_and_entries_as_without_draws(k: int) -> None:
    logits = some_logits(5, VOCAB)
    logits[2, ::2] = math.nan
    before, room = logits.clone(), torch.empty(5, VOCAB)
    top = top_logprobs(logits, k, copy_NV=room, chances_ND=some_chances(5, 3))
    plain = top_logprobs(before, k)
    for same in (logits, room):
        np.testing.assert_array_equal(same.numpy(), before.numpy())
    assert torch.equal(top.token_ids_NK[[0, 1, 3, 4]], plain.token_ids_NK[[0, 1, 3, 4]])
    assert torch.allclose(top.normalisers_N1, plain.normalisers_N1, atol=4e-6, rtol=0, equal_nan=True)
