"""Reading a GGUF model file: its metadata, and its tensors as float32.

Reads little-endian GGUF of version 2 or 3, and tensors of type F32, F16, Q4_1 and Q8_0, which is what
SmolLM2's file holds. Nothing is trusted: every length is checked against the size of the file before it is
used.

File, in order: magic, version, counts; metadata key-value pairs; tensor directory (name, dimensions, type,
offset); padding; tensor data. Quantised rows are runs of blocks of 32 values: Q4_1 holds scale and minimum
(float16) and 16 bytes of two 4-bit levels, low nibbles first; Q8_0 holds a scale (float16) and 32 int8.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import CheckpointError

Float32Array: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]

MetadataValue: TypeAlias = "int | float | bool | str | list[MetadataValue]"

TensorKind: TypeAlias = Literal["F32", "F16", "Q4_1", "Q8_0"]

BLOCK_VALUES = 32
MAX_DIMENSIONS = 4
MAX_NESTING = 4

_KIND_BY_CODE: dict[int, TensorKind] = {0: "F32", 1: "F16", 3: "Q4_1", 8: "Q8_0"}
_BLOCK_BYTES: dict[TensorKind, int] = {"F32": 128, "F16": 64, "Q4_1": 20, "Q8_0": 34}
_SCALAR_FORMATS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING_CODE = 8
_ARRAY_CODE = 9


class UnsupportedGgufError(CheckpointError):
    """The file is sound, and holds a kind of model, tokenizer or tensor that we do not convert."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies in the file, and how."""

    name: str
    shape: tuple[int, ...]
    """Row-major, outermost first: the reverse of the order in the file."""
    kind: TensorKind
    start: int
    """Position of its first byte in the file."""

    @property
    def values(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.values * _BLOCK_BYTES[self.kind] // BLOCK_VALUES


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file, mapped into memory."""

    path: Path
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[GgufTensor, ...]
    data: ByteArray
    """The whole file, read-only."""

    def load(self, tensor: GgufTensor) -> Float32Array:
        """The tensor, dequantised, in a new array of its shape."""
        raw = self.data[tensor.start : tensor.start + tensor.size_bytes]
        return _dequantise(raw, tensor.kind).reshape(tensor.shape)

    def integer(self, key: str) -> int:
        """A whole number from the metadata.

        Raises:
            CheckpointError: if it is missing or of another type.
        """
        value = self.metadata.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _malformed(self.path, f"{key} is {value!r}, expected a whole number")
        return value

    def number(self, key: str) -> float:
        """A number from the metadata.

        Raises:
            CheckpointError: if it is missing or of another type.
        """
        value = self.metadata.get(key)
        if not isinstance(value, int | float):
            raise _malformed(self.path, f"{key} is {value!r}, expected a number")
        return float(value)

    def text(self, key: str) -> str:
        """A string from the metadata.

        Raises:
            CheckpointError: if it is missing or of another type.
        """
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise _malformed(self.path, f"{key} is {type(value).__name__}, expected a string")
        return value

    def text_if_any(self, key: str) -> str:
        """A string from the metadata; empty where there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def items(self, key: str) -> list[MetadataValue]:
        """An array from the metadata.

        Raises:
            CheckpointError: if it is missing or of another type.
        """
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise _malformed(self.path, f"{key} is {type(value).__name__}, expected an array")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Parses the metadata and the tensor directory; the weights stay on disk until they are loaded.

    Raises:
        CheckpointError: if the file cannot be read, or is cut short.
        UnsupportedGgufError: if it holds a type of tensor that we do not dequantise.
    """
    cursor, tensor_count, metadata = _read_header(path)
    directory = [cursor.directory_entry() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _malformed(path, f"general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = tuple(
        GgufTensor(name, shape, kind, data_start + offset) for name, shape, kind, offset in directory
    )
    _check_tensors(path, tensors, cursor.size)
    return GgufFile(path, metadata, tensors, np.frombuffer(cursor.view, dtype=np.uint8))


def read_gguf_metadata(path: Path) -> GgufFile:
    """A file of any kind without its tensors.

    Raises:
        CheckpointError: if it cannot be read, or is cut short.
    """
    cursor, _, metadata = _read_header(path)
    return GgufFile(path, metadata, (), np.frombuffer(cursor.view, dtype=np.uint8))


def _read_header(path: Path) -> tuple[_Cursor, int, dict[str, MetadataValue]]:
    """A cursor at the tensor directory, how many entries that has, and the metadata."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", "check the path, or download the file again"
        ) from error
    cursor = _Cursor(path, memoryview(mapped))
    if cursor.take(4) != b"GGUF":
        raise _malformed(path, "it does not begin with GGUF")
    version = cursor.integer("<I")
    if version not in (2, 3):
        raise _malformed(path, f"it has format version {version}, expected 2 or 3")
    tensor_count, pair_count = cursor.integer("<Q"), cursor.integer("<Q")
    metadata: dict[str, MetadataValue] = {}
    for _ in range(pair_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.integer("<I"))
    return cursor, tensor_count, metadata


