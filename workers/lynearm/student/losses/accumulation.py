"""Gradients that are added to where they are kept, and never exist as a second [V, H].

Shape legend: N = tokens read, U = different ones among them, H = hidden width, V = vocabulary.

Autograd makes the gradient of a parameter anew in every micro-batch, and then adds it to the parameter's
`.grad`. Of an output head that is another [V, H] (which `backpropagate_loss` spares), and so it is of token
embeddings, though all of it is zero but for the rows that were read. With a vocabulary of 150,000 one such
matrix more is the peak of a training step.

What is added here does not pass through autograd's own accumulation: hooks of the parameter do not run, and
`torch.autograd.grad` finds nothing. So nobody may wait for them: DistributedDataParallel does.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lynearm.wire.errors import InvalidInputError


def check_accumulates(leaf: Tensor) -> None:
    """Refuse a parameter that cannot, or must not, be given its gradient without autograd.

    Raises:
        InvalidInputError: saying why.
    """
    reason = _why_not(leaf)
    if reason:
        raise InvalidInputError(
            f"no gradient can be added to this parameter of shape {list(leaf.shape)}: {reason}",
            "use distillation_loss and its backward pass",
        )


@contextmanager
def accumulate_rows(embedding: nn.Module) -> Generator[None]:
    """While it lasts, passes through token embeddings are such that backward adds the rows that were read.

    The gradient is that of autograd bit by bit, since each token's own are summed first there too, and then
    added; in the same order in every run. The backward pass may run after the context has ended. Modules and
    parameters of which that is not certain are left to autograd: subclasses of `nn.Embedding`, rescaled or
    sparse ones, frozen ones, and those that `check_accumulates` refuses.
    """
    if type(embedding) is not nn.Embedding or not _is_plain(embedding):
        yield
        return
    handle = embedding.register_forward_hook(_read_again)
    try:
        yield
    finally:
        handle.remove()


def _why_not(leaf: Tensor) -> str:
    if not leaf.is_leaf:
        return "it is computed from something, and has no .grad to add to"
    if isinstance(leaf, DTensor):
        return "it is a DTensor, of which this rank holds a part"
    if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:  # pyright: ignore[reportPrivateUsage]
        return "its hooks would not see it"
    grad = leaf.grad
    if grad is not None and (grad.layout != torch.strided or grad.requires_grad):
        return "its .grad is sparse, or part of a graph itself"
    return ""


def _is_plain(embedding: nn.Embedding) -> bool:
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


def _read_again(module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> Tensor | None:
    # Only now: a weight that FSDP2 shards is whole, and a plain tensor, during the pass alone.
    embedding = cast(nn.Embedding, module)
    weight_VH = embedding.weight
    if not inputs or not weight_VH.requires_grad or not torch.is_grad_enabled() or _why_not(weight_VH):
        return None
    return cast(Tensor, _RowsRead.apply(weight_VH, inputs[0], embedding.padding_idx))  # type: ignore[no-untyped-call]  # pyright: ignore[reportUnknownMemberType]


class _RowsRead(torch.autograd.Function):
    """`torch.nn.functional.embedding`, whose backward pass is the addition."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares it as (*args, **kwargs)
        ctx: Any,  # torch's context takes attributes
        weight_VH: Tensor,
        token_ids: Tensor,
        padding_id: int | None,
    ) -> Tensor:
        ctx.weight_VH, ctx.padding_id = weight_VH, padding_id
        ctx.save_for_backward(token_ids)
        return nn.functional.embedding(token_ids, weight_VH)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares it as (*args)
        ctx: Any,  # torch's context takes attributes
        grad: Tensor,
    ) -> tuple[None, None, None]:
        weight_VH = cast(Tensor, ctx.weight_VH)
        (token_ids,) = cast("tuple[Tensor]", ctx.saved_tensors)
        grad_NH = grad.reshape(-1, weight_VH.shape[1])
        flat_ids: Any = token_ids.flatten()  # torch leaves `unique` untyped
        ids_U, places_N = cast("tuple[Tensor, Tensor]", flat_ids.unique(return_inverse=True))
        # Autograd's own kernel, which sums in a fixed order; `index_add_` of repeated ids would not on CUDA.
        rows_UH = torch.ops.aten.embedding_dense_backward(grad_NH, places_N, len(ids_U), -1, False)
        if ctx.padding_id is not None:
            rows_UH[ids_U == ctx.padding_id] = 0.0
        if weight_VH.grad is None:
            weight_VH.grad = torch.zeros_like(weight_VH)
        # Each id stands there once, so that this has but one order.
        weight_VH.grad.index_add_(0, ids_U, rows_UH)
        return None, None, None
