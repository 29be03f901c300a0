"""The distillation loss and its gradient against a dense reference in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lynearm.student import losses
from lynearm.student.losses import LossWeights, Targets, distillation_loss, measure_loss

# N = positions, H = width, V = vocabulary, K = kept entries
HIDDEN, VOCAB = 6, 23


@dataclass
class Case:
    hidden_NH: Tensor
    head_VH: Tensor
    bias_V: Tensor
    targets: Targets


def make_case(positions: int = 9, k: int = 4, *, padded: bool = True, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_NV = torch.log_softmax(2 * random(positions, VOCAB), -1)
    logprobs_NK, token_ids_NK = teacher_NV.topk(k, -1)
    if padded and k > 1:
        logprobs_NK[::2, -1] = -torch.inf
        token_ids_NK[::2, -1] = 0
    tail_N = (1 - logprobs_NK.exp().sum(-1)).clamp(0, 1)
    if k == VOCAB:
        tail_N[1::2] = 0.0
    sampled_N = torch.randint(0, VOCAB, (positions,), generator=generator)
    if k:
        sampled_N[0] = token_ids_NK[0, 0]
    targets = Targets(token_ids_NK, logprobs_NK, tail_N, sampled_N)
    return Case(
        random(positions, HIDDEN).requires_grad_(),
        random(VOCAB, HIDDEN).requires_grad_(),
        random(VOCAB).requires_grad_(),
        targets,
    )


def dense_losses(case: Case) -> tuple[Tensor, Tensor]:
    """KL over kept entries and one tail bucket, and cross-entropy, row by row, by plain autograd."""
    student_NV = torch.log_softmax(case.hidden_NH @ case.head_VH.T + case.bias_V, -1)
    kls: list[Tensor] = []
    for row, student_V in enumerate(student_NV):
        kept = case.targets.logprobs_NK[row] > -torch.inf
        ids = case.targets.token_ids_NK[row][kept]
        teacher = torch.cat([case.targets.logprobs_NK[row][kept].exp(), case.targets.tail_mass_N[row][None]])
        teacher = teacher / teacher.sum()
        outside = torch.ones(VOCAB, dtype=torch.bool)
        outside[ids] = False
        student = torch.cat([student_V[ids], student_V[outside].logsumexp(0)[None]])
        counted = teacher > 0
        kls.append((teacher[counted] * (teacher[counted].log() - student[counted])).sum())
    cross_entropy_N = -student_NV.gather(1, case.targets.sampled_ids_N[:, None])[:, 0]
    return torch.stack(kls), cross_entropy_N


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [case.hidden_NH, case.head_VH, case.bias_V]))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
@pytest.mark.parametrize("k", [0, 1, 4, VOCAB])
def test_loss_and_gradient_equal_the_dense_reference(k: int, weights: tuple[float, float]) -> None:
    case = make_case(k=k)
    kl_N, cross_entropy_N = dense_losses(case)
    expected = (weights[0] * kl_N + weights[1] * cross_entropy_N).sum() / 5.0
    result = distillation_loss(
        case.hidden_NH,
        case.head_VH,
        case.targets,
        bias_V=case.bias_V,
        weights=LossWeights(*weights),
        divisor=5.0,
    )
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.kl_N, kl_N.detach(), atol=1e-10, rtol=1e-7)
    torch.testing.assert_close(result.cross_entropy_N, cross_entropy_N.detach())
    for ours, reference in zip(gradients(result.loss, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-9, rtol=1e-7)


def test_chunks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(positions=11)
    whole = distillation_loss(case.hidden_NH, case.head_VH, case.targets, weights=LossWeights(1.0, 0.1))
    expected = torch.autograd.grad(whole.loss, [case.hidden_NH, case.head_VH])
    monkeypatch.setattr(losses, "CHUNK_POSITIONS", 4)
    pieces = distillation_loss(case.hidden_NH, case.head_VH, case.targets, weights=LossWeights(1.0, 0.1))
    found = torch.autograd.grad(pieces.loss, [case.hidden_NH, case.head_VH])
    torch.testing.assert_close(pieces.loss, whole.loss)
    torch.testing.assert_close(found, expected)
    kl_N, _ = measure_loss(case.hidden_NH, case.head_VH, case.targets)
    torch.testing.assert_close(kl_N, whole.kl_N)


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient() -> None:
    case = make_case(k=4, padded=False)
    own_NV = torch.log_softmax(case.hidden_NH @ case.head_VH.T, -1).detach()
    logprobs_NK, token_ids_NK = own_NV.topk(4, -1)
    targets = Targets(token_ids_NK, logprobs_NK, 1 - logprobs_NK.exp().sum(-1), case.targets.sampled_ids_N)
    result = distillation_loss(case.hidden_NH, case.head_VH, targets)
    assert float(result.kl_N.abs().max()) < 1e-12
    assert float(torch.autograd.grad(result.loss, case.hidden_NH)[0].abs().max()) < 1e-12


def test_probability_moved_within_the_tail_costs_nothing() -> None:
    logits_NV = torch.tensor([[3.0, 1.0, 0.5, 0.5]], dtype=torch.float64)
    moved_NV = torch.tensor([[3.0, 1.0, 0.2, 0.0]], dtype=torch.float64)
    moved_NV[0, 3] = (logits_NV[0, 2:].exp().sum() - moved_NV[0, 2].exp()).log()
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    targets = Targets(
        torch.tensor([[0, 1]]), logprobs_NV[:, :2], logprobs_NV[:, 2:].exp().sum(-1), torch.tensor([0])
    )
    identity_VH = torch.eye(4, dtype=torch.float64)
    kl_N, _ = measure_loss(moved_NV, identity_VH, targets)
    assert abs(float(kl_N)) < 1e-12


def test_a_certain_student_has_finite_loss_and_gradient_in_float32() -> None:
    case = make_case()
    hidden_NH = (case.hidden_NH.detach() * 1e3).float().requires_grad_()
    head_VH = case.head_VH.detach().float()
    targets = Targets(
        case.targets.token_ids_NK,
        case.targets.logprobs_NK.float(),
        case.targets.tail_mass_N.float(),
        case.targets.sampled_ids_N,
    )
    result = distillation_loss(hidden_NH, head_VH, targets, weights=LossWeights(1.0, 1.0))
    (gradient_NH,) = torch.autograd.grad(result.loss, hidden_NH)
    assert bool(torch.isfinite(result.loss))
    assert bool(torch.isfinite(gradient_NH).all())


def test_float32_agrees_with_float64_to_rounding() -> None:
    case = make_case(positions=64)
    expected, _ = dense_losses(case)
    targets = Targets(
        case.targets.token_ids_NK,
        case.targets.logprobs_NK.float(),
        case.targets.tail_mass_N.float(),
        case.targets.sampled_ids_N,
    )
    kl_N, _ = measure_loss(
        case.hidden_NH.detach().float(),
        case.head_VH.detach().float(),
        targets,
        bias_V=case.bias_V.detach().float(),
    )
    torch.testing.assert_close(kl_N.double(), expected.detach(), atol=2e-5, rtol=1e-5)
