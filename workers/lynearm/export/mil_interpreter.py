"""Runs a saved Core ML program in torch, where there is no Apple hardware to run it.

Reads what lies in the `.mlpackage` (the protobuf and the weight file), so that what is checked is the file
that ships and not the graph that it was made from. Arithmetic is float32; results that the program types as
float16 are rounded to float16, unpacked weights included, as a device stores them. What it cannot show: that
Apple's compiler accepts the program, float16 accumulation, and speed.

Tensors are never changed in place; states are replaced by name.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from lynearm.export.coreml_library import MIL_pb2, Model_pb2
from lynearm.export.mil_operations import MOVES, OPERATIONS, Operands
from lynearm.wire.errors import ParityError

# Any: the generated protobuf classes of coremltools are untyped.
Message: TypeAlias = Any
RawArray: TypeAlias = npt.NDArray[Any]

MODEL_FILE = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHT_FILE = Path("Data/com.apple.CoreML/weights/weight.bin")

BLOB_MAGIC = 0xDEADBEEF
_BLOB_HEADER = struct.Struct("<IIQQ")
"""Magic, element type, size in bytes, offset of the data in the file."""

_DTYPES: dict[int, Any] = {
    MIL_pb2.FLOAT16: np.float16,
    MIL_pb2.FLOAT32: np.float32,
    MIL_pb2.INT32: np.int32,
    MIL_pb2.BOOL: np.bool_,
    MIL_pb2.INT8: np.int8,
    MIL_pb2.UINT8: np.uint8,
    MIL_pb2.INT16: np.int16,
    MIL_pb2.UINT16: np.uint16,
}


class MilInterpreter:
    """One function of a saved package, with the states of one conversation.

    Args:
        package: The `.mlpackage` directory.

    Raises:
        ParityError: if the package holds no program, or an operation that we never emit.
    """

    def __init__(self, package: Path) -> None:
        spec: Message = Model_pb2.Model()
        spec.ParseFromString((package / MODEL_FILE).read_bytes())
        if not spec.HasField("mlProgram"):
            raise ParityError(f"{package.name} holds no ML program", "export again")
        function = spec.mlProgram.functions["main"]
        self._block: Message = function.block_specializations[function.opset]
        self._blob: npt.NDArray[np.uint8] = np.memmap(package / WEIGHT_FILE, dtype=np.uint8, mode="r")
        self._state_shapes = {
            state.name: tuple(state.type.stateType.arrayType.shape) for state in spec.description.state
        }
        self._state_inputs = {
            item.name for item in function.inputs if item.type.WhichOneof("type") == "stateType"
        }
        self.states: dict[str, torch.Tensor] = {}
        self.reset()
        self._constants: dict[str, Any] = {}
        self._fold_constants()
        self._last_uses = _find_last_uses(self._steps, {str(name) for name in self._block.outputs})

    @property
    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the states by name."""
        return self._state_shapes

    def reset(self) -> None:
        """Empties the states, as a new conversation does."""
        self.states = {name: torch.zeros(shape) for name, shape in self._state_shapes.items()}

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One prediction; reads and replaces the states.

        Args:
            inputs: By name, with the shapes that the program expects.

        Returns:
            Outputs by name, float32 or int32.
        """
        values: dict[str, Any] = {name: name for name in self._state_inputs}
        values |= inputs
        for step, dead in zip(self._steps, self._last_uses, strict=True):
            self._execute(step, values)
            for name in dead:
                values.pop(name, None)
        return {name: values[name] for name in self._block.outputs}

    def _fold_constants(self) -> None:
        """Reads constants and unpacks compressed weights once; the rest are the steps of each run."""
        self._steps: list[Message] = []
        for operation in self._block.operations:
            if operation.type == "const":
                self._constants[operation.outputs[0].name] = self._value(operation.attributes["val"])
            elif operation.type.startswith("constexpr_"):
                self._execute(operation, self._constants)
            else:
                self._steps.append(operation)
        packed = {
            argument.name
            for operation in self._block.operations
            if operation.type.startswith("constexpr_")
            for bound in operation.inputs.values()
            for argument in bound.arguments
        }
        for name in packed:
            self._constants.pop(name, None)

    def _execute(self, operation: Message, values: dict[str, Any]) -> None:
        function = OPERATIONS.get(operation.type)
        if function is None:
            raise ParityError(f"the interpreter does not know the operation {operation.type!r}")
        operands: Operands = {}
        for key, bound in operation.inputs.items():
            found = [self._argument(argument, values) for argument in bound.arguments]
            operands[key] = found if key == "values" else found[0]
        result = function(operands, self.states)
        for output in operation.outputs:
            rounded = operation.type not in MOVES and output.type.tensorType.dataType == MIL_pb2.FLOAT16
            values[output.name] = result.half().float() if rounded else result

    def _argument(self, argument: Message, values: Mapping[str, Any]) -> Any:
        if argument.WhichOneof("binding") != "name":
            return self._value(argument.value)
        name = argument.name
        return values[name] if name in values else self._constants[name]

    def _value(self, value: Message) -> Any:
        """A constant: a tensor, or a string."""
        kind = value.type.tensorType
        shape = [dimension.constant.size for dimension in kind.dimensions]
        if value.WhichOneof("value") == "blobFileValue":
            return _as_tensor(self._read_blob(value.blobFileValue.offset, kind.dataType, shape))
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field == "strings":
            return str(tensor.strings.values[0])
        dtype = _DTYPES[kind.dataType]
        if field is None:
            return _as_tensor(np.zeros(shape, dtype))
        stored = getattr(tensor, field).values
        flat = np.frombuffer(stored, dtype) if field == "bytes" else np.array(stored, dtype)
        return _as_tensor(flat.reshape(shape))

    def _read_blob(self, offset: int, data_type: int, shape: list[int]) -> RawArray:
        header = self._blob[offset : offset + _BLOB_HEADER.size].tobytes()
        magic, _, size_bytes, start = _BLOB_HEADER.unpack(header)
        if magic != BLOB_MAGIC:
            raise ParityError(f"the weight file holds no blob at offset {offset}", "export again")
        raw = self._blob[start : start + size_bytes]
        if data_type == MIL_pb2.INT4:
            return _unpack_int4(raw, shape)
        typed: RawArray = raw.view(_DTYPES[data_type])
        return typed[: int(np.prod(shape))].reshape(shape)


def _unpack_int4(raw: npt.NDArray[np.uint8], shape: list[int]) -> RawArray:
    """Signed 4-bit codes, the first of each byte in its low half."""
    nibbles = np.empty(2 * len(raw), np.int8)
    nibbles[0::2], nibbles[1::2] = raw & 15, raw >> 4
    nibbles[nibbles > 7] -= 16
    return nibbles[: int(np.prod(shape))].reshape(shape)


def _as_tensor(array: RawArray) -> torch.Tensor:
    if array.dtype == np.uint16:
        array = array.astype(np.int32)
    tensor = torch.tensor(array)
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _find_last_uses(steps: list[Message], kept: set[str]) -> list[list[str]]:
    """Names that nothing reads after each step: what a run may forget."""
    last: dict[str, int] = {}
    for index, operation in enumerate(steps):
        for output in operation.outputs:
            last[output.name] = index
        for bound in operation.inputs.values():
            last |= {a.name: index for a in bound.arguments if a.WhichOneof("binding") == "name"}
    dead: list[list[str]] = [[] for _ in steps]
    for name, index in last.items():
        if name not in kept:
            dead[index].append(name)
    return dead
