"""Rows from logits: normalisers against float64, top entries against torch's own, draws against their law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lynearm.teacher import distributions
from lynearm.teacher.distributions import logprobs_at, temper, top_logprobs
from lynearm.teacher.draws import draw_from_logits


def some_logits(rows: int, vocab_size: int, *, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(params=[1, 64], ids=["compiled", "torch"], autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few threads, where compiled code looks at rows, and many, where torch does."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def log_normalisers(logits: torch.Tensor) -> torch.Tensor:
    return top_logprobs(logits, 0).normalisers_N1


def top_entries(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits and their places; checks that their logprobs are these less the normaliser."""
    logprobs, token_ids, normalisers, drawn = top_logprobs(logits, k)
    assert drawn.shape == (logits.shape[0], 0)
    assert token_ids.dtype == torch.int32
    token_ids = token_ids.long()
    assert torch.equal(normalisers, log_normalisers(logits)) or bool(normalisers.isnan().any())
    assert torch.equal(logprobs.nan_to_num(), logprobs_at(logits, token_ids, normalisers).nan_to_num())
    return logits.gather(1, token_ids), token_ids


@pytest.mark.parametrize("vocab_size", [1, 7, 384, 49_152, 151_936])
@pytest.mark.parametrize("scale", [0.0, 4.0, 40.0])
def test_normalisers_are_those_of_float64(vocab_size: int, scale: float) -> None:
    logits = some_logits(5, vocab_size, scale=scale) + 20
    found = log_normalisers(logits)
    expected = torch.logsumexp(logits.double(), dim=-1, keepdim=True)
    assert found.shape == (5, 1)
    # Within two steps of float32 at values of that size.
    assert (found.double() - expected).abs().max() <= 2 * 2**-23 * max(1.0, float(expected.abs().max()))


def test_normalisers_do_not_depend_on_how_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = some_logits(23, 1000)
    whole = log_normalisers(logits)
    monkeypatch.setattr(distributions, "_CHUNK_BYTES", 4000)
    assert torch.equal(log_normalisers(logits), whole)


def test_kept_mass_and_tail_are_one() -> None:
    # As torch's own float32 log-softmax leaves them, they are off by 1.3e-5.
    logits = some_logits(8, 151_936)
    mass = (logits.double() - log_normalisers(logits)).exp().sum(-1)
    assert (mass - 1).abs().max() < 3e-6


def test_masked_tokens_have_no_mass() -> None:
    logits = some_logits(3, 500)
    logits[:, 100:] = -math.inf
    normalisers = log_normalisers(logits)
    assert torch.allclose(normalisers, torch.logsumexp(logits[:, :100], -1, keepdim=True))
    values, ids = top_entries(logits, 120)
    assert bool((ids[:, :100] < 100).all())
    assert bool(values[:, :100].isfinite().all())
    assert bool((values[:, 100:] == -math.inf).all())


@pytest.mark.parametrize("k", [0, 1, 2, 16, 64, 256, 257, 1000, 1024])
@pytest.mark.parametrize("vocab_size", [1024, 1025, 5003, 49_152])
def test_top_entries_are_torchs(vocab_size: int, k: int) -> None:
    logits = some_logits(6, vocab_size)
    values, ids = top_entries(logits, k)
    expected = torch.topk(logits, k, dim=-1)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)


def test_largest_entries_behind_the_last_whole_block_are_found() -> None:
    logits = some_logits(3, 5003)
    logits[:, 4992:] += 100
    values, ids = top_entries(logits, 16)
    assert torch.equal(values, torch.topk(logits, 16, dim=-1).values)
    assert bool((ids[:, :11] >= 4992).all())


def test_rows_in_order_are_searched_to_their_end() -> None:
    # Each entry found is larger, or smaller, than all before it.
    logits = torch.arange(5003.0).repeat(2, 1) / 100
    logits[1] = -logits[1]
    _, ids = top_entries(logits, 20)
    assert ids.tolist() == [list(range(5002, 4982, -1)), list(range(20))]


def test_a_part_of_wider_rows_is_looked_at_alone() -> None:
    # Logits of a vocabulary that vLLM has padded.
    padded = some_logits(4, 8064)
    padded[:, 8000:] = math.inf
    values, _ = top_entries(padded[:, :8000], 16)
    whole = padded[:, :8000].contiguous()
    assert torch.equal(values, torch.topk(whole, 16, dim=-1).values)
    assert torch.equal(log_normalisers(padded[:, :8000]), log_normalisers(whole))


