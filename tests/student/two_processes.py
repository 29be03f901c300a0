"""One of two processes that share a batch: run by `test_losses_distributed`.

python -m student.two_processes ddp|fsdp2 RANK RENDEZVOUS_FILE
"""

from __future__ import annotations

import os
import sys
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from student.dense_reference import HIDDEN, VOCAB, make_case
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lynearm.student.losses import Targets, accumulate_rows, backpropagate_loss, distillation_loss
from lynearm.student.objective import LossTerm, Objective
from lynearm.wire.errors import InvalidInputError

OBJECTIVE = Objective((LossTerm("jsd", mix=0.5), LossTerm("cross-entropy", 0.1)))
POSITIONS = 12


class Learner(nn.Module):
    """A decoder of one layer and an output head, tied to the embeddings or not; its output is the loss."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)
        if tied:
            self.head.weight = self.embedding.weight

    def states(self, input_ids_N: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(input_ids_N)))

    def forward(self, input_ids_N: Tensor, targets: Targets, divisor: float) -> Tensor:
        return distillation_loss(
            self.states(input_ids_N),
            self.head.weight,
            targets,
            bias_V=self.head.bias,
            objective=OBJECTIVE,
            divisor=divisor,
        ).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad: Any = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def check_adding(shared: nn.Module, input_ids_N: Tensor, mine: Targets, expected: dict[str, Tensor]) -> None:
    """Adding to gradients in place: under DDP, in all micro-batches but the last; of no sharded parameter."""
    learner = cast(Learner, getattr(shared, "module", shared))
    if not isinstance(shared, DistributedDataParallel):
        with pytest.raises(InvalidInputError, match="DTensor"):
            backpropagate_loss(torch.zeros(POSITIONS // 2, HIDDEN).double(), learner.head.weight, mine)
        return
    shared.zero_grad()
    with shared.no_sync():
        with accumulate_rows(learner.embedding):
            hidden_NH = learner.states(input_ids_N[:2])
        backpropagate_loss(
            hidden_NH,
            learner.head.weight,
            mine.rows(0, 2),
            bias_V=learner.head.bias,
            objective=OBJECTIVE,
            divisor=POSITIONS / 2,
        )
    torch.autograd.backward(shared(input_ids_N[2:], mine.rows(2, len(mine)), POSITIONS / 2))
    torch.testing.assert_close(gradients(shared), expected)


def main(way: str, rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    targets = make_case(POSITIONS).targets
    input_ids_N = torch.arange(POSITIONS) % VOCAB
    half = slice(rank * POSITIONS // 2, (rank + 1) * POSITIONS // 2)
    kept: list[nn.Module] = []
    for tied in (False, True):
        alone = Learner(tied=tied).double()
        torch.autograd.backward(alone(input_ids_N, targets, float(POSITIONS)))
        shared: nn.Module = Learner(tied=tied).double()
        if way == "ddp":
            shared = DistributedDataParallel(shared)
        else:
            fully_shard(shared, mesh=init_device_mesh("cpu", (2,)))
        kept.append(shared)
        # Both average over the processes, so that each divides by its own share of the positions.
        mine = targets.rows(half.start, half.stop)
        torch.autograd.backward(shared(input_ids_N[half], mine, POSITIONS / 2))
        torch.testing.assert_close(gradients(shared), gradients(alone))
        check_adding(shared, input_ids_N[half], mine, gradients(alone))
    dist.barrier()
    # The destructors of DistributedDataParallel and of its group now and then wait for ever: none is run.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), cast(str, sys.argv[3]))
