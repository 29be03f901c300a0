"""The terms of an objective that compare hidden states, with the projections that they learn.

The projections are trained with the student and saved beside the optimizer's moments; they are no part of
the model. Shape legend: N = completion positions, S = teacher layers that are compared, H = their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lynearm.student.batches import MicroBatch
from lynearm.student.losses.hidden import HiddenLossKind, HiddenStateLoss, sum_mean_squares
from lynearm.student.model import StudentModel
from lynearm.student.objective import LossName, LossTerm, Objective
from lynearm.student.teacher_states import WantedStates
from lynearm.wire.errors import ConfigError
from lynearm.wire.hidden import FINAL_NORM, Layer
from lynearm.wire.traces import Trace

_KINDS: dict[LossName, HiddenLossKind] = {"hidden-cosine": "cosine", "hidden-mse": "mse"}


class HiddenTerms:
    """The hidden terms of an objective on one student; there may be none.

    Args:
        student: Whose states are compared.
        objective: From `make_objective`, which settles the layers.
        seed: Of the projections.

    Raises:
        ConfigError: if the objective does not say which layers to compare, or how wide the teacher's are.
    """

    def __init__(self, student: StudentModel, objective: Objective, *, seed: int) -> None:
        self._terms = objective.hidden_terms
        if any(not term.pairs or not objective.teacher_hidden_size for term in self._terms):
            raise ConfigError(
                f"the layers of {', '.join(map(str, self._terms))} are not settled",
                "make the objective with make_objective from the stream that is trained on",
            )
        pairs = [pair for term in self._terms for pair in term.pairs]
        self.student_layers = _ascending([ours for ours, _ in pairs])
        """What `loss` is given, in this order."""
        self._teacher_layers = _ascending([theirs for _, theirs in pairs])
        self.wanted = (
            WantedStates(self._teacher_layers, objective.teacher_hidden_size) if self._terms else None
        )
        """What a piece has to have; None where there are no terms."""
        self._losses = {
            term.name: self._make_loss(term, student, objective.teacher_hidden_size, seed)
            for term in self._terms
        }

    def check(self, traces: Sequence[Trace]) -> None:
        """Look whether the traces carry what is compared.

        Raises:
            MisalignmentError: if one does not.
        """
        if self.wanted is not None:
            for trace in traces:
                self.wanted.check(trace)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The projections by name: the term, and the layers of student and teacher."""
        return {
            f"{term.name}.{ours}={theirs}": projection.get_parameter("weight")
            for term in self._terms
            for (ours, theirs), projection in zip(
                term.pairs, self._losses[term.name].projections, strict=True
            )
        }

    def sum_squares(self, pieces: Sequence[MicroBatch]) -> list[float]:
        """Mean square of the teacher's states, summed over positions by weight, for each of S.

        Over the whole batch, so that the loss does not depend on how it is cut.
        """
        totals_S = torch.zeros(len(self._teacher_layers), dtype=torch.float64)
        for piece in pieces:
            if piece.states_NSH is not None:
                totals_S += sum_mean_squares(piece.states_NSH, _weights(piece).double())
        return [float(total) for total in totals_S]

    def loss(
        self,
        student: Sequence[Tensor],
        piece: MicroBatch,
        *,
        divisor: float,
        mean_squares: Sequence[float],
    ) -> Tensor | None:
        """The weighted sum of the terms; None without any.

        Args:
            student: States [N, width] of each of `student_layers`.
            piece: With the teacher's states.
            divisor: Sum of the weights of the batch's positions.
            mean_squares: Those of `sum_squares` of the batch, over `divisor`.
        """
        if not self._terms or piece.states_NSH is None:
            return None
        dtype = next(iter(self.parameters().values())).dtype
        states_NSH, weights_N = piece.states_NSH.to(dtype), _weights(piece).to(dtype)
        # Half precision, where the student computes in it, would be a coarse measure of small distances.
        ours = [states.to(dtype) for states in student]
        mean_squares_S = torch.tensor(mean_squares, dtype=dtype, device=states_NSH.device)
        total = states_NSH.new_zeros(())
        for term in self._terms:
            total = total + term.weight * self._losses[term.name](
                ours, states_NSH, weights_N, divisor=divisor, mean_squares_L=mean_squares_S
            )
        return total

    def _make_loss(
        self, term: LossTerm, student: StudentModel, teacher_width: int, seed: int
    ) -> HiddenStateLoss:
        loss = HiddenStateLoss(
            [
                (self.student_layers.index(ours), self._teacher_layers.index(theirs))
                for ours, theirs in term.pairs
            ],
            student_width=student.hidden_size,
            teacher_width=teacher_width,
            kind=_KINDS[term.name],
            seed=seed,
        )
        return loss.to(student.device, student.head_weight.dtype)


def _weights(piece: MicroBatch) -> Tensor:
    weights_N = piece.targets.weights_N
    return torch.ones(len(piece.targets), device=piece.positions_N.device) if weights_N is None else weights_N


def _ascending(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Each once, the final norm last: as streams have them."""
    numbers: list[Layer] = [*sorted({layer for layer in layers if layer != FINAL_NORM})]
    return (*numbers, FINAL_NORM) if FINAL_NORM in layers else tuple(numbers)
