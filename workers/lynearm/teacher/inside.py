"""A look inside the engine's model: which states it captures, and of which request each row is.

vLLM's workers keep rows under ids that vLLM made up; they are collected after every step, wait here until
their request is finished, and go with it. A request that is dropped takes its rows along, and rows of
requests that are not known are let go: those of an aborted one, or of a step that ran on after an end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.inside_options import HiddenCapture, LayerStats
from lynearm.teacher.inside_worker import InsideReport, StepStates
from lynearm.wire.blocks import MAX_PAYLOAD_BYTES
from lynearm.wire.errors import ConfigError, TeacherError
from lynearm.wire.hidden import HiddenStates, HiddenStatesSpec
from lynearm.wire.profiles import LayerStatistics

Untyped: TypeAlias = Any
"""An object of vLLM, which ships no types that a strict checker accepts."""


@dataclass(slots=True)
class _Rows:
    """What was captured of one request, by completion position."""

    values: dict[int, npt.NDArray[Any]] = field(default_factory=dict[int, "npt.NDArray[Any]"])
    """Each of shape [L, H]."""
    scales: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict[int, "npt.NDArray[np.float32]"])
    """Each of shape [L]; with fp8 only."""


class LookInside:
    """What is captured and measured in an engine from now on, until `close`.

    Args:
        engine: vLLM's LLMEngine, eager, with its V1 model runner.
        capture: Hidden states to keep; None keeps none.
        stats: How to measure layers; None measures none.

    Raises:
        ConfigError: if this vLLM or this model cannot be looked into, or has no such layer.
    """

    def __init__(self, engine: Untyped, capture: HiddenCapture | None, stats: LayerStats | None) -> None:
        self._engine = engine
        self._rows: dict[str, _Rows] = {}
        self._internal_ids: dict[str, str] = {}
        reports: list[InsideReport] = engine.collective_rpc(
            "lynearm_describe_model", args=(stats is not None,)
        )
        problem = next((report.problem for report in reports if report.problem), "")
        if problem:
            raise ConfigError(f"cannot look inside the teacher: {problem}", "leave out --capture and --stats")
        self.spec: HiddenStatesSpec | None = None
        """Of the states that each completion gets."""
        if capture is not None:
            layers = capture.resolve(reports[0].layer_count)
            self.spec = HiddenStatesSpec(layers, capture.dtype, reports[0].hidden_size)
        if engine.has_unfinished_requests():
            raise TeacherError("cannot begin to look inside while requests are on their way")
        wanted = ((), "bf16") if self.spec is None else (self.spec.layers, self.spec.dtype)
        engine.collective_rpc("lynearm_look_inside", args=(*wanted, 0 if stats is None else stats.every))
        self._try_out()

    @property
    def waiting_rows(self) -> int:
        """Rows of requests that are not finished."""
        return sum(len(rows.values) for rows in self._rows.values())

    def begin(self, request_id: str, internal_id: str) -> None:
        """Expect rows of a request, which vLLM calls by another id."""
        if self.spec is not None:
            self._internal_ids[request_id] = internal_id
            self._rows[internal_id] = _Rows()

    def collect(self) -> None:
        """Take the rows of the last step out of vLLM's workers."""
        if self.spec is None:
            return
        steps: list[StepStates] = self._engine.collective_rpc("lynearm_take_states")[0]
        for step in steps:
            for index, internal_id in enumerate(step.request_ids):
                rows = self._rows.get(internal_id)
                if rows is None:
                    continue
                # Copies: a view would keep the whole step for as long as its longest request. What comes
                # again, after a preemption that took back a step, takes the place of what was there.
                position = int(step.positions[index])
                rows.values[position] = step.values[:, index].copy()
                if step.scales is not None:
                    rows.scales[position] = step.scales[:, index].copy()

    def finish(self, request_id: str, positions: int) -> HiddenStates | None:
        """The states of a finished request, at its completion positions; None where none are captured.

        Raises:
            TeacherError: if rows are missing.
        """
        rows = self._forget(request_id)
        if self.spec is None or rows is None:
            return None
        missing = [position for position in range(positions) if position not in rows.values]
        if missing:
            raise TeacherError(
                f"no hidden states came of position {missing[0]} of request {request_id!r}, and of "
                f"{len(missing)} positions of {positions} in all"
            )
        layers, size = len(self.spec.layers), self.spec.hidden_size
        values: npt.NDArray[Any] = np.zeros(
            (layers, positions, size), np.uint16 if self.spec.dtype == "bf16" else np.uint8
        )
        scales = np.ones((layers, positions), np.float32) if self.spec.dtype == "fp8" else None
        for position in range(positions):
            values[:, position] = rows.values[position]
            if scales is not None:
                scales[:, position] = rows.scales[position]
        return HiddenStates(self.spec.layers, self.spec.dtype, values, scales)

    def drop(self, request_id: str) -> None:
        """Forget a request that was aborted."""
        self._forget(request_id)

    def take_statistics(self) -> Mapping[int, LayerStatistics]:
        """The sums over the positions since the last call, by layer."""
        taken: Mapping[int, LayerStatistics] = self._engine.collective_rpc("lynearm_take_statistics")[0]
        return taken

    def close(self) -> None:
        """Stop looking."""
        self._engine.collective_rpc("lynearm_look_away")
        self._rows.clear()
        self._internal_ids.clear()

    def _try_out(self) -> None:
        """Generate a token, so that a model that is laid out in another way is noticed now."""
        from vllm import SamplingParams

        parameters: Untyped = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self._engine.add_request("look-inside", {"prompt_token_ids": [3, 2, 1]}, parameters)
        try:
            while self._engine.has_unfinished_requests():
                self._engine.step()
        except TeacherError as error:
            self.close()
            raise ConfigError(f"cannot look inside the teacher: {error.message}", error.remedy) from error
        self._engine.collective_rpc("lynearm_take_states")
        self.take_statistics()

    def _forget(self, request_id: str) -> _Rows | None:
        return self._rows.pop(self._internal_ids.pop(request_id, ""), None)


def check_block_room(config: TeachConfig, spec: HiddenStatesSpec) -> None:
    """Refuse to capture what a block may not have room for: all completions of a prompt share one.

    Raises:
        ConfigError: naming the sizes.
    """
    tokens = config.completions * min(config.max_tokens, config.max_model_len)
    size = config.prompt_bytes_bound() + tokens * spec.bytes_per_position
    if size > MAX_PAYLOAD_BYTES:
        raise ConfigError(
            f"{config.completions} completions of {config.max_tokens} tokens with {spec.bytes_per_position} "
            f"bytes of hidden states each can exceed a block of {MAX_PAYLOAD_BYTES} bytes, and those of one "
            f"prompt share a block",
            "capture fewer layers, capture them as fp8, or lower max_tokens",
        )
