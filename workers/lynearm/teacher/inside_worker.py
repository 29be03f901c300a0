"""Inside vLLM's worker: hooks that keep the states from which tokens are sampled, and measure layers.

Invariants: only rows from which a completion token is sampled are kept, as copies, in the type in which they
travel; they leave with the next `lynearm_take_states`, so that a worker holds those of a step or two. A step
that fails leaves nothing. Outside a step, as when vLLM measures its memory, the hooks do nothing.

Shape legend: L = layers, B = sampled rows of a step, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lynearm.teacher.layer_meters import LayerMeters
from lynearm.teacher.model_layout import (
    SampledRows,
    check_stream,
    find_layout,
    find_sampled_rows,
    layer_input,
    layout_problem,
    take_normed,
    take_rows,
)
from lynearm.wire.hidden import FINAL_NORM, FP8_MAX, SMALLEST_SCALE, HiddenDtype, Layer
from lynearm.wire.profiles import LayerStatistics

if TYPE_CHECKING:
    from torch import Tensor

Untyped: TypeAlias = Any
"""An object of vLLM, which ships no types that a strict checker accepts."""


@dataclass(frozen=True, slots=True)
class InsideReport:
    """What a worker found when it was told to look inside."""

    problem: str = ""
    """Why it cannot; empty when it does."""
    layer_count: int = 0
    hidden_size: int = 0


@dataclass(frozen=True, slots=True)
class StepStates:
    """The captured rows of one step."""

    request_ids: tuple[str, ...]
    """vLLM's own ids, of the B requests."""
    positions: npt.NDArray[np.int32]
    """Which completion token each row predicts, shape [B]."""
    values: npt.NDArray[Any]
    """uint16 or uint8, shape [L, B, H]."""
    scales: npt.NDArray[np.float32] | None
    """Shape [L, B]; with fp8 only."""


class InsideWorker:
    """Base class of `WorkerExtension`: a look inside the model."""

    # vLLM's own, in the class that this one is mixed into.
    model_runner: Untyped
    rank: int

    # Ours: one look, or none.
    lynearm_look: _Look | None

    def lynearm_describe_model(self, needs_meters: bool) -> InsideReport:
        """Whether one can look inside, and how large the model is."""
        problem = layout_problem(self.model_runner)
        if problem:
            return InsideReport(problem)
        layout = find_layout(self.model_runner)
        if needs_meters and self.model_runner.vllm_config.parallel_config.tensor_parallel_size > 1:
            return InsideReport("heads and neurons of layers are split over several workers")
        return InsideReport(layer_count=len(layout.layers), hidden_size=layout.hidden_size)

    def lynearm_look_inside(self, layers: Sequence[Layer], dtype: HiddenDtype, every: int) -> None:
        """Begin to look, in place of an earlier look; only after `lynearm_describe_model` found no problem.

        Args:
            layers: Whose states to keep.
            dtype: Their type.
            every: Measures all layers in one step of so many; 0 in none.
        """
        self.lynearm_look_away()
        # Every rank of a tensor-parallel group has the whole stream: one is enough.
        if self.rank == 0:
            self.lynearm_look = _Look(self.model_runner, layers, dtype, every)

    def lynearm_take_states(self) -> list[StepStates]:
        """The rows of the steps since the last call."""
        look = getattr(self, "lynearm_look", None)
        return [] if look is None else look.take_states()

    def lynearm_take_statistics(self) -> dict[int, LayerStatistics]:
        """The sums over the positions since the last call, by layer."""
        look = getattr(self, "lynearm_look", None)
        return {} if look is None or look.meters is None else look.meters.take()

    def lynearm_look_away(self) -> None:
        """Stop looking, and forget what was not taken."""
        look = getattr(self, "lynearm_look", None)
        if look is not None:
            look.close()
        self.lynearm_look = None


