"""A student whose parameters, gradients and optimizer state are spread over the ranks: PyTorch's FSDP2.

Each decoder layer is a group that is gathered when it computes and let go after it; token embeddings, final
norm and output head are the root's, and stay gathered from the forward pass to the end of the backward pass,
since the loss reads the head between the two and adds to its gradient.

Invariants: what gathers is called by all ranks in the same order, and that includes every forward and
backward pass: a rank with less to compute makes passes over nothing (`even_out`). Gradients are summed over
the ranks, as without sharding, once for a batch. What is saved is whole tensors, so that a run can go on with
another number of ranks, and without sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from lynearm.student.model import StudentModel
from lynearm.student.ranks import Ranks, is_sharded
from lynearm.wire.errors import ConfigError, MissingDependencyError

_linalg: Any = torch.linalg  # untyped

_ENTRANCE = "decode_sharded"
"""Name of the method, set on the model, that runs its decoder as a forward pass of the whole model."""

_NORM_GUARD = 1e-6
"""Added to a norm that is divided by, as `torch.nn.utils.clip_grad_norm_` does."""

_Item = TypeVar("_Item")


def shard_student(student: StudentModel, ranks: Ranks) -> StudentModel:
    """Spread a student's parameters over the ranks, on its device.

    Where it computes in bfloat16, decoder layers are gathered in bfloat16, which halves what is sent and
    held; their gradients are summed, and all shards kept, in float32.

    Args:
        student: The same on every rank; its weights may still be on the CPU. What is frozen is so already.
        ranks: More than one.

    Raises:
        ConfigError: if there is one rank, or the architecture does not hold its layers as `layers`.
        MissingDependencyError: if torch is too old.
    """
    check_several(ranks)
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise MissingDependencyError(
            f"sharding needs torch 2.9 or newer, this is {torch.__version__}", "pip install --upgrade torch"
        )
    if not student.decoder_layers:
        raise ConfigError(
            f"{student.directory.name} does not hold its decoder layers as `layers`: they cannot be sharded "
            "one by one",
            'train it with sharding = "none"',
        )
    mesh = init_device_mesh(student.device.type, (ranks.world_size,))
    # Inputs stay as they are: autocast, as without sharding, says what is computed in which type.
    policy = (
        MixedPrecisionPolicy()
        if student.compute_dtype == torch.float32
        else MixedPrecisionPolicy(student.compute_dtype, torch.float32, cast_forward_inputs=False)
    )
    for layer in student.decoder_layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    root = cast(FSDPModule, fully_shard(student.model, mesh=mesh, reshard_after_forward=False))
    _sum_gradients(root)
    setattr(root, _ENTRANCE, MethodType(_decode, root))
    register_fsdp_forward_method(cast(nn.Module, root), _ENTRANCE)
    return replace(student, shards=Shards(root, ranks))


def check_several(ranks: Ranks) -> None:
    """Refuse to shard a student over one rank.

    Raises:
        ConfigError: saying how to start several.
    """
    if ranks.world_size == 1:
        raise ConfigError(
            'sharding is "full", but this process is alone',
            "start several with torchrun --nproc-per-node N --no-python lynearm train …, or --ray --ranks N",
        )


class Shards:
    """The root of a sharded model: what the whole of it is asked for."""

    def __init__(self, root: FSDPModule, ranks: Ranks) -> None:
        self._root = root
        self._ranks = ranks

    def decode(self, **inputs: Any) -> Any:
        """The base model's forward pass; root parameters are whole from then on, until `reshard`."""
        return getattr(self._root, _ENTRANCE)(**inputs)

    def reshard(self) -> None:
        """Let go of what a forward pass without a backward pass left whole."""
        self._root.reshard()

    def accumulate(self, *, is_last: bool) -> None:
        """Before a piece of a batch: gradients stay on this rank, whole, and are summed after the last.

        The root's parameters stay whole between the pieces, since each begins and ends with them.
        """
        self._root.set_requires_gradient_sync(is_last)
        self._root.set_reshard_after_backward(is_last, recurse=False)

    def count_missing(self, passes: int) -> int:
        """How many passes more than this rank the one with the most has to make."""
        return self._ranks.most(passes) - passes

    def gather_weights(self, *, keep: bool) -> dict[str, Tensor]:
        """The model's state as whole tensors on the CPU, gathered one by one; tied ones stay tied.

        Args:
            keep: Whether this rank wants them; else it helps to gather, and gets none.
        """
        self.reshard()
        state = cast("dict[str, Tensor]", cast(nn.Module, self._root).state_dict(keep_vars=True))
        whole: dict[int, Tensor] = {}
        for tensor in state.values():
            if id(tensor) not in whole:
                whole[id(tensor)] = gather(tensor, keep=keep)
        return {name: whole[id(tensor)] for name, tensor in state.items()} if keep else {}


