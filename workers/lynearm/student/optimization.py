"""One optimizer step on one batch, and everything that the next step depends on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lynearm.student.batches import Batch, MicroBatch, PieceSizes, collate, completion_positions, idle_piece
from lynearm.student.config import TrainConfig
from lynearm.student.hidden_terms import HiddenTerms
from lynearm.student.losses import accumulate_rows, backpropagate_loss
from lynearm.student.model import StudentModel, packs_without_leaks
from lynearm.student.objective import DEFAULT_LOSS, Objective, parse_terms
from lynearm.student.ranks import Ranks, is_sharded
from lynearm.student.sharding import clip_gradients, even_out, gather_all, shard_like
from lynearm.student.weighting import PositionWeighting
from lynearm.wire.errors import CheckpointError, ConfigError, InvalidInputError

FINAL_RATE = 0.1
"""Where a falling schedule ends, as a part of the peak rate."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PROJECTION = "projection"
"""What is saved of parameters that are not the student's, besides their moments: themselves."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Means over the batch's completion positions, before the step."""

    loss: float
    """By weight, where positions count differently."""
    kl: float
    cross_entropy: float
    tokens: int
    """Completion positions."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    hidden: float | None = None
    """The weighted sum of the terms that compare hidden states; part of `loss`. None without any."""


class Optimization:
    """AdamW on a student, with a schedule that depends on the step alone.

    Args:
        student: Its parameters that require a gradient are trained.
        config: Rates, weights and sizes.
        objectives: What is brought down, on each stream; the terms of `config`, or the default, if not given.
            Their hidden terms are the same.
        ranks: Who shares the work.
    """

    def __init__(
        self,
        student: StudentModel,
        config: TrainConfig,
        *,
        objectives: Sequence[Objective] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self._student = student
        self._ranks = ranks or Ranks()
        self._config = config
        self.objectives = tuple(objectives) or (Objective(parse_terms(config.loss or DEFAULT_LOSS)),)
        """One for each stream."""
        self._weighting = PositionWeighting(config.span_weights, config.tag_weights)
        self._sizes = PieceSizes(
            config.micro_batch_tokens, config.max_sequence_tokens, packed=_packs(student, config.packing)
        )
        self.is_whole = True
        """Whether no step was broken off while it changed weights: else they are of no use."""
        self._hidden = HiddenTerms(student, self.objectives[0], seed=config.seed)
        self._parameters = student.trainable_parameters() | self._hidden.parameters()
        self._optimizer = torch.optim.AdamW(
            _group(self._parameters.values(), config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=student.device.type in ("cpu", "cuda"),
        )

    def step(self, batch: Batch, step: int) -> StepResult:
        """Train on a batch; `step` counts from 1.

        Raises:
            MisalignmentError: if a token id is not in the student's vocabulary, or a trace lacks the hidden
                states that are compared; nothing was changed.
            InvalidInputError: if the gradient is not finite; no weight was changed.
        """
        config = self._config
        positions = [completion_positions(trace, config.max_sequence_tokens) for trace in batch.traces]
        # Those of the other ranks too: all of them refuse, where one would leave the others waiting.
        self._hidden.check(batch.traces)
        pieces = self._collate(batch, positions)
        # Of the whole batch, on every rank: the sum of their gradients is then the batch's mean.
        weight = self._weighting.total(batch.traces, config.max_sequence_tokens) or 1.0
        squares = self._hidden.sum_squares([piece for piece, _ in pieces])
        mean_squares = [square / weight for square in self._ranks.sum(*squares)] if squares else []
        tokens = sum(positions)
        rate = learning_rate(config, step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        sums = [0.0] * 4
        pieces = even_out(pieces, self._student, lambda: (idle_piece(), self.objectives[0]))
        for number, (piece, objective) in enumerate(pieces, 1):
            if self._student.shards is not None:
                self._student.shards.accumulate(is_last=number == len(pieces))
            part = self._backward(piece.to(self._student.device), objective, weight, mean_squares)
            sums = [total + value for total, value in zip(sums, part, strict=True)]
        self._ranks.sum_gradients(self._parameters.values())
        loss, kl, cross_entropy, hidden = self._ranks.sum(*sums)
        norm = self._clip()
        if not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise InvalidInputError(
                f"the gradient of step {step} is not finite (KL {kl / tokens:.3g})",
                "resume with a lower learning_rate; if it stays, look at the traces",
            )
        self.is_whole = False
        self._optimizer.step()  # pyright: ignore[reportUnknownMemberType]  # torch leaves it half typed
        self.is_whole = True
        # None, not zeros: the first micro-batch has room for logits where it makes the head's gradient anew.
        self._optimizer.zero_grad(set_to_none=True)
        kl, cross_entropy = kl / tokens, cross_entropy / tokens
        hidden_loss = hidden if self._hidden.wanted else None
        return StepResult(loss + hidden, kl, cross_entropy, tokens, rate, norm, hidden_loss)

    def parameters(self) -> Iterable[nn.Parameter]:
        """What is trained: the student's parameters in its order, and the projections of hidden states."""
        return self._parameters.values()

    def state(self) -> dict[str, Tensor]:
        """Moments by parameter name, projections, and the state of the random generators.

        With a sharded student, called by all ranks: moments are gathered, and the rank that writes gets them.
        """
        tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
        if self._student.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self._student.device)
        for name, parameter in self._parameters.items():
            moments = cast("dict[str, Tensor]", self._optimizer.state.get(parameter, {}))
            for moment in _MOMENTS:
                if moment in moments:
                    tensors[f"{moment}.{name}"] = moments[moment]
        for name, projection in self._hidden.parameters().items():
            tensors[f"{_PROJECTION}.{name}"] = projection.detach()
        return tensors if self._student.shards is None else gather_all(tensors, keep=self._ranks.writes)

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take over a `state` that was saved after `step` steps.

        Raises:
            CheckpointError: if it is of other parameters.
        """
        expected = (
            {f"{moment}.{name}" for name in self._parameters for moment in _MOMENTS} if step else set[str]()
        )
        projections = self._hidden.parameters()
        expected |= {f"{_PROJECTION}.{name}" for name in projections}
        found = {name for name in tensors if not name.startswith("rng.")}
        if expected != found:
            different = sorted(expected ^ found)
            raise CheckpointError(
                f"the optimizer state is of other parameters: {different[0]} and "
                f"{len(different) - 1} more differ",
                "resume with the hidden terms of the loss that the run began with",
            )
        with torch.no_grad():
            for name, projection in projections.items():
                projection.copy_(_of_shape(tensors[f"{_PROJECTION}.{name}"], projection, name))
        for name, parameter in self._parameters.items():
            if step:
                self._optimizer.state[parameter] = self._parameter_state(name, parameter, tensors, step)
        torch.set_rng_state(tensors["rng.cpu"].cpu())
        if self._student.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"].cpu(), self._student.device)

    def _collate(self, batch: Batch, positions: Sequence[int]) -> list[tuple[MicroBatch, Objective]]:
        """This rank's part of a batch, in pieces of one objective each.

        Teachers mostly differ in nothing that the loss has to know; then traces of all streams share pieces.
        """
        streams = batch.streams or [0] * len(batch.traces)
        pairs = [
            (trace, self.objectives[stream]) for trace, stream in zip(batch.traces, streams, strict=True)
        ]
        mine = self._ranks.share(pairs, positions)
        return [
            (piece, objective)
            for objective in dict.fromkeys(self.objectives)
            for piece in collate(
                [trace for trace, its_objective in mine if its_objective == objective],
                self._sizes,
                vocab_size=self._student.vocab_size,
                weighting=self._weighting,
                states=self._hidden.wanted,
                temperature=objective.temperature,
            )
        ]

    def _backward(
        self, piece: MicroBatch, objective: Objective, weight: float, mean_squares: Sequence[float]
    ) -> tuple[float, float, float, float]:
        """Add a piece's gradients.

        Returns:
            Its part of the loss without the hidden terms, its sums of KL and cross-entropy, and its part of
            the hidden terms.
        """
        student = self._student
        with accumulate_rows(student.model.get_input_embeddings()):
            states_BLH, layers = student.layer_states(
                piece.input_ids_BL, piece.position_ids_BL, self._hidden.student_layers
            )
        hidden_NH = states_BLH.flatten(0, 1)[piece.positions_N]
        beside = self._hidden.loss(
            [layer_BLH.flatten(0, 1)[piece.positions_N] for layer_BLH in layers],
            piece,
            divisor=weight,
            mean_squares=mean_squares,
        )
        result = backpropagate_loss(
            hidden_NH,
            student.head_weight,
            piece.targets,
            bias_V=student.head_bias,
            objective=objective,
            divisor=weight,
            beside=beside,
        )
        kl, cross_entropy = (float(part_N.double().sum()) for part_N in (result.kl_N, result.cross_entropy_N))
        return float(result.loss), kl, cross_entropy, 0.0 if beside is None else float(beside.detach())

    def _clip(self) -> float:
        limit = self._config.grad_clip or math.inf
        if self._student.shards is not None:
            return clip_gradients(self._parameters.values(), limit, self._ranks)
        return float(nn.utils.clip_grad_norm_(self._parameters.values(), limit))

    def _parameter_state(
        self, name: str, parameter: nn.Parameter, tensors: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        moments = {
            moment: shard_like(_of_shape(tensors[f"{moment}.{name}"], parameter, name), parameter)
            for moment in _MOMENTS
        }
        return {"step": torch.tensor(float(step), device=parameter.device), **moments}


def _of_shape(saved: Tensor, parameter: nn.Parameter, name: str) -> Tensor:
    if saved.shape != parameter.shape:
        raise CheckpointError(f"the optimizer state of {name} has another shape than the parameter")
    return saved


def _group(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; a fused step is of sharded parameters or of whole ones."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.ndim > 1, is_sharded(parameter)), []).append(parameter)
    return [
        {"params": group, "weight_decay": weight_decay if is_matrix else 0.0}
        for (is_matrix, _), group in groups.items()
    ]


def _packs(student: StudentModel, packing: str) -> bool:
    if packing == "off" or (packing == "auto" and student.device.type != "cuda"):
        return False
    possible = packs_without_leaks(student)
    if packing == "on" and not possible:
        raise ConfigError(
            f"{student.directory.name} mixes sequences that are packed into one row",
            'train with packing = "off", which groups traces by length',
        )
    return possible


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step, from 1: a line up over the warmup, then as the schedule says."""
    warm = min(1.0, step / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return config.learning_rate * warm
    done = min(1.0, max(0.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)))
    fall = FINAL_RATE + (1.0 - FINAL_RATE) * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * warm * fall
