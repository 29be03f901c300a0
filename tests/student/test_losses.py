"""Every loss and its gradient against a dense reference in float64, and where losses usually break."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from student.dense_reference import (
    EVERY_LOSS,
    HIDDEN,
    VOCAB,
    Case,
    dense_loss,
    gradients,
    is_finite,
    make_case,
)
from torch import Tensor

from lynearm.student.losses import (
    Targets,
    backpropagate_loss,
    distillation_loss,
    head_gradients,
    in_place,
    logit_chunks,
    measure_loss,
)
from lynearm.student.losses.teacher import retemper
from lynearm.student.objective import LossTerm, Objective
from lynearm.wire.errors import InvalidInputError

every_loss = pytest.mark.parametrize("term", EVERY_LOSS, ids=str)


def check_against_dense(case: Case, objective: Objective) -> None:
    expected = dense_loss(case, objective, divisor=5.0)
    result = distillation_loss(
        case.hidden_NH, case.head_VH, case.targets, bias_V=case.bias_V, objective=objective, divisor=5.0
    )
    torch.testing.assert_close(result.loss, expected, atol=1e-9, rtol=1e-7)
    for ours, reference in zip(
        gradients(result.loss, case.leaves), gradients(expected, case.leaves), strict=True
    ):
        torch.testing.assert_close(ours, reference, atol=1e-9, rtol=1e-7)


def as_float32(case: Case, *, factor: float = 1.0) -> Case:
    targets = case.targets
    return Case(
        (case.hidden_NH.detach() * factor).float().requires_grad_(),
        case.head_VH.detach().float().requires_grad_(),
        case.bias_V.detach().float().requires_grad_(),
        replace(targets, logprobs_NK=targets.logprobs_NK.float(), tail_mass_N=targets.tail_mass_N.float()),
    )


@every_loss
@pytest.mark.parametrize("k", [0, 1, 4, VOCAB - 1, VOCAB])
def test_loss_and_gradient_equal_the_dense_reference(term: LossTerm, k: int) -> None:
    check_against_dense(make_case(k=k), Objective((term,)))


def test_a_sum_of_all_losses_equals_the_dense_reference() -> None:
    terms = tuple(replace(term, weight=0.1 * (number + 1)) for number, term in enumerate(EVERY_LOSS))
    check_against_dense(make_case(), Objective(terms))


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@every_loss
def test_a_temperature_divides_the_logits_of_all_but_cross_entropy(
    term: LossTerm, temperature: float
) -> None:
    terms = (term,) if term.name == "cross-entropy" else (term, LossTerm("cross-entropy", 0.3))
    check_against_dense(
        make_case(), Objective(terms, temperature=temperature, teacher_temperature=temperature)
    )


@every_loss
def test_positions_count_by_their_weights(term: LossTerm) -> None:
    case = make_case()
    weights_N = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)
    case.targets = replace(case.targets, weights_N=weights_N)
    check_against_dense(case, Objective((term,)))
    mean = distillation_loss(case.hidden_NH, case.head_VH, case.targets, objective=Objective((term,)))
    torch.testing.assert_close(mean.loss, (mean.loss_N * weights_N).sum() / weights_N.sum())


def test_a_token_that_was_not_drawn_from_the_row_says_nothing_of_its_tail() -> None:
    case = make_case()
    objective = Objective((LossTerm("tail-cross-entropy", 0.7), LossTerm("jsd", mix=0.5)))
    drawn_N = torch.arange(9) % 3 > 0
    case.targets = replace(case.targets, drawn_N=drawn_N)
    check_against_dense(case, objective)
    no_tail = replace(case.targets, tail_mass_N=torch.zeros_like(case.targets.tail_mass_N))
    only = Objective((LossTerm("tail-cross-entropy"),))
    result = distillation_loss(case.hidden_NH, case.head_VH, case.targets, objective=only)
    assert not result.loss_N[~drawn_N].any()
    assert result.loss_N[drawn_N].any()
    assert not distillation_loss(case.hidden_NH, case.head_VH, no_tail, objective=only).loss_N.any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("k", [0, 1, 6])
def test_drawn_tokens_teach_the_whole_distribution_in_the_mean(k: int, temperature: float) -> None:
    """Over all tokens that may be drawn, each by its probability: the gradient of KL over the vocabulary."""
    case = make_case(positions=1, k=VOCAB, padded=False)
    case.targets.tail_mass_N.zero_()
    every = replace(case.targets, sampled_ids_N=torch.zeros(1, dtype=torch.int64))
    settings = {"temperature": temperature, "teacher_temperature": temperature}
    whole = Objective((LossTerm("forward-kl"),), **settings)
    expected = gradients(
        distillation_loss(case.hidden_NH, case.head_VH, every, objective=whole).loss, case.leaves[:2]
    )
    logprobs_1K, ids_1K = every.logprobs_NK[:, :k], every.token_ids_NK[:, :k]
    kept = Targets(ids_1K, logprobs_1K, 1 - logprobs_1K.exp().sum(1), every.sampled_ids_N)
    both = Objective((LossTerm("forward-kl"), LossTerm("tail-cross-entropy")), **settings)
    means = [torch.zeros_like(gradient) for gradient in expected]
    for token, logprob in zip(every.token_ids_NK[0], every.logprobs_NK[0], strict=True):
        drawn = replace(kept, sampled_ids_N=token[None])
        loss = distillation_loss(case.hidden_NH, case.head_VH, drawn, objective=both).loss
        for mean, gradient in zip(means, gradients(loss, case.leaves[:2]), strict=True):
            mean += logprob.exp() * gradient
    for mean, gradient in zip(means, expected, strict=True):
        torch.testing.assert_close(mean, gradient, atol=1e-9, rtol=1e-7)


@every_loss
@pytest.mark.parametrize("vocab_size", [VOCAB - 4, VOCAB])
def test_rows_of_the_head_beyond_the_vocabulary_have_no_part(term: LossTerm, vocab_size: int) -> None:
    case = make_case(k=6)
    ids_NK = case.targets.token_ids_NK.clone()
    # A teacher whose head is wider than the student's: an entry in its padding.
    ids_NK[1, 2] = VOCAB + 5
    case.targets = replace(
        case.targets, token_ids_NK=ids_NK, sampled_ids_N=case.targets.sampled_ids_N % vocab_size
    )
    objective = Objective((term,), vocab_size=vocab_size)
    check_against_dense(case, objective)
    result = distillation_loss(
        case.hidden_NH, case.head_VH, case.targets, bias_V=case.bias_V, objective=objective
    )
    _, head_grad_VH, bias_grad_V = gradients(result.loss, case.leaves)
    assert not head_grad_VH[vocab_size:].any()
    assert not bias_grad_V[vocab_size:].any()


@every_loss
def test_a_row_that_says_nothing_costs_nothing(term: LossTerm) -> None:
    case = make_case()
    if term.name == "cross-entropy":
        return
    silent = replace(
        case.targets,
        logprobs_NK=torch.full_like(case.targets.logprobs_NK, -torch.inf),
        tail_mass_N=torch.zeros_like(case.targets.tail_mass_N),
    )
    result = distillation_loss(case.hidden_NH, case.head_VH, silent, objective=Objective((term,)))
    assert float(result.loss.detach().abs()) < 1e-12
    grads = torch.autograd.grad(result.loss, [case.hidden_NH, case.head_VH])
    assert max(float(grad.abs().max()) for grad in grads) < 1e-12


@pytest.mark.parametrize("name", ["forward-kl", "reverse-kl", "jsd", "skew-kl", "skew-reverse-kl"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(name: str, dtype: torch.dtype) -> None:
    case = make_case(k=4, padded=False)
    hidden_NH, head_VH = case.hidden_NH.detach().to(dtype).requires_grad_(), case.head_VH.detach().to(dtype)
    own_NV = torch.log_softmax(hidden_NH.detach() @ head_VH.T, -1)
    logprobs_NK, token_ids_NK = own_NV.topk(4, -1)
    targets = Targets(token_ids_NK, logprobs_NK, 1 - logprobs_NK.exp().sum(-1), case.targets.sampled_ids_N)
    mix = {"jsd": 0.5, "skew-kl": 0.1, "skew-reverse-kl": 0.1}.get(name, 0.0)
    objective = Objective((LossTerm(name, mix=mix),))  # type: ignore[arg-type]  # parametrised
    result = distillation_loss(hidden_NH, head_VH, targets, objective=objective)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert float(result.loss_N.abs().max()) < tolerance
    assert float(torch.autograd.grad(result.loss, hidden_NH)[0].abs().max()) < tolerance


def test_reverse_kl_does_not_let_the_student_empty_the_support() -> None:
    """Σ q log(q/p) over the kept entries alone falls without bound of reason as their q goes to 0."""
    identity_VH = torch.eye(6, dtype=torch.float64)
    targets = Targets(
        torch.tensor([[0, 1]]),
        torch.tensor([[0.6, 0.3]], dtype=torch.float64).log(),
        torch.tensor([0.1], dtype=torch.float64),
        torch.tensor([0]),
    )
    objective = Objective((LossTerm("reverse-kl"),))
    leaning = [
        float(
            distillation_loss(
                torch.tensor([[0.7 - away, -away, 0, 0, 0, 0]], dtype=torch.float64),
                identity_VH,
                targets,
                objective=objective,
            ).loss_N
        )
        for away in (-2.5, 0.0, 5.0, 20.0)
    ]
    assert leaning == sorted(leaning)
    assert leaning[-1] == pytest.approx(-torch.tensor(0.1).log().item(), rel=1e-3)


def test_a_teacher_without_any_tail_leaves_reverse_losses_finite() -> None:
    case = make_case()
    logprobs_NK = torch.log_softmax(torch.randn(9, 4, dtype=torch.float64), -1)
    targets = replace(case.targets, logprobs_NK=logprobs_NK, tail_mass_N=torch.zeros(9).double())
    for term in EVERY_LOSS:
        case.targets = targets
        check_against_dense(case, Objective((term,)))


def test_draws_teach_in_the_mean_what_the_whole_distribution_teaches() -> None:
    """The mean of the gradients over draws, enumerated with their probabilities, is forward KL's."""
    generator = torch.Generator().manual_seed(3)
    p_V = torch.softmax(torch.randn(3, generator=generator, dtype=torch.float64), 0)
    logits_1V = torch.randn(1, 3, generator=generator, dtype=torch.float64).requires_grad_()
    identity_VV, nothing = torch.eye(3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    sampled_1 = torch.tensor([0])

    def gradient(ids: list[int], probabilities: Tensor, name: str) -> Tensor:
        targets = Targets(torch.tensor([ids]), probabilities.log()[None], nothing, sampled_1)
        objective = Objective((LossTerm(name),))  # type: ignore[arg-type]  # one of two
        result = distillation_loss(logits_1V, identity_VV, targets, objective=objective)
        return gradients(result.loss, [logits_1V])[0]

    whole = gradient([0, 1, 2], p_V, "forward-kl")
    mean = torch.zeros_like(whole)
    for first in range(3):
        for second in range(3):
            counts_V = torch.zeros(3, dtype=torch.float64)
            counts_V[first] += 1
            counts_V[second] += 1
            ids = counts_V.nonzero()[:, 0].tolist()
            mean += p_V[first] * p_V[second] * gradient(ids, counts_V[ids] / 2, "sampled-kd")
    torch.testing.assert_close(mean, whole)


def with_tail_draws(case: Case, draws: int, *, every: int = 1, seed: int = 0) -> Case:
    """The case with tokens drawn evenly from what each row does not keep, in one row of `every`."""
    targets = case.targets
    generator = torch.Generator().manual_seed(seed)
    tail_ids_ND = torch.full((len(targets), draws), -1)
    for row in range(0, len(targets), every):
        outside_V = torch.ones(VOCAB)
        outside_V[targets.token_ids_NK[row][targets.logprobs_NK[row] > -torch.inf]] = 0.0
        if outside_V.any() and targets.tail_mass_N[row]:
            tail_ids_ND[row] = torch.multinomial(outside_V, draws, replacement=True, generator=generator)
    return replace(case, targets=replace(targets, tail_ids_ND=tail_ids_ND))


TAIL = LossTerm("tail-cross-entropy", 0.7)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("k", [0, 1, 6, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("others", [(), (LossTerm("forward-kl"), LossTerm("cross-entropy", 0.1))])
def test_draws_of_the_tail_equal_the_dense_reference(
    draws: int, k: int, others: tuple[LossTerm, ...]
) -> None:
    # Rows without draws go by the token that was written, as ever.
    case = with_tail_draws(make_case(k=k), draws, every=2)
    check_against_dense(case, Objective((*others, TAIL)))
    check_against_dense(case, Objective((*others, TAIL), temperature=0.7, teacher_temperature=0.7))
    weighted = replace(case.targets, weights_N=torch.arange(9.0))
    check_against_dense(replace(case, targets=weighted), Objective((*others, TAIL)))
    # Which tokens the completion has, and how it came by them, is then no matter.
    drawn = with_tail_draws(make_case(k=k), draws)
    picked = replace(drawn.targets, drawn_N=torch.zeros(9, dtype=torch.bool))
    other = replace(picked, sampled_ids_N=(picked.sampled_ids_N + 5) % VOCAB)
    results = [
        distillation_loss(drawn.hidden_NH, drawn.head_VH, targets, objective=Objective((TAIL,))).loss_N
        for targets in (drawn.targets, picked, other)
    ]
    if k < VOCAB:
        assert results[0].any()
        torch.testing.assert_close(results, [results[0]] * 3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("k", "draws"), [(0, 1), (1, 1), (6, 1), (19, 2)])
def test_draws_of_the_tail_teach_the_whole_distribution_in_the_mean(
    k: int, draws: int, temperature: float
) -> None:
    """Over all tokens that may be drawn, each by its probability: the gradient of KL over the vocabulary.

    Rounding has left the rows' sum off one, which takes nothing from that: all buckets are normalised alike.
    """
    case = make_case(positions=1, k=VOCAB, padded=False)
    ids_V, logprobs_V = case.targets.token_ids_NK[0], case.targets.logprobs_NK[0]
    settings = {"temperature": temperature, "teacher_temperature": temperature}
    whole = Objective((LossTerm("forward-kl"),), **settings)
    every = replace(case.targets, tail_mass_N=torch.zeros(1).double())
    expected = gradients(
        distillation_loss(case.hidden_NH, case.head_VH, every, objective=whole).loss, case.leaves[:2]
    )
    off = 1.0 + 1e-3
    tail_mass = 1 - logprobs_V[:k].exp().sum()
    both = Objective((LossTerm("forward-kl"), LossTerm("tail-cross-entropy")), **settings)
    means = [torch.zeros_like(gradient) for gradient in expected]
    for chosen in itertools.product(range(k, VOCAB), repeat=draws):
        targets = Targets(
            ids_V[None, :k],
            (logprobs_V[None, :k].exp() * off).log(),
            (tail_mass * off)[None],
            case.targets.sampled_ids_N,
            drawn_N=torch.zeros(1, dtype=torch.bool),
            tail_ids_ND=ids_V[list(chosen)][None],
        )
        loss = distillation_loss(case.hidden_NH, case.head_VH, targets, objective=both).loss
        probability = (logprobs_V[list(chosen)].exp() / tail_mass).prod()
        for mean, gradient in zip(means, gradients(loss, case.leaves[:2]), strict=True):
            mean += probability * gradient
    for mean, gradient in zip(means, expected, strict=True):
        torch.testing.assert_close(mean, gradient, atol=1e-9, rtol=1e-7)


def test_draws_beyond_the_students_vocabulary_count_for_nothing() -> None:
    narrow = VOCAB - 4
    case = with_tail_draws(make_case(k=4), 3)
    case = replace(case, targets=replace(case.targets, sampled_ids_N=case.targets.sampled_ids_N % narrow))
    assert case.targets.tail_ids_ND is not None
    case.targets.tail_ids_ND[::2, 1] = VOCAB + 9
    case.targets.tail_ids_ND[3] = VOCAB
    check_against_dense(case, Objective((TAIL,), vocab_size=narrow))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 30.0, 1e4])
def test_draws_of_the_tail_leave_a_sure_student_finite(factor: float, dtype: torch.dtype) -> None:
    for k in (0, 4, VOCAB - 1, VOCAB):
        case = as_float32(with_tail_draws(make_case(k=k), 2), factor=factor)
        hidden_NH = case.hidden_NH.detach().to(dtype).requires_grad_()
        result = distillation_loss(hidden_NH, case.head_VH, case.targets, objective=Objective((TAIL,)))
        grads = torch.autograd.grad(result.loss, [hidden_NH, case.head_VH])
        assert is_finite(result.loss.detach(), result.loss_N, *grads)


def test_draws_of_the_tail_survive_chunks_blocks_and_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    case = with_tail_draws(make_case(positions=11), 2, every=2)
    objective = Objective((LossTerm("forward-kl"), TAIL))

    def run() -> list[Tensor]:
        result = distillation_loss(case.hidden_NH, case.head_VH, case.targets, objective=objective)
        return [result.loss.detach(), *torch.autograd.grad(result.loss, [case.hidden_NH, case.head_VH])]

    whole = run()
    monkeypatch.setattr(logit_chunks, "CHUNK_BYTES", 4 * VOCAB * 8)
    torch.testing.assert_close(run(), whole)
    for leaf in (case.hidden_NH, case.head_VH):
        leaf.grad = None
    loss = backpropagate_loss(case.hidden_NH, case.head_VH, case.targets, objective=objective).loss
    torch.testing.assert_close([loss, case.hidden_NH.grad, case.head_VH.grad], whole)


@every_loss
@pytest.mark.parametrize("factor", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_a_sure_student_has_finite_losses_and_gradients(
    term: LossTerm, factor: float, temperature: float
) -> None:
    objective = Objective((term,), temperature=temperature, teacher_temperature=temperature)
    for k in (0, 1, 4, VOCAB):
        case = as_float32(make_case(k=k), factor=factor)
        for dtype in (torch.float32, torch.bfloat16):
            hidden_NH = case.hidden_NH.detach().to(dtype).requires_grad_()
            result = distillation_loss(hidden_NH, case.head_VH, case.targets, objective=objective)
            grads = torch.autograd.grad(result.loss, [hidden_NH, case.head_VH])
            assert is_finite(result.loss.detach(), result.loss_N, result.kl_N, *grads)


def test_a_student_that_has_nothing_outside_the_support_is_still_drawn_there() -> None:
    """1 − Σ q_k is 0 in float32 here, and the tail of a softmax underflows: the gradient must not be lost."""
    logits_1V = torch.tensor([[200.0, 0.0, -1.0, -2.0]], requires_grad=True)
    targets = Targets(
        torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]), torch.tensor([0])
    )
    result = distillation_loss(logits_1V, torch.eye(4), targets)
    (gradient_1V,) = gradients(result.loss, [logits_1V])
    tail_V = torch.softmax(torch.tensor([0.0, -1.0, -2.0]), 0)
    torch.testing.assert_close(gradient_1V, torch.cat([torch.tensor([0.5]), -0.5 * tail_V])[None])
    assert float(result.kl_N) == pytest.approx(0.5 * (200 - 0.4076) - 0.6931, rel=1e-5)