class _Cursor:
    """Reads values one after the other, never past the end of the file."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path = path
        self.position = 0
        self.view = view
        self.size = len(view)

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.view):
            raise _malformed(self.path, f"it ends at byte {len(self.view)} inside its header")
        taken = bytes(self.view[self.position : end])
        self.position = end
        return taken

    def scalar(self, form: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def integer(self, form: str) -> int:
        return int(self.scalar(form))

    def text(self) -> str:
        return self.take(self.integer("<Q")).decode("utf-8", "replace")

    def value(self, code: int, depth: int = 0) -> MetadataValue:
        if code in _SCALAR_FORMATS:
            return self.scalar(_SCALAR_FORMATS[code])
        if code == _STRING_CODE:
            return self.text()
        if code != _ARRAY_CODE or depth == MAX_NESTING:
            raise _malformed(self.path, f"metadata of type {code} before byte {self.position}")
        item_code, count = self.integer("<I"), self.integer("<Q")
        return [self.value(item_code, depth + 1) for _ in range(count)]

    def directory_entry(self) -> tuple[str, tuple[int, ...], TensorKind, int]:
        name = self.text()
        dimensions = self.integer("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _malformed(self.path, f"{name!r} has {dimensions} dimensions")
        shape = tuple(self.integer("<Q") for _ in range(dimensions))[::-1]
        code, offset = self.integer("<I"), self.integer("<Q")
        if code not in _KIND_BY_CODE:
            known = ", ".join(get_args(TensorKind))
            raise UnsupportedGgufError(
                f"{self.path}: {name!r} has tensor type {code}; {known} are understood",
                "take the model in the transformers layout",
            )
        return name, shape, _KIND_BY_CODE[code], offset


def _check_tensors(path: Path, tensors: tuple[GgufTensor, ...], file_bytes: int) -> None:
    for tensor in tensors:
        if tensor.kind in ("Q4_1", "Q8_0") and tensor.shape[-1] % BLOCK_VALUES:
            raise _malformed(path, f"{tensor.name!r} has rows of {tensor.shape[-1]}, not a multiple of 32")
        if tensor.start + tensor.size_bytes > file_bytes:
            raise _malformed(path, f"it ends at byte {file_bytes}, inside the tensor {tensor.name!r}")


def _dequantise(raw: ByteArray, kind: TensorKind) -> Float32Array:
    if kind == "F32":
        return raw.view(np.dtype("<f4")).astype(np.float32)
    if kind == "F16":
        return _float16(raw)
    blocks = raw.reshape(-1, _BLOCK_BYTES[kind])
    scale = _float16(blocks[:, :2])
    if kind == "Q8_0":
        values: Float32Array = scale * blocks[:, 2:].view(np.int8).astype(np.float32)
        return values.reshape(-1)
    packed = blocks[:, 4:]
    levels: Float32Array = np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)
    levels *= scale
    levels += _float16(blocks[:, 2:4])
    return levels.reshape(-1)


def _float16(raw: ByteArray) -> Float32Array:
    # A view of another width needs bytes that lie side by side.
    return np.ascontiguousarray(raw).view(np.dtype("<f2")).astype(np.float32)


def _malformed(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a GGUF file that we can read: {what}", "download the file again")