def gather(tensor: Tensor, *, keep: bool) -> Tensor:
    """A tensor as a whole, on the CPU, in memory of its own; an empty one where `keep` is false."""
    whole = tensor.detach()
    if is_sharded(whole):
        whole = cast(DTensor, whole).full_tensor()
    return whole.to("cpu", copy=True) if keep else torch.empty(0)


def gather_all(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """`gather` for each of some tensors, in their order; none where `keep` is false."""
    gathered = {name: gather(tensor, keep=keep) for name, tensor in tensors.items()}
    return gathered if keep else {}


def shard_like(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's part of a tensor that every rank has, as a parameter is sharded; all of it if it is not."""
    on_device = whole.to(parameter.device)
    if not is_sharded(parameter):
        return on_device
    sharded = cast(DTensor, parameter.detach())
    return distribute_tensor(on_device, sharded.device_mesh, sharded.placements, src_data_rank=None)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, ranks: Ranks) -> float:
    """`torch.nn.utils.clip_grad_norm_` where some gradients are sharded and others are on every rank.

    Args:
        parameters: Those that are trained.
        limit: Largest norm.
        ranks: Among whom they are sharded.

    Returns:
        The norm over all of them before it was clipped, the same on every rank.
    """
    shards, whole = list[Tensor](), list[Tensor]()
    for parameter in parameters:
        if parameter.grad is not None:
            (shards if is_sharded(parameter) else whole).append(_local(parameter.grad))
    (square,) = ranks.sum(_square(shards))
    norm = math.sqrt(square + _square(whole))
    factor = limit / (norm + _NORM_GUARD)
    if factor < 1.0:
        for gradient in (*shards, *whole):
            gradient.mul_(factor)
    return norm


def even_out(items: Sequence[_Item], student: StudentModel, idle: Callable[[], _Item]) -> list[_Item]:
    """As many items on every rank as on that with the most, where the student is sharded.

    Args:
        items: What this rank has to compute, a forward pass each.
        student: The student.
        idle: Makes an item whose result counts for nothing.
    """
    missing = 0 if student.shards is None else student.shards.count_missing(len(items))
    return [*items, *(idle() for _ in range(missing))]


def _decode(model: Any, **inputs: Any) -> Any:
    return model.base_model(**inputs)


def _sum_gradients(root: FSDPModule) -> None:
    for module in cast(nn.Module, root).modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A factor would else be part of the reduction, and gloo knows plain sums only.
            module.set_force_sum_reduction_for_comms(True)


def _local(tensor: Tensor) -> Tensor:
    return cast(DTensor, tensor).to_local() if is_sharded(tensor) else tensor


def _square(tensors: Sequence[Tensor]) -> float:
    """Sum of the squares of all entries."""
    norms = [cast(Tensor, _linalg.vector_norm(tensor)) for tensor in tensors]
    return float(torch.stack(norms).double().square().sum()) if norms else 0.0