@every_loss
def test_float32_agrees_with_float64_to_rounding(term: LossTerm) -> None:
    case = make_case(positions=64)
    objective = Objective((term,))
    expected = dense_loss(case, objective, 64.0)
    rounded = as_float32(case)
    found = distillation_loss(
        rounded.hidden_NH, rounded.head_VH, rounded.targets, bias_V=rounded.bias_V, objective=objective
    ).loss
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-6)
    for ours, reference in zip(
        gradients(found, rounded.leaves), gradients(expected, case.leaves), strict=True
    ):
        torch.testing.assert_close(ours.double(), reference, atol=2e-6, rtol=1e-4)


@every_loss
def test_autocast_agrees_to_the_rounding_of_bfloat16(term: LossTerm) -> None:
    case = as_float32(make_case(positions=64))
    objective = Objective((term, LossTerm("cross-entropy", 0.1))[: 1 + (term.name != "cross-entropy")])
    found: list[list[Tensor]] = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = distillation_loss(case.hidden_NH, case.head_VH, case.targets, objective=objective)
        grads = torch.autograd.grad(result.loss, [case.hidden_NH, case.head_VH])
        assert all(grad.dtype == torch.float32 for grad in grads)
        found.append([result.loss.detach(), *grads])
    for exact, rounded in zip(*found, strict=True):
        assert float((exact - rounded).norm() / exact.norm()) < 0.02


