"""Losses between hidden states."""

from __future__ import annotations

import pytest
import torch

from lynearm.student.losses.hidden import HiddenLossKind, HiddenStateLoss
from lynearm.wire.errors import ConfigError, MisalignmentError

kinds = pytest.mark.parametrize("kind", ["cosine", "mse"])


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@kinds
def test_the_loss_is_the_plain_mean_over_positions_and_pairs(kind: HiddenLossKind) -> None:
    teacher_NLH, student = states(7, 3, 5), [states(7, 4, seed=1), states(7, 4, seed=2)]
    loss = HiddenStateLoss([(0, 0), (1, 2)], student_width=4, teacher_width=5, kind=kind).double()
    weights_N = torch.tensor([1.0, 0, 2, 1, 1, 0.5, 0], dtype=torch.float64)
    expected = torch.zeros(())
    for projection, ours, theirs in zip(loss.projections, student, (0, 2), strict=True):
        projected_NH, target_NH = ours @ projection.get_parameter("weight").T, teacher_NLH[:, theirs]
        if kind == "cosine":
            apart_N = 1 - (projected_NH * target_NH).sum(1) / projected_NH.norm(dim=1) / target_NH.norm(dim=1)
        else:
            power = (weights_N * target_NH.square().mean(1)).sum() / weights_N.sum()
            apart_N = (projected_NH - target_NH).square().mean(1) / power
        expected = expected + (weights_N * apart_N).sum() / weights_N.sum() / 2
    torch.testing.assert_close(loss(student, teacher_NLH, weights_N), expected)


@kinds
def test_equal_states_of_one_width_cost_nothing(kind: HiddenLossKind) -> None:
    teacher_NLH = states(7, 2, 5)
    loss = HiddenStateLoss([(0, 1)], student_width=5, teacher_width=5, kind=kind).double()
    assert abs(float(loss([teacher_NLH[:, 1]], teacher_NLH).detach())) < 1e-12


@kinds
def test_projections_learn_what_turns_one_into_the_other(kind: HiddenLossKind) -> None:
    student_NS = states(64, 4)
    teacher_NLH = (student_NS @ states(4, 6, seed=3))[:, None]
    loss = HiddenStateLoss([(0, 0)], student_width=4, teacher_width=6, kind=kind).double()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        value = loss([student_NS], teacher_NLH)
        torch.autograd.backward(value)
        optimizer.step()
    assert float(value.detach()) < 1e-3


@kinds
def test_states_of_no_length_and_positions_of_no_weight_give_finite_gradients(kind: HiddenLossKind) -> None:
    student_NS = torch.zeros(3, 4, requires_grad=True)
    loss = HiddenStateLoss([(0, 0)], student_width=4, teacher_width=4, kind=kind)
    for weights_N in (None, torch.zeros(3)):
        value = loss([student_NS], torch.zeros(3, 1, 4), weights_N)
        (grad_NS,) = torch.autograd.grad(value, [student_NS])
        assert float(value.detach()) == 0.0
        assert bool(torch.isfinite(grad_NS).all())


def test_what_cannot_be_compared_is_refused() -> None:
    for pairs in ([], [(0, -1)]):
        with pytest.raises(ConfigError, match="pairs of layers"):
            HiddenStateLoss(pairs, student_width=4, teacher_width=4)
    with pytest.raises(ConfigError, match="'l1' is not known"):
        HiddenStateLoss([(0, 0)], student_width=4, teacher_width=4, kind="l1")  # type: ignore[arg-type]  # wrong on purpose
    loss = HiddenStateLoss([(1, 2)], student_width=4, teacher_width=5)
    with pytest.raises(MisalignmentError, match="teacher's states have shape"):
        loss([states(7, 4)] * 2, states(7, 2, 5))
    with pytest.raises(MisalignmentError, match="layer 1 have shape None"):
        loss([states(7, 4)], states(7, 3, 5))
