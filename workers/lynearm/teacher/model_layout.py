"""Where in vLLM's copy of a model its layers are, and which rows of a step are of which request.

Everything that a look inside takes for granted about vLLM stands here, and is checked before it is used: its
V1 model runner and the model's modules when the look begins and, once real states flow, that the final norm
of what is taken for the residual stream is what the model computes (`check_stream`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lynearm.teacher.vllm_internals import version_problem
from lynearm.wire.errors import TeacherError

if TYPE_CHECKING:
    from torch import Tensor

Untyped: TypeAlias = Any
"""An object of vLLM, which ships no types that a strict checker accepts."""

_RUNNER_PARTS = (
    "model",
    "execute_model",
    "input_batch.req_ids",
    "input_batch.num_reqs",
    "input_batch.num_prompt_tokens",
    "query_start_loc.np",
    "discard_request_mask.np",
    "optimistic_seq_lens_cpu",
)

_STREAM_TOLERANCE = 2e-2
"""Of a row's norm: what the rounding of bfloat16 between here and there may add."""


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """The modules of a model that a look inside hooks."""

    layers: tuple[Untyped, ...]
    """Decoder layers: called with `hidden_states` and `residual`, they return both."""
    norm: Untyped
    """The final norm."""
    hidden_size: int
    dtype: Untyped
    """torch's, in which the model computes."""
    device: Untyped


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows of a step from which a token is sampled: B of them."""

    request_ids: tuple[str, ...]
    """vLLM's own ids of the requests."""
    positions: npt.NDArray[np.int32]
    """Which completion token each row predicts, shape [B]."""
    rows: Tensor
    """Where they lie among the step's rows, shape [B]."""


def layout_problem(runner: Untyped) -> str:
    """Why nothing can be seen inside with this model runner; empty when all is as expected."""
    import vllm

    if problem := version_problem():
        return f"vllm {vllm.__version__}: {problem}"
    missing = [name for name in _RUNNER_PARTS if not _has(runner, name)]
    if missing:
        return f"{type(runner).__name__} of vllm {vllm.__version__} has no {', '.join(missing)}"
    parallel: Untyped = runner.vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1:
        return "the model is split into a pipeline, or runs several times"
    if runner.vllm_config.speculative_config is not None:
        return "the engine decodes speculatively"
    if not runner.vllm_config.model_config.enforce_eager:
        return "the model is compiled: hooks see nothing"
    return _model_problem(runner.model)


def find_layout(runner: Untyped) -> ModelLayout:
    """The modules to hook; only after `layout_problem` found nothing."""
    inner: Untyped = runner.model.model
    config: Untyped = runner.vllm_config.model_config
    return ModelLayout(
        tuple(inner.layers), inner.norm, int(config.get_hidden_size()), config.dtype, runner.device
    )


def find_sampled_rows(runner: Untyped) -> SampledRows:
    """Which rows of the step that runs predict a completion token, and of which request.

    A chunk of a prompt that is not its last predicts nothing, and neither does what is computed anew after a
    preemption, but for its last row, which goes on where the request was.
    """
    import torch

    batch: Untyped = runner.input_batch
    count = int(batch.num_reqs)
    is_sampled = ~runner.discard_request_mask.np[:count].astype(bool)
    known_tokens: npt.NDArray[np.int64] = runner.optimistic_seq_lens_cpu[:count].numpy()
    positions = (known_tokens - batch.num_prompt_tokens[:count])[is_sampled].astype(np.int32)
    rows = runner.query_start_loc.np[1 : count + 1][is_sampled].astype(np.int64) - 1
    ids = tuple(str(batch.req_ids[index]) for index in np.flatnonzero(is_sampled))
    return SampledRows(ids, positions, torch.tensor(rows, device=runner.device))


def take_rows(states: Untyped, rows: Tensor) -> Tensor:
    """Some rows of the residual stream behind a module; a copy, since vLLM goes on to change it in place.

    Args:
        states: What the module returned: the stream, or the two parts whose sum it is (None: no second one).
        rows: Which rows, shape [B].

    Raises:
        TeacherError: if it is something else.
    """
    parts: list[Untyped] = [*states] if _is_tuple(states) else [states]
    tensors: list[Untyped] = [part for part in parts if part is not None]
    if not 1 <= len(tensors) <= 2 or any(getattr(tensor, "ndim", 0) != 2 for tensor in tensors):
        raise TeacherError(
            f"a layer of the model returns {_shapes(parts)}, expected its hidden states and the residual",
            "look inside another model, or leave out --capture and --stats",
        )
    taken: Tensor = tensors[0].index_select(0, rows)
    if len(tensors) == 2:
        taken += tensors[1].index_select(0, rows)
    return taken


def take_normed(output: Untyped, rows: Tensor) -> Tensor:
    """Some rows of what the final norm put out.

    Args:
        output: What it returned; beside that it may return the residual stream, which nobody reads.
        rows: Which rows, shape [B].
    """
    return take_rows(output[0] if _is_tuple(output) else output, rows)


def layer_input(layer: Untyped, arguments: Sequence[Untyped], keywords: dict[str, Untyped]) -> Untyped:
    """What a layer is given as the residual stream: the two parts of it, as `take_rows` takes them."""
    given = inspect.signature(layer.forward).bind(*arguments, **keywords).arguments
    return given["hidden_states"], given.get("residual")


def check_stream(layout: ModelLayout, last: Tensor, normed: Tensor) -> None:
    """Make sure that what was taken for the residual stream behind the last layer is it.

    Args:
        layout: Of the model.
        last: Rows of that stream, shape [B, H].
        normed: The same rows of what the final norm put out.

    Raises:
        TeacherError: if the norm of the one is not the other.
    """
    # Not through the module's call, which would call our own hooks.
    expected: Tensor = layout.norm.forward(last.clone())
    difference, size = (float(rows.float().square().sum().sqrt()) for rows in (expected - normed, normed))
    # NaN compares as false.
    if not difference <= _STREAM_TOLERANCE * size:
        off = difference / size if size else float("inf")
        raise TeacherError(
            f"the model is laid out in another way: its final norm is off by {off:.2g} from that of the "
            f"residual stream behind its last layer, expected {_STREAM_TOLERANCE:g} at most",
            "look inside another model, or leave out --capture and --stats",
        )


def _model_problem(model: Untyped) -> str:
    inner = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    if layers is None or not len(layers) or getattr(inner, "norm", None) is None:
        return f"{type(model).__name__} has no model.layers and model.norm"
    for layer in layers:
        if "hidden_states" not in inspect.signature(layer.forward).parameters:
            return f"{type(layer).__name__} takes no hidden_states"
    return ""


def _has(owner: Untyped, path: str) -> bool:
    for name in path.split("."):
        owner = getattr(owner, name, None)
        if owner is None:
            return False
    return True


def _shapes(parts: Sequence[Untyped]) -> str:
    return ", ".join(f"{type(part).__name__} {tuple(getattr(part, 'shape', ()))}" for part in parts)


def _is_tuple(value: Untyped) -> bool:
    # Asked here, since what a tuple of vLLM's holds has no type either.
    return isinstance(value, tuple)
