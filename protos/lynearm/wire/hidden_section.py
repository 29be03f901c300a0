"""Hidden states between traces and the section of a payload that holds them; docs/format.md specifies it.

The numbers of a layer lie apart by their bytes: upper halves of bf16 look alike and compress to a third,
lower halves do not at all. Whether a part is compressed shows in its size, as with the metadata.

Shape legend: L = layers, N = completion positions of a block, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zstandard

from lynearm.v1 import trace_pb2
from lynearm.wire.compression import decompress
from lynearm.wire.errors import CodecError, CorruptBlockError, InvalidInputError, UnsupportedFormatError
from lynearm.wire.fields import ByteReader, varint
from lynearm.wire.hidden import (
    FINAL_NORM,
    HiddenDtype,
    HiddenStates,
    HiddenStatesSpec,
    Layer,
)

if TYPE_CHECKING:
    from lynearm.wire.traces import Trace

MAX_HIDDEN_BYTES = 16 << 20
"""Of a block's hidden states as arrays: four times what a payload holds of states that are any good."""

MAX_DESCRIPTION_BYTES = 4096
"""Of the message that describes them."""

_ZSTD_LEVEL = 1
"""Higher ones find nothing more: what there is to save are exponents, by their frequency."""

_DTYPE_TO_PROTO: dict[HiddenDtype, trace_pb2.HiddenStatesDtype.ValueType] = {
    "bf16": trace_pb2.HIDDEN_STATES_DTYPE_BF16,
    "fp8": trace_pb2.HIDDEN_STATES_DTYPE_FP8_E4M3,
}
_DTYPE_FROM_PROTO: dict[int, HiddenDtype] = {int(code): name for name, code in _DTYPE_TO_PROTO.items()}


def hidden_spec_to_proto(spec: HiddenStatesSpec) -> trace_pb2.HiddenStatesSpec:
    """The message of a spec."""
    return trace_pb2.HiddenStatesSpec(
        layers=[layer for layer in spec.layers if layer != FINAL_NORM],
        final_norm=FINAL_NORM in spec.layers,
        dtype=_DTYPE_TO_PROTO[spec.dtype],
        hidden_size=spec.hidden_size,
    )


def hidden_spec_from_proto(message: trace_pb2.HiddenStatesSpec) -> HiddenStatesSpec:
    """The spec in a message.

    Raises:
        InvalidInputError: naming the field that is out of range.
        UnsupportedFormatError: if the type is newer than this package.
    """
    if message.dtype not in _DTYPE_FROM_PROTO:
        raise UnsupportedFormatError(
            f"hidden states of type {message.dtype}, which is not known here", "upgrade lynearm"
        )
    norm: tuple[Layer, ...] = (FINAL_NORM,) if message.final_norm else ()
    return HiddenStatesSpec((*message.layers, *norm), _DTYPE_FROM_PROTO[message.dtype], message.hidden_size)


def spec_of_traces(traces: Sequence[Trace]) -> HiddenStatesSpec | None:
    """What hidden states the traces of a block have, all of them alike; None: they have none.

    Raises:
        CodecError: if they differ in that, or have too many for a block.
    """
    wanted = traces[0].hidden.spec if traces[0].hidden is not None else None
    for trace in traces:
        found = trace.hidden.spec if trace.hidden is not None else None
        if found != wanted:
            raise CodecError(
                f"trace of prompt {trace.prompt_id!r} has {_named(found)}, those before it {_named(wanted)}",
                "put only traces of one kind into a block",
            )
    size = sum(trace.hidden.size_bytes for trace in traces if trace.hidden is not None)
    if size > MAX_HIDDEN_BYTES:
        raise CodecError(
            f"{size} bytes of hidden states: a block's limit is {MAX_HIDDEN_BYTES}",
            "put fewer traces into one block, or capture fewer layers",
        )
    return wanted


