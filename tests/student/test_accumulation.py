"""Gradients that are added in place are those of autograd, and nothing as large is made beside them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from student.dense_reference import HIDDEN, VOCAB, make_case
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lynearm.student import optimization as optimization_module
from lynearm.student.batches import Batch
from lynearm.student.config import TrainConfig
from lynearm.student.losses import (
    DistillationLoss,
    Targets,
    accumulate_rows,
    backpropagate_loss,
    distillation_loss,
    in_place,
    logit_chunks,
)
from lynearm.student.model import load_student
from lynearm.student.objective import LossTerm, Objective
from lynearm.student.optimization import Optimization
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.traces import Trace

OBJECTIVE = Objective((LossTerm("jsd", mix=0.5), LossTerm("cross-entropy", 0.1)), vocab_size=VOCAB - 4)


class Learner(nn.Module):
    """Token embeddings, a layer, and an output head with a bias."""

    def __init__(self, *, tied: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, HIDDEN, padding_idx=2)
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)
        if tied:
            self.head.weight = self.embedding.weight
        self.to(dtype)

    def states(self, token_ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(token_ids)))


def make_targets(positions: int, seed: int) -> Targets:
    """Rows of which some count nothing, and whose tokens are the teacher's too."""
    targets = make_case(positions, seed=seed).targets
    weights_N = torch.linspace(0.0, 2.0, positions, dtype=torch.float64)
    weights_N[positions // 2 :: 3] = 0.0
    sampled_N = targets.sampled_ids_N % (VOCAB - 4)
    return replace(targets, weights_N=weights_N, sampled_ids_N=sampled_N)


def accumulate(learner: Learner, *, adding: bool, positions: Sequence[int]) -> dict[str, Tensor | None]:
    """Gradients after a micro-batch for each number of positions."""
    for seed, count in enumerate(positions):
        token_ids = torch.arange(count) * 5 % 7
        with accumulate_rows(learner.embedding) if adding else nullcontext():
            hidden_NH = learner.states(token_ids)
        arguments = (hidden_NH, learner.head.weight, make_targets(count, seed))
        if adding:
            backpropagate_loss(*arguments, bias_V=learner.head.bias, objective=OBJECTIVE, divisor=3.0)
        else:
            result = distillation_loss(*arguments, bias_V=learner.head.bias, objective=OBJECTIVE, divisor=3.0)
            torch.autograd.backward(result.loss)
    return {name: parameter.grad for name, parameter in learner.named_parameters()}


def check_equal(
    found: dict[str, Tensor | None], expected: dict[str, Tensor | None], **tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@pytest.mark.parametrize("frozen", ["", "head.weight", "head.bias", "embedding.weight", "layer.weight"])
@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_several_micro_batches_add_up_as_with_autograd(
    tied: bool, rows: int, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_chunks, "CHUNK_BYTES", rows * (VOCAB - 4) * 8)
    found: list[dict[str, Tensor | None]] = []
    for adding in (True, False):
        learner = Learner(tied=tied)
        for name, parameter in learner.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(parameter.requires_grad and name != frozen)
        # The first has its logits in the place of the gradient, the last one has nothing.
        found.append(accumulate(learner, adding=adding, positions=(HIDDEN, 11, 9, 0)))
    check_equal(*found, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_micro_batch_is_that_of_autograd_bit_for_bit(tied: bool) -> None:
    adding, expected = (
        accumulate(Learner(tied=tied, dtype=torch.float32), adding=adding, positions=(11,))
        for adding in (True, False)
    )
    check_equal(adding, expected, atol=0.0, rtol=0.0)


def test_autocast_adds_up_to_the_rounding_of_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        adding, expected = (
            accumulate(Learner(tied=True, dtype=torch.float32), adding=adding, positions=(5, 11, 9))
            for adding in (True, False)
        )
    check_equal(adding, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("shape", [(0,), (40,), (4, 10)])
def test_rows_that_were_read_get_the_gradient_of_autograd_bit_for_bit(
    shape: tuple[int, ...], has_grad: bool, padding_idx: int | None
) -> None:
    torch.manual_seed(1)
    embedding = nn.Embedding(12, 5, padding_idx=padding_idx)
    token_ids = torch.randint(0, 8, shape)
    upstream = torch.randn(*shape, 5)
    start = torch.randn(12, 5)
    grads: list[Tensor | None] = []
    for adding in (True, False):
        embedding.weight.grad = start.clone() if has_grad else None
        kept = embedding.weight.grad
        with accumulate_rows(embedding) if adding else nullcontext():
            output = embedding(token_ids)
        assert torch.equal(output, embedding.weight[token_ids])
        torch.autograd.backward(output, upstream)
        grads.append(embedding.weight.grad)
        assert not has_grad or embedding.weight.grad is kept
    torch.testing.assert_close(grads[0], grads[1], atol=0.0, rtol=0.0)


class Scaled(nn.Embedding):
    """As Gemma's, which multiplies what it reads."""

    def forward(self, input: Tensor) -> Tensor:
        return 3.0 * super().forward(input)


@pytest.mark.parametrize(
    "embedding",
    [
        Scaled(12, 5),
        nn.Embedding(12, 5, scale_grad_by_freq=True),
        nn.Embedding(12, 5, sparse=True),
        nn.Embedding(12, 5, max_norm=0.1),
    ],
)
def test_other_embeddings_are_left_to_autograd(embedding: nn.Embedding) -> None:
    token_ids = torch.tensor([1, 1, 4])
    grads: list[Tensor] = []
    for adding in (True, False):
        embedding.weight.grad = None
        with accumulate_rows(embedding) if adding else nullcontext():
            loss = embedding(token_ids).square().sum()
        assert "RowsRead" not in f"{loss.grad_fn.next_functions[0][0].next_functions}"
        torch.autograd.backward(loss)
        assert embedding.weight.grad is not None
        grads.append(embedding.weight.grad.to_dense())
    torch.testing.assert_close(*grads)


def test_an_embedding_whose_gradient_somebody_waits_for_is_left_to_autograd() -> None:
    embedding = nn.Embedding(12, 5)
    seen: list[Tensor] = []
    embedding.weight.register_post_accumulate_grad_hook(seen.append)
    with accumulate_rows(embedding):
        loss = embedding(torch.tensor([1, 4])).sum()
    torch.autograd.backward(loss)
    assert len(seen) == 1


def test_embeddings_are_as_before_when_the_context_has_ended() -> None:
    embedding = nn.Embedding(12, 5)
    with accumulate_rows(embedding):
        with torch.no_grad():
            assert not embedding(torch.tensor([1])).requires_grad
        embedding.weight.requires_grad_(False)
        assert not embedding(torch.tensor([1])).requires_grad
    embedding.weight.requires_grad_(True)
    (grad,) = torch.autograd.grad(embedding(torch.tensor([1])).sum(), [embedding.weight])
    assert float(grad.sum()) == 5.0


def hook(head_VH: Tensor) -> None:
    head_VH.register_hook(lambda grad: grad)


def hook_afterwards(head_VH: Tensor) -> None:
    head_VH.register_post_accumulate_grad_hook(lambda _: None)


def follow_gradient(head_VH: Tensor) -> None:
    head_VH.grad = torch.zeros_like(head_VH).requires_grad_()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (hook, "hooks would not see"),
        (hook_afterwards, "hooks would not see"),
        (follow_gradient, "part of a graph"),
    ],
)
def test_a_head_whose_gradient_is_more_than_a_tensor_is_refused(spoil: Any, reason: str) -> None:
    case = make_case()
    spoil(case.head_VH)
    with pytest.raises(InvalidInputError, match=reason):
        backpropagate_loss(case.hidden_NH, case.head_VH, case.targets)
    backpropagate_loss(case.hidden_NH, case.head_VH.detach(), case.targets)


# torch silences this warning of its own, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_decoder_is_followed_back_from_the_loss() -> None:
    grads: list[dict[str, Tensor | None]] = []
    for compiled in (True, False):
        learner = Learner(tied=True)

        def step(learner: Learner = learner) -> Tensor:
            hidden_NH = learner.states(torch.arange(9))
            return backpropagate_loss(hidden_NH, learner.head.weight, make_case().targets).loss * 1.0

        for _ in range(2):
            # aot_eager: what compiling does to autograd, without a C++ compiler.
            (torch.compile(step, backend="aot_eager") if compiled else step)()
        grads.append({name: parameter.grad for name, parameter in learner.named_parameters()})
    check_equal(*grads, atol=1e-12, rtol=1e-10)


class Matrices(TorchDispatchMode):
    """Lists the operations that return a tensor of a shape in memory that none of their inputs has."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.made: list[str] = []
        self._shape = shape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        if isinstance(result, Tensor) and result.shape == self._shape:
            here = result.untyped_storage().data_ptr()
            if here not in [tensor.untyped_storage().data_ptr() for tensor in inputs]:
                self.made.append(str(func))
        return result


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_makes_one_matrix_as_large_as_the_head_for_each_that_is_trained(
    student_dir: Path, traces: list[Trace], tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few rows of the gradient are made beside it: here all of them would be few.
    monkeypatch.setattr(in_place, "_ROWS_BYTES", 1)
    student = load_student(student_dir, device="cpu")
    if not tied:
        student.model.get_output_embeddings().weight = nn.Parameter(student.head_weight.detach() * 0.9)
    student.train(True)
    config = TrainConfig(student=student_dir, micro_batch_tokens=24, packing="off")
    optimization = Optimization(student, config)
    optimization.step(Batch(tuple(traces[:8])), 1)
    with Matrices(student.head_weight.shape) as matrices:
        optimization.step(Batch(tuple(traces[:8])), 2)
    # As `.grad` of each, in the first of several micro-batches.
    assert len(matrices.made) == (1 if tied else 2), matrices.made


def test_a_step_of_several_micro_batches_has_the_gradients_of_autograd(
    student_dir: Path, traces: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step() -> dict[str, Tensor]:
        student = load_student(student_dir, device="cpu")
        student.train(True)
        grads: dict[str, Tensor] = {}

        def keep(*_: Any) -> None:
            grads.update(
                {
                    name: parameter.grad.clone()
                    for name, parameter in student.named_parameters()
                    if parameter.grad is not None
                }
            )

        handle = register_optimizer_step_pre_hook(keep)
        config = TrainConfig(student=student_dir, micro_batch_tokens=24, grad_clip=0.0)
        Optimization(student, config).step(Batch(tuple(traces[:8])), 1)
        handle.remove()
        return grads

    found = step()

    def by_autograd(
        hidden_NH: Tensor, head_VH: Tensor, targets: Targets, **settings: Any
    ) -> DistillationLoss:
        assert settings.pop("beside") is None
        result = distillation_loss(hidden_NH, head_VH, targets, **settings)
        torch.autograd.backward(result.loss)
        return replace(result, loss=result.loss.detach())

    monkeypatch.setattr(optimization_module, "accumulate_rows", lambda _: nullcontext())
    with_rows_by_autograd = step()
    assert found.keys() == with_rows_by_autograd.keys()
    assert all(torch.equal(found[name], grad) for name, grad in with_rows_by_autograd.items())
    monkeypatch.setattr(optimization_module, "backpropagate_loss", by_autograd)
    for name, grad in step().items():
        torch.testing.assert_close(found[name], grad, atol=1e-7, rtol=1e-4)
