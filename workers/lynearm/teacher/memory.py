"""Whether a teacher fits into the memory that is free, before anything is loaded.

What is counted is a lower bound: weights, the key-value cache of one sequence of full length, and one step's
logits. So what is refused here would have failed, after minutes of loading, or ended other processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lynearm.teacher.config import TeachConfig
from lynearm.wire.errors import CheckpointError, ConfigError

_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MAX_HEADER_BYTES = 100 << 20
"""As safetensors itself bounds it."""

_MEMORY_INFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """What a teacher takes at least, bytes."""

    weights_bytes: int
    token_bytes: int
    """Of the key-value cache, for each token of a sequence."""
    max_model_len: int
    """Longest sequence, tokens."""
    logits_bytes: int
    """Of one step of a full batch."""

    @property
    def sequence_bytes(self) -> int:
        """Of the cache, for one sequence of full length."""
        return self.token_bytes * self.max_model_len

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return self.weights_bytes + self.sequence_bytes + self.logits_bytes


def estimate_memory(directory: Path, config: TeachConfig, *, on_cpu: bool) -> MemoryNeed:
    """What a teacher takes at least.

    Args:
        directory: The model, in the transformers layout.
        config: Its dtype, longest sequence and batch.
        on_cpu: Where "auto" stands for float32.

    Raises:
        CheckpointError: if the directory holds no model.
    """
    model = read_model_config(directory)
    dtype = config.dtype
    if dtype == "auto":
        stored = str(model.get("dtype") or model.get("torch_dtype") or "")
        # Off a CPU, vLLM halves what is stored as float32.
        dtype = "float32" if on_cpu else ("float16" if stored == "float16" else "bfloat16")
    value_bytes = _DTYPE_BYTES[dtype]
    heads = _whole(model, "num_attention_heads", 1)
    head_width = _whole(model, "head_dim", _whole(model, "hidden_size", 0) // max(heads, 1))
    layers, kv_heads = _whole(model, "num_hidden_layers", 0), _whole(model, "num_key_value_heads", heads)
    return MemoryNeed(
        weights_bytes=_weights_bytes(directory, None if "quantization_config" in model else value_bytes),
        token_bytes=2 * layers * kv_heads * head_width * value_bytes,
        max_model_len=min(config.max_model_len, _whole(model, "max_position_embeddings", 1 << 30)),
        logits_bytes=4 * config.max_batch * _whole(model, "vocab_size", 0),
    )


def check_fits(need: MemoryNeed, free_bytes: int, config: TeachConfig) -> None:
    """Refuse a teacher that needs more than there is.

    Raises:
        ConfigError: with both figures.
    """
    if need.total_bytes > free_bytes:
        raise ConfigError(
            f"teacher {config.model!r} needs {_gib(need.total_bytes)} ({_gib(need.weights_bytes)} of "
            f"weights, {_gib(need.sequence_bytes)} for one sequence of {need.max_model_len} tokens), and "
            f"{_gib(free_bytes)} are free",
            "free some, lower --max-model-len, set --dtype bfloat16, or take a smaller model",
        )
    cache_bytes = config.kv_cache_mib << 20
    if cache_bytes and cache_bytes < need.sequence_bytes:
        raise ConfigError(
            f"kv_cache_mib {config.kv_cache_mib} is below the {need.sequence_bytes / 2**20:.0f} MiB of one "
            f"sequence of {need.max_model_len} tokens",
            "raise it, or lower --max-model-len",
        )


def free_memory() -> int:
    """Memory that a process of this machine may still take, bytes: within its control group, too."""
    free = 1 << 62
    with suppress(OSError):
        for line in _MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
    # A group without a limit says "max", or has no such file.
    with suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Files that are cached go when something else needs the room.
        held = int((_CGROUP / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
        free = min(free, limit - held)
    return max(free, 0)


def read_model_config(directory: Path) -> Mapping[str, object]:
    """The language model's part of a `config.json`.

    Raises:
        CheckpointError: if there is none.
    """
    path = directory / "config.json"
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} is no model in the transformers layout: {path.name}: {error}", "check --model"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object", "check --model")
    fields = cast("dict[str, object]", found)
    inner = fields.get("text_config")
    return {**fields, **cast("dict[str, object]", inner)} if isinstance(inner, dict) else fields


def _weights_bytes(directory: Path, value_bytes: int | None) -> int:
    """Of all weights once they are loaded; None for `value_bytes` leaves them as they are stored."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        return sum(path.stat().st_size for path in directory.glob("*.bin"))
    if value_bytes is None:
        return sum(path.stat().st_size for path in files)
    return sum(_loaded_bytes(path, value_bytes) for path in files)


def _loaded_bytes(path: Path, value_bytes: int) -> int:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER_BYTES:
                raise ValueError(f"its header is {size} bytes")
            header: dict[str, dict[str, object]] = json.loads(file.read(size))
        total = 0
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            start, end = cast("list[int]", tensor["data_offsets"])
            stored = _FLOAT_BYTES.get(str(tensor["dtype"]))
            total += (end - start) * value_bytes // stored if stored else end - start
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}", "fetch the model again") from error
    return total


def _whole(fields: Mapping[str, object], name: str, default: int) -> int:
    value = fields.get(name)
    return value if isinstance(value, int) else default


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