def write_hidden(traces: Sequence[Trace], spec: HiddenStatesSpec | None) -> bytes:
    """The section of some traces, its size in front; nothing where they have no hidden states.

    Args:
        traces: Of one block.
        spec: From `spec_of_traces`.
    """
    if spec is None:
        return b""
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=False)
    states = [trace.hidden for trace in traces if trace.hidden is not None]
    parts: list[bytes] = []
    for layer in range(len(spec.layers)):
        values_NH = np.concatenate([one.values[layer] for one in states])
        planes = [values_NH.astype("<u2").view(np.uint8)[:, half::2] for half in (1, 0)]
        if spec.dtype == "fp8":
            scales_N = np.concatenate([one.scales[layer] for one in states if one.scales is not None])
            planes = [scales_N.astype("<f4").view(np.uint8), values_NH.view(np.uint8)]
        for plane in planes:
            content = plane.tobytes()
            # Of equal size, the plane itself: that size is how a reader tells them apart.
            stored = min(content, compressor.compress(content), key=len) if content else content
            parts += [varint(len(stored)), stored]
    section = b"".join(parts)
    return varint(len(section)) + section


def read_hidden(spec: HiddenStatesSpec, section: memoryview, positions: int) -> HiddenStates:
    """The hidden states of a block, over all its completion positions.

    Args:
        spec: From the block's metadata.
        section: Nothing in it is trusted.
        positions: N.

    Raises:
        CorruptBlockError: if a size or value does not hold.
        UnsupportedFormatError: if it uses a zstd dictionary.
    """
    size = spec.bytes_per_position * positions
    if size > MAX_HIDDEN_BYTES:
        raise CorruptBlockError(f"{size} bytes of hidden states are beyond any block")
    reader = ByteReader(section)
    shape = (positions, spec.hidden_size)
    values: list[npt.NDArray[Any]] = []
    scales: list[npt.NDArray[np.float32]] = []
    for _ in spec.layers:
        if spec.dtype == "bf16":
            upper, lower = (_read_plane(reader, positions * spec.hidden_size) for _ in range(2))
            bits: npt.NDArray[np.uint16] = upper.astype(np.uint16) << np.uint16(8) | lower
            values.append(bits.reshape(shape))
        else:
            scales.append(_read_plane(reader, 4 * positions).view("<f4").astype(np.float32))
            values.append(_read_plane(reader, positions * spec.hidden_size).reshape(shape))
    if left := len(reader.rest()):
        raise CorruptBlockError(f"{left} bytes behind the hidden states")
    try:
        return HiddenStates(
            spec.layers, spec.dtype, np.stack(values), np.stack(scales) if spec.dtype == "fp8" else None
        )
    except CodecError as error:
        raise CorruptBlockError(f"the block holds hidden states that cannot be: {error}") from error


def read_description(message: trace_pb2.HiddenStatesSpec) -> HiddenStatesSpec:
    """The spec in a block's metadata.

    Raises:
        CorruptBlockError: naming the field that is out of range.
        UnsupportedFormatError: if the type is newer than this package.
    """
    try:
        return hidden_spec_from_proto(message)
    except InvalidInputError as error:
        raise CorruptBlockError(error.message) from error


def slice_hidden(states: HiddenStates, rows: slice) -> HiddenStates:
    """The states of some positions; a view."""
    scales = None if states.scales is None else states.scales[:, rows]
    return HiddenStates(states.layers, states.dtype, states.values[:, rows], scales)


def _read_plane(reader: ByteReader, size: int) -> npt.NDArray[np.uint8]:
    stored = reader.take(reader.varint())
    if len(stored) == size:
        return np.frombuffer(bytes(stored), np.uint8)
    content = decompress(stored, limit=size)
    if len(content) != size:
        raise CorruptBlockError(f"a part of the hidden states has {len(content)} bytes, expected {size}")
    return np.frombuffer(content, np.uint8)


def _named(spec: HiddenStatesSpec | None) -> str:
    if spec is None:
        return "no hidden states"
    layers = ", ".join(map(str, spec.layers))
    return f"hidden states of layers {layers} in {spec.dtype}, {spec.hidden_size} wide"
