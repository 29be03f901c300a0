"""Which layers a student keeps.

Block influence (1 - cos of a layer's input and output; Men et al., ShortGPT, 2024) costs one pass, and a
teacher profile has it already. Measurement is better: it leaves out one layer after the other, always the one
whose loss raises the KL to the whole teacher least, given those that are gone; influence then only names the
layers that are worth a try.

Shape legend: B = sequences, L = padded length, H = width, V = vocabulary, N = positions that count.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lynearm.student.cutting.progress import CutProgress
from lynearm.student.cutting.sequences import CalibrationSequence
from lynearm.wire.errors import ConfigError

logger = logging.getLogger(__name__)

EXTRA_CANDIDATES = 6
"""Layers that are tried beyond the number to leave out, by least influence."""


def drop_least_influential(influence: Sequence[float], keep: int) -> tuple[int, ...]:
    """The layers of least influence, in that order, all but `keep`; of equals the deeper one first."""
    _check_count(keep, len(influence))
    order = sorted(range(len(influence)), key=lambda layer: (influence[layer], -layer))
    return tuple(order[: len(influence) - keep])


def drop_evenly(layers: int, keep: int) -> tuple[int, ...]:
    """All but `keep` layers at even distances from the first to the last, ascending."""
    _check_count(keep, layers)
    kept = {round(step * (layers - 1) / max(1, keep - 1)) for step in range(keep)}
    return tuple(layer for layer in range(layers) if layer not in kept)


def drop_others(kept: Sequence[int], layers: int) -> tuple[int, ...]:
    """All layers but those that are kept, ascending.

    Raises:
        ConfigError: if those are not different layers of the teacher.
    """
    if any(not 0 <= layer < layers for layer in kept) or len(set(kept)) != len(kept):
        raise ConfigError(
            f"layers {list(kept)} are not different layers of a teacher that has 0 to {layers - 1}"
        )
    return tuple(layer for layer in range(layers) if layer not in kept)


@torch.no_grad()
def drop_by_measurement(
    model: Any,
    keep: int,
    *,
    sequences: Sequence[CalibrationSequence],
    influence: Sequence[float],
    on_progress: Callable[[CutProgress], None],
) -> tuple[int, ...]:
    """Leave out the layer whose loss raises the KL least, until `keep` are left; in that order.

    The KL without a layer hardly ever falls as others go, so that a value from an earlier round is a lower
    bound, and a candidate that beats all bounds needs no further comparison.
    """
    _check_count(keep, len(influence))
    trial = _Trial(_Decoder(model), sequences)
    wanted = len(influence) - keep
    # Every later layer builds on the first.
    candidates = sorted(range(1, len(influence)), key=lambda layer: influence[layer])
    bounds = [(0.0, layer) for layer in candidates[: wanted + EXTRA_CANDIDATES]]
    dropped: tuple[int, ...] = ()
    kl = 0.0
    while len(dropped) < wanted:
        on_progress(CutProgress(f"{wanted - len(dropped)} layers to go", dropped, kl))
        trial.prepare(dropped)
        fresh: set[int] = set()
        while bounds[0][1] not in fresh:
            layer = bounds[0][1]
            heapq.heapreplace(bounds, (trial.kl_without(layer), layer))
            fresh.add(layer)
        kl, layer = heapq.heappop(bounds)
        dropped = (*dropped, layer)
        logger.info("left out layer %d: KL %.3f", layer, kl)
    return dropped


class _Decoder:
    """A llama-like decoder, run layer by layer."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._base = model.base_model
        self.num_layers = len(self._base.layers)

    def embed(self, input_ids_BL: Tensor) -> Tensor:
        """Input of the first layer, [B, L, H]."""
        return cast(Tensor, self._base.embed_tokens(input_ids_BL))

    def run(self, states_BLH: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Inputs of each of the layers, then the output of the last."""
        positions = torch.arange(states_BLH.shape[1])[None]
        rotary = self._base.rotary_emb(states_BLH, positions)
        inputs: list[Tensor] = []
        for layer in layers:
            inputs.append(states_BLH)
            output = self._base.layers[layer](
                states_BLH, attention_mask=None, position_ids=positions, position_embeddings=rotary
            )
            states_BLH = cast(Tensor, output[0] if isinstance(output, tuple) else output)
        return [*inputs, states_BLH]

    def logprobs(self, states_BLH: Tensor, counted_BL: Tensor) -> Tensor:
        """Log-softmax at the positions that count, [N, V]."""
        logits_NV = self._model.get_output_embeddings()(self._base.norm(states_BLH[counted_BL]))
        return torch.log_softmax(cast(Tensor, logits_NV), -1)


class _Trial:
    """Measures the teacher without some layers against the whole teacher."""

    def __init__(self, decoder: _Decoder, sequences: Sequence[CalibrationSequence]) -> None:
        self._decoder = decoder
        longest = max(len(sequence.token_ids) for sequence in sequences)
        input_ids_BL = torch.zeros(len(sequences), longest, dtype=torch.int64)
        self._counted_BL = torch.zeros(len(sequences), longest, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            input_ids_BL[row, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
            self._counted_BL[row, sequence.counted] = True
        self._layers = tuple(range(decoder.num_layers))
        self._inputs = decoder.run(decoder.embed(input_ids_BL), self._layers)
        self._teacher_NV = decoder.logprobs(self._inputs[-1], self._counted_BL)

    def prepare(self, dropped: Sequence[int]) -> None:
        """Take these layers as gone for good."""
        kept = tuple(layer for layer in self._layers if layer not in dropped)
        if len(kept) < len(self._layers):
            first = next(index for index, layer in enumerate(self._layers) if layer in dropped)
            tail = self._decoder.run(self._inputs[first], kept[first:])
            self._inputs = [*self._inputs[:first], *tail]
            self._layers = kept

    def kl_without(self, layer: int) -> float:
        """KL(teacher ‖ what is left without `layer` too), nats per position."""
        index = self._layers.index(layer)
        states_BLH = self._decoder.run(self._inputs[index], self._layers[index + 1 :])[-1]
        left_NV = self._decoder.logprobs(states_BLH, self._counted_BL)
        kl_N = (self._teacher_NV.exp() * (self._teacher_NV - left_NV)).sum(-1)
        return float(kl_N.mean())


def _check_count(keep: int, layers: int) -> None:
    if not 1 <= keep <= layers:
        raise ConfigError(f"layers is {keep}, expected 1 to the teacher's {layers}")
