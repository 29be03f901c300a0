"""Traces through a Ray queue, in a process that becomes a Ray driver; apart, since few want to load Ray."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import psutil
import ray
from ray.util.queue import Queue
from transport_others import Material
from transport_processes import cpu_seconds_of

_QUEUE_LENGTH = 64
"""Completions on their way: some megabytes, as much as our credit."""


def start_ray(material: Material) -> None:
    """Start Ray on this machine, and a queue with both of its ends."""
    global _queue, _ends
    # Ray's workers find modules by this variable only.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    _queue = Queue(maxsize=_QUEUE_LENGTH)
    _ends = [ray.remote(_End).options(num_cpus=0).remote(material) for _ in range(2)]
    ray.get([end.process_id.remote() for end in _ends])


def stop_ray() -> None:
    """Stop it."""
    ray.shutdown()


def carry_by_ray() -> tuple[int, float]:
    """Move every completion; returns how many tokens came, and the CPU-seconds of all that took part."""
    sender, receiver = _ends
    pids = [*ray.get([end.process_id.remote() for end in _ends]), *_pids_named("raylet", "_QueueActor")]
    before = sum(map(cpu_seconds_of, pids))
    received = receiver.receive.remote(_queue)
    ray.get(sender.send.remote(_queue))
    tokens: int = ray.get(received)
    return tokens, sum(map(cpu_seconds_of, pids)) - before


def measure_size(material: Material) -> int:
    """Bytes of the objects that the queue carried, as Ray serialises them."""
    context = ray._private.worker.global_worker.get_serialization_context()
    return sum(context.serialize(arrays).total_bytes for arrays in material.arrays())


class _End:
    """Sends or receives."""

    def __init__(self, material: Material) -> None:
        self._material = material
        self._count = material.count

    def process_id(self) -> int:
        return os.getpid()

    def send(self, queue: Queue) -> None:
        for arrays in self._material.arrays():
            queue.put(arrays)

    def receive(self, queue: Queue) -> int:
        return sum(len(queue.get()[0]) for _ in range(self._count))


def _pids_named(*names: str) -> list[int]:
    mine = psutil.Process().children(recursive=True)
    return [child.pid for child in mine if any(name in " ".join(child.cmdline()) for name in names)]


# Any: Ray's handles are typed nowhere.
_queue: Any = None
_ends: list[Any] = []
