"""Traces through a Ray queue, in a process that becomes a Ray driver; apart, since few want to load Ray."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from itertools import islice
from typing import Any

import psutil
import ray
import transport_others as others
from ray.util.queue import Queue
from transport_others import Material
from transport_processes import cpu_seconds_of

_WARM_UP_COUNT = 4

_QUEUE_LENGTH = 64
"""Completions on their way: some megabytes, as much as our credit."""


def start_ray(material: Material) -> None:
    """Start Ray on this machine, and a queue with both of its ends."""
    # Ray's workers find modules by this variable only.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    sender, receiver = (ray.remote(_End).options(num_cpus=0).remote(material) for _ in range(2))
    pids = ray.get([end.process_id.remote() for end in (sender, receiver)])
    _started.append(_Started(Queue(maxsize=_QUEUE_LENGTH), sender, receiver, pids))
    _carry(_started[-1], _WARM_UP_COUNT)


def stop_ray() -> None:
    """Stop it."""
    ray.shutdown()


def carry_by_ray(material: Material) -> tuple[int, float]:
    """Move every completion; returns how many tokens came, and the CPU-seconds of all that took part."""
    started = _started[-1]
    pids = [*started.pids, *_pids_named("raylet", "_QueueActor")]
    before = sum(map(cpu_seconds_of, pids))
    tokens = _carry(started, material.count)
    return tokens, sum(map(cpu_seconds_of, pids)) - before


def measure_size(material: Material) -> int:
    """Bytes of the objects that the queue carried, as Ray serialises them."""
    context = ray._private.worker.global_worker.get_serialization_context()
    return sum(context.serialize(arrays).total_bytes for arrays in material.arrays())


@dataclass(frozen=True, slots=True)
class _Started:
    """A queue and its ends."""

    # Any: Ray's handles are typed nowhere.
    queue: Queue
    sender: Any
    receiver: Any
    pids: list[int]


class _End:
    """Sends or receives."""

    def __init__(self, material: Material) -> None:
        self._material = material
        others.describe(material)  # makes it

    def process_id(self) -> int:
        return os.getpid()

    def send(self, queue: Queue, count: int) -> None:
        for arrays in islice(self._material.arrays(), count):
            queue.put(arrays)

    def receive(self, queue: Queue, count: int) -> int:
        return sum(len(queue.get()[0]) for _ in range(count))


def _carry(started: _Started, count: int) -> int:
    received = started.receiver.receive.remote(started.queue, count)
    ray.get(started.sender.send.remote(started.queue, count))
    tokens: int = ray.get(received)
    return tokens


def _pids_named(*names: str) -> list[int]:
    mine = psutil.Process().children(recursive=True)
    return [child.pid for child in mine if any(name in " ".join(child.cmdline()) for name in names)]


_started: list[_Started] = []