@settings(max_examples=25, deadline=None)
@given(
    positions=st.integers(0, 12),
    k=st.integers(0, VOCAB),
    seed=st.integers(0, 99),
    sure=st.floats(0.0, 8.0),
    terms=st.lists(st.sampled_from(EVERY_LOSS), min_size=1, max_size=3, unique=True),
)
def test_any_rows_equal_the_dense_reference(
    positions: int, k: int, seed: int, sure: float, terms: list[LossTerm]
) -> None:
    check_against_dense(make_case(positions, k, seed=seed, sure=sure), Objective(tuple(terms)))


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_chunks_and_blocks_change_neither_loss_nor_gradient(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    case = make_case(positions=11)
    objective = Objective(
        (LossTerm("jsd", mix=0.5), LossTerm("cross-entropy", 0.1)),
        temperature=temperature,
        teacher_temperature=temperature,
    )

    def run() -> list[Tensor]:
        result = distillation_loss(case.hidden_NH, case.head_VH, case.targets, objective=objective)
        kl_N, _ = measure_loss(case.hidden_NH, case.head_VH, case.targets, objective=objective)
        grads = torch.autograd.grad(result.loss, [case.hidden_NH, case.head_VH])
        return [result.loss.detach(), result.kl_N, kl_N, *grads]

    whole = run()
    monkeypatch.setattr(logit_chunks, "CHUNK_BYTES", 4 * VOCAB * 8)
    monkeypatch.setattr(logit_chunks, "BLOCK_BYTES", 3 * VOCAB * 8)
    torch.testing.assert_close(run(), whole)
    monkeypatch.setattr(head_gradients, "_HEAD_ROWS", 5)
    hidden_NH = case.hidden_NH.detach().bfloat16().requires_grad_()
    result = distillation_loss(hidden_NH, case.head_VH, case.targets, objective=objective)
    (grad_VH,) = torch.autograd.grad(result.loss, [case.head_VH])
    assert float((grad_VH - whole[-1]).norm() / whole[-1].norm()) < 0.03


@pytest.mark.parametrize(
    ("positions", "k"), [(1, 4), (2, VOCAB), (HIDDEN - 1, 0), (HIDDEN, 4), (HIDDEN + 1, 4)]
)
@pytest.mark.parametrize("rows_bytes", [1, 4 * HIDDEN * 8, 8 << 20])
@pytest.mark.parametrize("vocab_size", [VOCAB - 4, VOCAB])
def test_logits_in_the_place_of_the_gradient_leave_the_gradient_of_any_shape(
    positions: int, k: int, rows_bytes: int, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "_ROWS_BYTES", rows_bytes)
    case = make_case(positions, k)
    case.targets = replace(case.targets, sampled_ids_N=case.targets.sampled_ids_N % vocab_size)
    objective = Objective(EVERY_LOSS, vocab_size=vocab_size)
    check_against_dense(case, objective)
    # A gradient that is there already is added to, and not written over.
    head_VH = case.head_VH.detach().requires_grad_()
    for _ in range(2):
        backpropagate_loss(case.hidden_NH.detach(), head_VH, case.targets, objective=objective, divisor=5.0)
    once = distillation_loss(
        case.hidden_NH.detach(), case.head_VH, case.targets, objective=objective, divisor=5.0
    )
    assert head_VH.grad is not None
    torch.testing.assert_close(head_VH.grad, 2.0 * gradients(once.loss, [case.head_VH])[0])


def test_only_what_requires_a_gradient_gets_one() -> None:
    case = make_case()
    frozen_VH = case.head_VH.detach()
    loss = distillation_loss(case.hidden_NH, frozen_VH, case.targets).loss
    expected = gradients(distillation_loss(case.hidden_NH, case.head_VH, case.targets).loss, case.leaves[:1])
    torch.testing.assert_close(gradients(loss, case.leaves[:1]), expected)
    assert not distillation_loss(case.hidden_NH.detach(), frozen_VH, case.targets).loss.requires_grad


def test_a_second_backward_pass_is_refused() -> None:
    case = make_case()
    loss = distillation_loss(case.hidden_NH, case.head_VH, case.targets).loss
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(InvalidInputError, match="ran already"):
        torch.autograd.backward(loss)


def test_a_tied_head_gets_the_gradients_of_both_its_uses() -> None:
    case = make_case()
    ids_N = torch.arange(9) % VOCAB
    expected = gradients(
        dense_loss(
            Case(torch.tanh(case.head_VH[ids_N]), case.head_VH, torch.zeros(VOCAB).double(), case.targets),
            Objective(),
            9.0,
        ),
        [case.head_VH],
    )
    loss = distillation_loss(torch.tanh(case.head_VH[ids_N]), case.head_VH, case.targets).loss
    torch.testing.assert_close(gradients(loss, [case.head_VH]), expected, atol=1e-9, rtol=1e-7)
    case.head_VH.grad = torch.ones_like(case.head_VH)
    backpropagate_loss(torch.tanh(case.head_VH[ids_N]), case.head_VH, case.targets)
    torch.testing.assert_close(case.head_VH.grad - 1.0, expected[0], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("positions", [0, 9])
def test_backpropagating_in_one_adds_the_same_gradients(positions: int) -> None:
    case = make_case(positions)
    loss = 0.0
    for number in range(2):
        case.hidden_NH.grad = None
        result = backpropagate_loss(
            case.hidden_NH, case.head_VH, case.targets, bias_V=case.bias_V, divisor=4.0
        )
        loss = float(result.loss)
        expected = distillation_loss(
            case.hidden_NH, case.head_VH, case.targets, bias_V=case.bias_V, divisor=4.0
        )
        assert loss == pytest.approx(float(expected.loss.detach()))
        wanted = gradients(expected.loss, case.leaves)
        for leaf, grad in zip(case.leaves, wanted, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, grad * (1 if leaf is case.hidden_NH else number + 1))


def test_a_head_without_a_grad_of_its_own_is_refused() -> None:
    case = make_case()
    with pytest.raises(InvalidInputError, match=r"no \.grad to add to"):
        backpropagate_loss(case.hidden_NH, case.head_VH * 2, case.targets)


def test_probability_moved_within_the_tail_costs_nothing() -> None:
    logits_NV = torch.tensor([[3.0, 1.0, 0.5, 0.5]], dtype=torch.float64)
    moved_NV = torch.tensor([[3.0, 1.0, 0.2, 0.0]], dtype=torch.float64)
    moved_NV[0, 3] = (logits_NV[0, 2:].exp().sum() - moved_NV[0, 2].exp()).log()
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    targets = Targets(
        torch.tensor([[0, 1]]), logprobs_NV[:, :2], logprobs_NV[:, 2:].exp().sum(-1), torch.tensor([0])
    )
    kl_N, _ = measure_loss(moved_NV, torch.eye(4, dtype=torch.float64), targets)
    assert abs(float(kl_N)) < 1e-12


# torch silences this warning of its own, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_step_breaks_its_graph_at_the_loss_and_goes_on() -> None:
    case = as_float32(make_case())

    def step(hidden_NH: Tensor, head_VH: Tensor) -> Tensor:
        return 2.0 * distillation_loss(torch.tanh(hidden_NH), head_VH, case.targets).loss

    # aot_eager: what compiling does to autograd, without a C++ compiler.
    compiled = torch.compile(step, backend="aot_eager")
    found = compiled(case.hidden_NH, case.head_VH)
    expected = step(case.hidden_NH, case.head_VH)
    torch.testing.assert_close(found, expected)
    leaves = [case.hidden_NH, case.head_VH]
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


def test_a_head_of_other_width_than_the_states_is_an_error_of_torch() -> None:
    case = make_case()
    with pytest.raises(RuntimeError):
        distillation_loss(case.hidden_NH, torch.zeros(VOCAB, HIDDEN + 1).double(), case.targets)


@pytest.mark.parametrize("exponent", [0.5, 2.0])
def test_retempering_is_exact_over_what_is_kept_and_bounded_in_the_tail(exponent: float) -> None:
    generator = torch.Generator().manual_seed(0)
    full_NV = torch.log_softmax(2 * torch.randn(50, 40, generator=generator, dtype=torch.float64), 1)
    full_NV = full_NV.sort(1, descending=True).values
    wanted_NV = torch.log_softmax(exponent * full_NV, 1)
    for k in (0, 1, 8, 39, 40):
        tail_N = full_NV[:, k:].logsumexp(1) if k < 40 else torch.full((50,), -torch.inf).double()
        log_kept_NK, log_tail_N = retemper(full_NV[:, :k], tail_N, exponent, vocab_size=40)
        torch.testing.assert_close(
            log_kept_NK - log_kept_NK[:, :1], wanted_NV[:, :k] - wanted_NV[:, :1] if k else wanted_NV[:, :0]
        )
        true_N = (exponent * full_NV[:, k:]).logsumexp(1)
        even_N = (1 - exponent) * torch.tensor(max(40.0 - k, 1.0)).log() + exponent * tail_N
        few_N = tail_N + (exponent - 1) * torch.minimum(full_NV[:, max(k, 1) - 1], tail_N)
        if k == 40:
            assert bool((log_tail_N == -torch.inf).all())
        elif k:
            ends_N2 = torch.stack([even_N, few_N], 1).sort(1).values
            assert bool((true_N >= ends_N2[:, 0] - 1e-9).all())
            assert bool((true_N <= ends_N2[:, 1] + 1e-9).all())
            torch.testing.assert_close(log_tail_N, (even_N + few_N) / 2)
        if k == 39:
            # One token in the tail: nothing is left to guess.
            torch.testing.assert_close(log_tail_N, true_N)


def test_a_loss_of_retempered_rows_is_that_of_rows_captured_so_where_everything_is_kept() -> None:
    case = make_case(k=VOCAB, padded=False)
    log_p_NK = torch.log_softmax(0.5 * case.targets.logprobs_NK, 1)
    captured = replace(case.targets, logprobs_NK=log_p_NK, tail_mass_N=torch.zeros(9).double())
    rows = replace(case.targets, tail_mass_N=torch.zeros(9).double())
    found = distillation_loss(
        case.hidden_NH, case.head_VH, rows, objective=Objective(temperature=2.0, teacher_temperature=1.0)
    )
    expected = distillation_loss(
        case.hidden_NH, case.head_VH, captured, objective=Objective(temperature=2.0, teacher_temperature=2.0)
    )
    torch.testing.assert_close(found.loss_N, expected.loss_N)
