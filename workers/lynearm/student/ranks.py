"""Several processes that train one student: each computes its share of a batch, and all make the same step.

Invariants: every rank holds the same weights, or its part of them (see `sharding`), and reads the same
batches in the same order, so that the sequence of examples does not depend on their number. A step is taken
by all or by none: before it the ranks agree that each has the batch, and after it whether to stop. Only rank
0 writes.

The gradients of a batch are summed once, after all of its pieces, so that ranks may cut their shares into
different numbers of pieces.
"""

from __future__ import annotations

import datetime
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as torch_distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lynearm.student.launch import launched_local_rank, launched_world_size
from lynearm.wire.errors import ConfigError, InternalError, LynearmError

_dist: Any = torch_distributed  # half typed

_BUCKET_ELEMENTS = 8 << 20
"""Gradients that are summed with one call: 32 MB in float32. Larger ones save no time, and cost a copy."""

_PATIENCE = datetime.timedelta(days=365)
"""How long ranks wait for each other: as long as the teacher takes. A dead rank is the launcher's affair."""

_MEETING = datetime.timedelta(seconds=60)
"""How long a rank that fails waits for the others to do so as well."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run, as one of them sees them; by default it is alone.

    Every method is called by all ranks in the same order.
    """

    rank: int = 0
    world_size: int = 1
    control: Any = None
    """Group for what ranks agree on, on the CPU, whatever the gradients use."""
    failed: Any = None
    """Group of those that fail, on the CPU: the others may wait for something else on `control`."""

    @property
    def writes(self) -> bool:
        """Whether this is the rank that writes checkpoints and reports."""
        return self.rank == 0

    def share(self, items: Sequence[_Item], weights: Sequence[int]) -> list[_Item]:
        """This rank's part of a batch: each item goes to one rank, and the weights are about even.

        Longest first to the rank with the least so far (Graham, 1969: at most 4/3 of the best there is).

        Args:
            items: Of the batch; the same on every rank.
            weights: What each costs.
        """
        if self.world_size == 1:
            return list(items)
        loads = [0] * self.world_size
        owners = [0] * len(items)
        for index in sorted(range(len(items)), key=lambda index: -weights[index]):
            owners[index] = loads.index(min(loads))
            loads[owners[index]] += weights[index]
        return [item for item, owner in zip(items, owners, strict=True) if owner == self.rank]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every parameter's gradient by the sum over the ranks; a rank without one adds nothing.

        Those of sharded parameters are summed in the backward pass already.
        """
        if self.world_size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if is_sharded(parameter):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            fits = sum(gradient.numel() for gradient in bucket) + parameter.numel() <= _BUCKET_ELEMENTS
            if bucket and not (fits and bucket[0].dtype == parameter.grad.dtype):
                _sum_bucket(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            _sum_bucket(bucket)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64)
        _dist.all_reduce(totals, group=self.control)
        return [float(total) for total in totals]

    def from_first(self, values: dict[str, float]) -> dict[str, float]:
        """What rank 0 gives, on every rank; the others wait for it."""
        if self.world_size == 1:
            return values
        given = [values]
        _dist.broadcast_object_list(given, src=0, group=self.control)
        return given[0]

    def most(self, value: int) -> int:
        """The largest value of any rank."""
        if self.world_size == 1:
            return value
        largest = torch.tensor([value])
        _dist.all_reduce(largest, op=_dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def all_hold(self, condition: bool) -> bool:
        """Whether a condition holds on every rank."""
        return self.most(int(not condition)) == 0

    def all_have(self, *numbers: int) -> bool:
        """Whether every rank has the same numbers, below 2^53 / `world_size`."""
        if self.world_size == 1:
            return True
        return self.all_hold(self.sum(*numbers) == [number * self.world_size for number in numbers])

    def raise_together(self, error: LynearmError | None) -> None:
        """Raise an error that some ranks have met with on all of them.

        Raises:
            LynearmError: that of the first rank that has one.
        """
        errors: list[LynearmError | None] = [error]
        if self.world_size > 1:
            errors = [None] * self.world_size
            _dist.all_gather_object(errors, error, group=self.control)
        for first in errors:
            if first is not None:
                raise first

    def meet(self) -> bool:
        """For a rank that fails: whether all of them do, so that they can still do something together."""
        if self.world_size == 1:
            return True
        try:
            _dist.monitored_barrier(group=self.failed, timeout=_MEETING)
        except RuntimeError:
            return False
        return True

    def check_equal(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make sure that the ranks still hold the same weights, as far as they hold the same ones at all.

        Raises:
            InternalError: on every rank, if they do not.
        """
        if self.world_size == 1:
            return
        shared = [parameter for parameter in parameters if not is_sharded(parameter)]
        if not shared:
            return
        sums = torch.stack([parameter.detach().double().sum().cpu() for parameter in shared])
        least, largest = sums.clone(), sums.clone()
        _dist.all_reduce(least, op=_dist.ReduceOp.MIN, group=self.control)
        _dist.all_reduce(largest, op=_dist.ReduceOp.MAX, group=self.control)
        if not torch.equal(least, largest):
            raise InternalError(
                "the ranks hold different weights: one of them computes wrongly, or with another version"
            )


@contextmanager
def join_ranks(device: str) -> Generator[Ranks]:
    """The ranks that a launcher (torchrun, Ray Train) has started; this process alone without one.

    Args:
        device: As in `TrainConfig`. On CUDA, every process takes the GPU of its local rank.

    Raises:
        ConfigError: if the ranks cannot find each other.
    """
    ours = not _dist.is_initialized()
    if ours and launched_world_size() == 1:
        yield Ranks()
        return
    if ours:
        _initialize(device)
    try:
        control = _dist.new_group(backend="gloo", timeout=_PATIENCE)
        failed = _dist.new_group(backend="gloo", timeout=_MEETING)
        yield Ranks(_dist.get_rank(), _dist.get_world_size(), control, failed)
    finally:
        if ours:
            _dist.destroy_process_group()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor only."""
    return isinstance(tensor, DTensor)


def _initialize(device: str) -> None:
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_cuda and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, and torch finds no CUDA here", 'train with "cpu" or "auto"')
    if on_cuda:
        torch.cuda.set_device(launched_local_rank())
    try:
        _dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    # torch raises ValueError for variables that are missing, and subclasses of RuntimeError for the network.
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the ranks cannot find each other: {str(error).splitlines()[0]}",
            "start them with torchrun, or unset WORLD_SIZE to train in one process",
        ) from error


def _sum_bucket(gradients: Sequence[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    _dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
