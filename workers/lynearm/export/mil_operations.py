"""The MIL operations that our programs consist of after conversion, in torch.

Semantics are those of the iOS 18 operation set, for the arguments that we emit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Operands: TypeAlias = dict[str, Any]
"""Arguments by name: tensors, a list of tensors for `values`, strings for types, a name for a state."""
States: TypeAlias = dict[str, torch.Tensor]
Operation: TypeAlias = Callable[[Operands, States], Any]

MOVES = frozenset(
    {
        "concat",
        "expand_dims",
        "gather",
        "identity",
        "read_state",
        "reshape",
        "slice_by_index",
        "slice_by_size",
        "slice_update",
        "tile",
        "transpose",
    }
)
"""Operations that compute nothing: what they return needs no rounding."""

_CAST_TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float32,  # rounded by the interpreter, by the type of the output
    "int32": torch.int32,
    "int16": torch.int32,
    "uint16": torch.int32,
}


def _integers(x: torch.Tensor) -> list[int]:
    return [int(value) for value in x.reshape(-1)]


def _flags(operands: Operands, name: str, count: int) -> list[bool]:
    return [bool(flag) for flag in operands[name].reshape(-1)] if name in operands else [False] * count


def _slices(operands: Operands, shape: torch.Size) -> tuple[int | slice, ...]:
    """What `begin`, `end`, their masks and `squeeze_mask` select; negative ends count from the back."""
    rank = len(shape)
    begins, ends = _integers(operands["begin"]), _integers(operands["end"])
    from_start, to_end = _flags(operands, "begin_mask", rank), _flags(operands, "end_mask", rank)
    squeeze = _flags(operands, "squeeze_mask", rank)
    selected: list[int | slice] = []
    for axis, size in enumerate(shape):
        begin = 0 if from_start[axis] else begins[axis] + (size if begins[axis] < 0 else 0)
        end = size if to_end[axis] else ends[axis] + (size if ends[axis] < 0 else 0)
        selected.append(begin if squeeze[axis] else slice(begin, end))
    return tuple(selected)


def _slice_by_index(operands: Operands, _: States) -> torch.Tensor:
    x: torch.Tensor = operands["x"]
    return x[_slices(operands, x.shape)]


def _slice_by_size(operands: Operands, _: States) -> torch.Tensor:
    x: torch.Tensor = operands["x"]
    begins, sizes = _integers(operands["begin"]), _integers(operands["size"])
    return x[tuple(slice(b, None if s == -1 else b + s) for b, s in zip(begins, sizes, strict=True))]


def _slice_update(operands: Operands, _: States) -> torch.Tensor:
    updated: torch.Tensor = operands["x"].clone()
    updated[_slices(operands, updated.shape)] = operands["update"]
    return updated


def _read_state(operands: Operands, states: States) -> torch.Tensor:
    return states[operands["input"]]


def _write_state(operands: Operands, states: States) -> None:
    states[operands["input"]] = operands["data"]


def _gather(operands: Operands, _: States) -> torch.Tensor:
    x, axis = operands["x"], int(operands["axis"])
    indices: torch.Tensor = operands["indices"]
    shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
    return torch.index_select(x, axis, indices.reshape(-1).long()).reshape(shape)


def _linear(operands: Operands, _: States) -> torch.Tensor:
    return torch.nn.functional.linear(operands["x"], operands["weight"], operands.get("bias"))


def _reshape(operands: Operands, _: States) -> torch.Tensor:
    x: torch.Tensor = operands["x"]
    return x.reshape(
        [x.shape[i] if size == 0 else size for i, size in enumerate(_integers(operands["shape"]))]
    )


def _expand_dims(operands: Operands, _: States) -> torch.Tensor:
    x: torch.Tensor = operands["x"]
    for axis in sorted(_integers(operands["axes"])):
        x = x.unsqueeze(axis)
    return x


def _concat(operands: Operands, _: States) -> torch.Tensor:
    return torch.cat(
        [value.reshape(-1) if value.dim() == 0 else value for value in operands["values"]],
        int(operands["axis"]),
    )


def _reduce_mean(operands: Operands, _: States) -> torch.Tensor:
    x: torch.Tensor = operands["x"]
    return x.mean(_integers(operands["axes"]), keepdim=bool(operands["keep_dims"]))


def _attention(operands: Operands, _: States) -> torch.Tensor:
    query, key = operands["query"], operands["key"]
    scores: torch.Tensor = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    mixed: torch.Tensor = torch.softmax(scores + operands["attn_mask"], -1) @ operands["value"]
    return mixed


def _unpack_blocks(operands: Operands, _: States) -> torch.Tensor:
    """constexpr_blockwise_shift_scale: scale · (code − offset), scales repeated over their blocks."""
    codes: torch.Tensor = operands["data"].float()
    if "offset" in operands:
        codes = codes - _repeat_blocks(operands["offset"].float(), codes.shape)
    return codes * _repeat_blocks(operands["scale"], codes.shape)


def _repeat_blocks(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    for axis, (blocks, size) in enumerate(zip(x.shape, shape, strict=True)):
        if blocks != size:
            x = x.repeat_interleave(size // blocks, axis)
    return x


OPERATIONS: dict[str, Operation] = {
    "add": lambda a, _: a["x"] + a["y"],
    "cast": lambda a, _: a["x"].to(_CAST_TYPES[a["dtype"]]),
    "concat": _concat,
    "constexpr_blockwise_shift_scale": _unpack_blocks,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "identity": lambda a, _: a["x"],
    "linear": _linear,
    "mul": lambda a, _: a["x"] * a["y"],
    "read_state": _read_state,
    "reduce_mean": _reduce_mean,
    "reshape": _reshape,
    "rsqrt": lambda a, _: torch.rsqrt(a["x"] + a["epsilon"]),
    "scaled_dot_product_attention": _attention,
    "shape": lambda a, _: torch.tensor(a["x"].shape, dtype=torch.int32),
    "silu": lambda a, _: torch.nn.functional.silu(a["x"]),
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "sub": lambda a, _: a["x"] - a["y"],
    "tile": lambda a, _: a["x"].repeat(_integers(a["reps"])),
    "transpose": lambda a, _: a["x"].permute(_integers(a["perm"])),
    "write_state": _write_state,
}