@pytest.mark.parametrize("places", [[5], [900], list(range(0, 5003, 50)), list(range(5003))])
@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_a_row_that_holds_nan_has_no_logprobs_and_leaves_the_others(places: list[int], nan: float) -> None:
    logits = some_logits(3, 5003)
    logits[1, places] = nan
    values, _ = top_entries(logits, 16)
    logprobs = top_logprobs(logits, 16).logprobs_NK
    assert bool(logprobs[1].isnan().all())
    assert torch.equal(values[::2], torch.topk(logits[::2], 16, dim=-1).values)
    assert bool(logprobs[::2].isfinite().all())


@pytest.mark.parametrize("k", [0, 16, 600])
def test_a_copy_is_left_where_it_is_wanted(k: int) -> None:
    logits = some_logits(3, 5003)
    before, room = logits.clone(), torch.full((5, 5003), math.nan)
    top = top_logprobs(logits, k, copy_NV=room[:3])
    assert torch.equal(room[:3], logits)
    assert torch.equal(logits, before)
    assert bool(room[3:].isnan().all())
    assert all(map(torch.equal, top, top_logprobs(logits, k)))


@pytest.mark.parametrize("k", [1, 16, 64])
def test_equal_entries_are_taken_once_each(k: int) -> None:
    # As of bfloat16 logits: a handful of values, thousands of ties.
    logits = some_logits(6, 5003).round()
    values, ids = top_entries(logits, k)
    assert torch.equal(values, torch.topk(logits, k, dim=-1).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_rows_of_equal_logits_are_uniform() -> None:
    logits = torch.zeros(2, 4096)
    values, ids = top_entries(logits, 64)
    logprobs = logprobs_at(logits, ids, log_normalisers(logits))
    assert torch.allclose(logprobs, torch.full_like(values, -math.log(4096)))
    assert all(len(set(row)) == 64 for row in ids.tolist())


def test_a_temperature_divides_and_leaves_the_logits() -> None:
    logits = some_logits(2, 10).bfloat16()
    before = logits.clone()
    kept = torch.empty(2, 10)
    assert torch.equal(temper(logits, 2.0), before.float() / 2)
    assert temper(logits, 0.5, out=kept) is kept
    assert torch.equal(kept, before.float() / 0.5)
    assert torch.equal(temper(logits, 1.0, out=kept), before.float())
    assert torch.equal(logits, before)
    right = some_logits(1, 3)
    assert temper(right, 1.0) is right


def test_draws_from_logits_estimate_the_distribution_without_bias() -> None:
    logits = some_logits(1, 40, scale=2.0)
    rows, draws = 4000, 10
    generator = torch.Generator().manual_seed(1)
    ids, logprobs = draw_from_logits(logits.expand(rows, -1), draws, generator)
    assert ids.shape == logprobs.shape == (rows, draws)
    assert bool((logprobs[:, 1:] <= logprobs[:, :-1]).all())
    counts = (logprobs.double().exp() * draws).round()
    assert bool((counts.sum(1) == draws).all())
    assert all(
        len(set(row[: int(kept)])) == kept
        for row, kept in zip(ids.tolist(), (counts > 0).sum(1).tolist(), strict=True)
    )
    means = np.bincount(ids.flatten().numpy(), counts.flatten().numpy(), minlength=40) / (rows * draws)
    p = torch.softmax(logits[0].double(), 0).numpy()
    # Five standard errors of a mean of 40,000 draws.
    assert (np.abs(means - p) < 5 * np.sqrt(p * (1 - p) / (rows * draws)) + 1e-9).all()


def test_what_is_masked_is_never_drawn() -> None:
    logits = torch.zeros(50, 300)
    logits[:, ::2] = -math.inf
    ids, logprobs = draw_from_logits(logits, 20, torch.Generator().manual_seed(2))
    assert bool((ids[logprobs > -math.inf] % 2 == 1).all())


def test_a_certain_token_takes_every_draw() -> None:
    logits = torch.full((2, 300), -200.0)
    logits[:, 299] = 0
    ids, logprobs = draw_from_logits(logits, 5, torch.Generator().manual_seed(3))
    assert ids[:, 0].tolist() == [299, 299]
    assert logprobs[:, 0].tolist() == [0, 0]
    assert bool((logprobs[:, 1:] == -math.inf).all())
