"""A loss between hidden states of teacher and student, where the stream carries the teacher's.

Shape legend: N = completion positions, L = teacher layers in the stream, H = their width, S = the student's
width, P = pairs of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lynearm.wire.errors import ConfigError, MisalignmentError

HiddenLossKind: TypeAlias = Literal["cosine", "mse"]
HIDDEN_LOSS_KINDS: tuple[HiddenLossKind, ...] = get_args(HiddenLossKind)

_LEAST_NORM = 1e-6
"""A state that is shorter has no direction; it is taken as no cost and gives no gradient out of bounds."""


class HiddenStateLoss(nn.Module):
    """How far a student's states are from a teacher's, after a learned projection of each pair of layers.

    "cosine" is 1 − cos, which leaves the length of a state free; "mse" is the mean squared error over the
    mean square of the teacher's states, so that its size does not depend on the layer.

    Args:
        pairs: (student layer, teacher layer) for each comparison, as indices into the tensors given.
        student_width: S.
        teacher_width: H. Where it is S, projections begin as the identity, else with orthogonal rows or
            columns, so that they keep lengths as far as the widths allow.
        kind: "cosine" or "mse".

    Raises:
        ConfigError: if there is no pair, a layer is negative, or the kind is not known.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        student_width: int,
        teacher_width: int,
        kind: HiddenLossKind = "cosine",
    ) -> None:
        super().__init__()
        if not pairs or any(layer < 0 for pair in pairs for layer in pair):
            raise ConfigError(
                f"pairs of layers are {list(pairs)}, expected at least one pair of layers from 0",
                "give (student layer, teacher layer), for example (0, 0), (9, 29)",
            )
        if kind not in HIDDEN_LOSS_KINDS:
            raise ConfigError(f"hidden loss {kind!r} is not known, expected one of {HIDDEN_LOSS_KINDS}")
        self._pairs = tuple(pairs)
        self._kind = kind
        self._widths = (student_width, teacher_width)
        self.projections = nn.ModuleList(
            nn.Linear(student_width, teacher_width, bias=False) for _ in self._pairs
        )
        with torch.no_grad():
            for projection in self.projections:
                weight = projection.get_parameter("weight")
                if student_width == teacher_width:
                    nn.init.eye_(weight)
                else:
                    nn.init.orthogonal_(weight)

    def forward(
        self, student: Sequence[Tensor], teacher_NLH: Tensor, weights_N: Tensor | None = None
    ) -> Tensor:
        """Mean over positions, by weight, and over pairs.

        Args:
            student: States [N, S] of each student layer that a pair may name.
            teacher_NLH: The teacher's, at the same positions; no gradient goes there.
            weights_N: How much each position counts; None: all of them 1.

        Raises:
            MisalignmentError: if shapes are not those that the pairs and widths promise.
        """
        self._check(student, teacher_NLH)
        weights = teacher_NLH.new_ones(len(teacher_NLH)) if weights_N is None else weights_N
        weights = weights.to(torch.promote_types(teacher_NLH.dtype, torch.float32))
        total_weight = weights.sum()
        total = weights.new_zeros(())
        for projection, (ours, theirs) in zip(self.projections, self._pairs, strict=True):
            projected_NH: Tensor = projection(student[ours]).to(weights.dtype)
            target_NH = teacher_NLH[:, theirs].detach().to(weights.dtype)
            total = total + (weights * self._distance(projected_NH, target_NH, weights)).sum()
        return total / (total_weight.clamp_min(torch.finfo(weights.dtype).tiny) * len(self._pairs))

    def _distance(self, projected_NH: Tensor, target_NH: Tensor, weights_N: Tensor) -> Tensor:
        if self._kind == "cosine":
            cosine_N = nn.functional.cosine_similarity(projected_NH, target_NH, dim=-1, eps=_LEAST_NORM)
            return torch.where(target_NH.square().sum(-1) > _LEAST_NORM**2, 1.0 - cosine_N, 0.0)
        weight = weights_N.sum().clamp_min(torch.finfo(weights_N.dtype).tiny)
        power = (weights_N * target_NH.square().mean(-1)).sum() / weight
        return (projected_NH - target_NH).square().mean(-1) / power.clamp_min(_LEAST_NORM**2)

    def _check(self, student: Sequence[Tensor], teacher_NLH: Tensor) -> None:
        width, teacher_width = self._widths
        layers = 1 + max(theirs for _, theirs in self._pairs)
        if teacher_NLH.ndim != 3 or teacher_NLH.shape[1] < layers or teacher_NLH.shape[2] != teacher_width:
            raise MisalignmentError(
                f"the teacher's states have shape {tuple(teacher_NLH.shape)}, expected "
                f"[{len(teacher_NLH)}, {layers} or more, {teacher_width}]",
                "pair layers that the stream carries, and give its width",
            )
        for ours, _ in self._pairs:
            found = tuple(student[ours].shape) if ours < len(student) else None
            if found != (len(teacher_NLH), width):
                raise MisalignmentError(
                    f"the student's states of layer {ours} have shape {found}, expected "
                    f"[{len(teacher_NLH)}, {width}]",
                    "pair layers that the student has, at the teacher's positions",
                )
