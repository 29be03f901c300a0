"""How much of a node a worker takes, and how many workers a cluster has room for: pure decisions.

- A worker takes a share of one node: CPUs, GPUs and memory. Ray places it by a placement group of its own,
  so that tensor-parallel GPUs are of one node, and memory that is promised to one worker is not promised to
  another.
- Without a number of workers, there are as many as have room now and work to do; more when nodes join, fewer
  when they leave. One that nothing has room for waits, and says for what.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from lynearm.teacher.config import TeachConfig

CPU_OVERHEAD_BYTES = 2 << 30
"""Of a process with torch and vLLM, beyond weights and cache."""

GPU_OVERHEAD_BYTES = 4 << 30
"""Host memory of a worker whose weights and cache are on GPUs."""

_KV_CACHE_BYTES = 1 << 30
"""What an engine takes on a CPU unless told otherwise, at most."""

_WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What one worker takes of a node."""

    cpus: float
    gpus: int = 0
    memory_bytes: int = 0
    """Main memory; an estimate."""

    def resources(self) -> dict[str, float]:
        """As Ray counts them."""
        wanted = {"CPU": self.cpus, "GPU": float(self.gpus), "memory": float(self.memory_bytes)}
        return {name: amount for name, amount in wanted.items() if amount}

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPUs" if self.gpus else ""
        return f"{self.cpus:g} CPUs{gpus} and {self.memory_bytes / (1 << 30):.1f} GiB"


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node of the cluster that is alive."""

    node_id: str
    host: str
    """Address by which Ray reaches it."""
    total: Mapping[str, float]
    """Its resources, in use or not."""
    available: Mapping[str, float]
    """Those that nobody uses now, as far as Ray has heard."""
    is_draining: bool = False
    """It is to go: nothing new is placed there."""


def worker_share(config: TeachConfig, nodes: Sequence[NodeView]) -> WorkerShare:
    """What a worker takes of a node in a cluster like this."""
    if any(node.total.get("GPU", 0) for node in nodes):
        return WorkerShare(max(config.threads, 1), config.tensor_parallel, GPU_OVERHEAD_BYTES)
    # 0 threads are all of a node, those of the smallest, shared by the workers that are wanted on each.
    sizes = [node.total.get("CPU", 0) for node in nodes if node.total.get("CPU", 0) >= 1] or [1]
    workers_per_node = max(1, -(-config.workers // len(sizes)))
    cpus = config.threads or max(1, int(min(sizes)) // workers_per_node)
    return WorkerShare(cpus, 0, cpu_memory_bytes(config))


def cpu_memory_bytes(config: TeachConfig) -> int:
    """What a worker takes of main memory on a CPU; without the weights where those are not at hand."""
    cache = (config.kv_cache_mib << 20) or _KV_CACHE_BYTES
    return CPU_OVERHEAD_BYTES + cache + _weight_bytes(Path(config.model), config)


def room_on(node: NodeView, share: WorkerShare) -> int:
    """Workers that a node has room for besides those that it has."""
    if node.is_draining:
        return 0
    return _fitting(node.available, share)


def take_share(nodes: Sequence[NodeView], share: WorkerShare) -> list[NodeView] | None:
    """The nodes once a worker has taken its share of the first that has room; None if none has."""
    for index, node in enumerate(nodes):
        if room_on(node, share):
            left = {
                name: amount - share.resources().get(name, 0.0) for name, amount in node.available.items()
            }
            return [*nodes[:index], replace(node, available=left), *nodes[index + 1 :]]
    return None


def workers_to_add(
    nodes: Sequence[NodeView], share: WorkerShare, *, wanted: int, present: int, useful: int
) -> int:
    """How many workers should be placed now.

    Args:
        nodes: Of the cluster.
        share: What each takes.
        wanted: As configured; 0 for as many as there is room for.
        present: Those that there are, placed or not.
        useful: Those that find work; bounds `wanted` = 0 only.

    Returns:
        At least one where there is none: it waits for room.
    """
    if wanted:
        return max(0, wanted - present)
    room = sum(room_on(node, share) for node in nodes)
    return max(min(room, useful - present), 1 if present == 0 else 0)


def waiting_reason(nodes: Sequence[NodeView], share: WorkerShare) -> str:
    """Why a worker has no place, with what would help."""
    usable = [node for node in nodes if not node.is_draining]
    if any(_fitting(node.total, share) for node in usable):
        return f"waiting for {share} on one node, which others use now"
    names = ("CPU", "GPU", "memory")
    best = {name: max((node.total.get(name, 0.0) for node in usable), default=0.0) for name in names}
    largest = WorkerShare(best["CPU"], int(best["GPU"]), int(best["memory"]))
    return f"waiting for a node with {share}: the {len(usable)} nodes have at most {largest}"


def fits_nowhere(nodes: Sequence[NodeView], share: WorkerShare) -> bool:
    """Whether no node has room for a worker, even an empty one."""
    return not any(_fitting(node.total, share) for node in nodes)


def machine_memory_bytes() -> int:
    """Main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _fitting(resources: Mapping[str, float], share: WorkerShare) -> int:
    # Ray counts in ten-thousandths; what is missing by less than that is there.
    return min(
        math.floor(resources.get(name, 0.0) / amount + 1e-6) for name, amount in share.resources().items()
    )


def _weight_bytes(directory: Path, config: TeachConfig) -> int:
    """The weights as they are held on a CPU; 0 where they are not in a directory."""
    if not directory.is_dir():
        return 0
    stored = sum(path.stat().st_size for pattern in _WEIGHT_FILES for path in directory.glob(pattern))
    wide = config.dtype in ("auto", "float32")
    return 2 * stored if wide and _stores_halves(directory) else stored


def _stores_halves(directory: Path) -> bool:
    try:
        fields: object = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(fields, dict):
        return False
    found = cast("dict[str, object]", fields)
    return found.get("dtype", found.get("torch_dtype")) in ("bfloat16", "float16")