class _Look:
    """Hooks in a model, and what they found."""

    def __init__(self, runner: Untyped, layers: Sequence[Layer], dtype: HiddenDtype, every: int) -> None:
        self._runner = runner
        self._layout = find_layout(runner)
        self._layers = tuple(layers)
        self._dtype = dtype
        self._every = every
        self.meters = LayerMeters(self._layout) if every else None
        self._steps = 0
        self._in_step = False
        self._is_metering = False
        self._is_checked = False
        self._sampled: SampledRows | None = None
        self._states: dict[Layer, Tensor] = {}
        self._before: Tensor | None = None
        self._done: list[StepStates] = []
        self._execute: Callable[..., Untyped] = runner.execute_model
        runner.execute_model = self._execute_model
        self._handles: list[Untyped] = []
        self._hook()

    def take_states(self) -> list[StepStates]:
        """The rows since the last call."""
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        if self.meters is not None:
            self.meters.close()
        # An attribute of the object, which hides the method of its class.
        del self._runner.execute_model

    def _hook(self) -> None:
        last = len(self._layout.layers) - 1
        first: Untyped = self._layout.layers[0]
        if self.meters is not None:
            self._handles.append(first.register_forward_pre_hook(self._see_input, with_kwargs=True))
        for number, layer in enumerate(self._layout.layers):
            if self.meters is not None or number in self._layers or number == last:
                self._handles.append(layer.register_forward_hook(self._seer(number)))
        self._handles.append(self._layout.norm.register_forward_hook(self._seer(FINAL_NORM)))

    def _execute_model(self, *arguments: Untyped, **keywords: Untyped) -> Untyped:
        """A step: vLLM's own, and what the hooks saw in it."""
        self._begin_step()
        try:
            output = self._execute(*arguments, **keywords)
            self._end_step()
        finally:
            self._in_step = False
            self._sampled = self._before = None
            self._states.clear()
            if self.meters is not None:
                self.meters.rows = None
        return output

    def _begin_step(self) -> None:
        self._in_step = True
        self._is_metering = self._every > 0 and self._steps % self._every == 0
        self._steps += 1

    def _end_step(self) -> None:
        sampled = self._sampled
        if sampled is None or not sampled.request_ids:
            # Nothing was scheduled, or nobody wanted to know of it; or only parts of prompts were computed.
            return
        if not self._is_checked:
            last: Layer = len(self._layout.layers) - 1
            check_stream(self._layout, self._states[last], self._states[FINAL_NORM])
            self._is_checked = True
        if self.meters is not None and self._is_metering:
            self.meters.end_step(len(sampled.request_ids))
        if self._layers:
            self._done.append(self._encode(sampled))

    def _see_input(self, layer: Untyped, arguments: Sequence[Untyped], keywords: dict[str, Untyped]) -> None:
        if self._in_step and self._is_metering and self.meters is not None:
            rows = self._rows()
            self._before = take_rows(layer_input(layer, arguments, keywords), rows)
            self.meters.rows = rows

    def _seer(self, layer: Layer) -> Callable[..., None]:
        def see(_module: Untyped, _arguments: Untyped, output: Untyped) -> None:
            if not self._in_step:
                return
            is_wanted = layer in self._layers or self._is_to_be_checked(layer)
            if layer == FINAL_NORM:
                if is_wanted:
                    self._states[layer] = take_normed(output, self._rows())
                return
            if not (is_wanted or self._is_metering):
                return
            stream = take_rows(output, self._rows())
            if self.meters is not None and self._before is not None:
                self.meters.see_layer(layer, self._before, stream)
                self._before = stream
            if is_wanted:
                self._states[layer] = stream

        return see

    def _is_to_be_checked(self, layer: Layer) -> bool:
        return not self._is_checked and layer in (FINAL_NORM, len(self._layout.layers) - 1)

    def _rows(self) -> Tensor:
        if self._sampled is None:
            self._sampled = find_sampled_rows(self._runner)
        return self._sampled.rows

    def _encode(self, sampled: SampledRows) -> StepStates:
        """The kept rows in the type in which they travel, as `HiddenStates.from_float32` rounds them."""
        import torch

        states_LBH = torch.stack([self._states[layer] for layer in self._layers])
        if self._dtype == "bf16":
            bits = states_LBH.to(torch.bfloat16).view(torch.int16).cpu().numpy().view(np.uint16)
            return StepStates(sampled.request_ids, sampled.positions, bits, None)
        states_LBH = states_LBH.float()
        scales_LB = (states_LBH.abs().amax(dim=2) / FP8_MAX).clamp(min=SMALLEST_SCALE)
        codes = (states_LBH / scales_LB[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
        return StepStates(
            sampled.request_ids, sampled.positions, codes.cpu().numpy(), scales_LB.cpu().numpy()
        )
