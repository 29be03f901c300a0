"""Several jobs on one Ray: as many at a time as the cluster has room for, the others one after another.

Invariants:

- A job begins when some node has room for one of its workers beside what those that run were promised, or
  when nothing else runs. Jobs begin in their order; one that finds no room is overtaken by a smaller one.
- Room that is left is shared: a job gets another worker if none that could use one has fewer.
- A job that fails ends alone. Ctrl-C ends all of them, once gently, and a second time at once.
- One loop on the caller's thread looks at all jobs, and waits for nothing but the service.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from lynearm.teacher.job import POLL_SECONDS, TeachJob, stopping_once
from lynearm.teacher.memory import free_memory
from lynearm.teacher.placement import NodeView, take_share, worker_share
from lynearm.teacher.ray_cluster import Untyped, live_nodes
from lynearm.wire.errors import LynearmError

logger = logging.getLogger(__name__)

_ADMISSION_SECONDS = 1.0
"""Between two looks at whether a job that waits could begin."""

Ended = Callable[[str, "LynearmError | None"], None]
"""Told of a job that has ended, with what it failed of, before its place is given to others."""


class SideBySide:
    """Runs jobs that have work.

    Args:
        ray: The connected module.
        jobs: By name, in their order; `look` said of each that there is work.
        on_wait: Told the name of a job and why it waits for room; an empty text once it does not.
        on_end: Told of each job that has ended.
    """

    def __init__(
        self,
        ray: Untyped,
        jobs: Mapping[str, TeachJob],
        on_wait: Callable[[str, str], None],
        on_end: Ended,
    ) -> None:
        self._ray = ray
        self._waiting = dict(jobs)
        self._running: dict[str, TeachJob] = {}
        self._on_wait = on_wait
        self._on_end = on_end
        self._admitted_at = float("-inf")
        self._is_stopping = False

    def run(self) -> None:
        """Run all of them to their ends, or until a first Ctrl-C: what waits then is not begun.

        Raises:
            KeyboardInterrupt: for a second one; every worker is ended.
        """
        try:
            while self._running or (self._waiting and not self._is_stopping):
                with stopping_once(self._running.values()):
                    self._look()
                    time.sleep(POLL_SECONDS)
                if any(job.interrupted for job in self._running.values()):
                    self._is_stopping = True
        finally:
            for job in self._running.values():
                job.close()

    def _look(self) -> None:
        if not self._is_stopping and time.monotonic() - self._admitted_at > _ADMISSION_SECONDS:
            self._admitted_at = time.monotonic()
            self._admit()
        for name, job in list(self._running.items()):
            try:
                job.tick()
                error = None
            except LynearmError as failure:
                error = failure
            if error is not None or job.has_ended:
                self._end(name, job, error)

    def _end(self, name: str, job: TeachJob, error: LynearmError | None) -> None:
        job.close()
        del self._running[name]
        if error is not None:
            logger.warning("teacher %s failed: %s", name, error)
        self._on_end(name, error)

    def _admit(self) -> None:
        """Begin the jobs that there is room for now."""
        if not self._waiting or not self._are_settled():
            return
        nodes = self._free_nodes()
        for name, job in list(self._waiting.items()):
            share = worker_share(job.config, nodes)
            left = take_share(nodes, share)
            if left is None and self._running:
                others = ", ".join(self._running)
                self._on_wait(name, f"waiting for room for {share} beside {others}")
                continue
            nodes = left or nodes
            self._on_wait(name, "")
            self._running[name] = self._waiting.pop(name)
            job.begin(self._ray, partial(self._allow, name))

    def _are_settled(self) -> bool:
        return all(job.supervisor is None or job.supervisor.is_settled for job in self._running.values())

    def _free_nodes(self) -> Sequence[NodeView]:
        """The nodes with what is free, which on this machine is no more than the memory that nobody uses."""
        nodes = live_nodes(self._ray)
        jobs = [*self._waiting.values(), *self._running.values()]
        if any(job.config.ray_address != "local" for job in jobs):
            return nodes
        promised = sum(
            worker_share(job.config, nodes).memory_bytes
            for job in self._running.values()
            if job.supervisor is None or not job.supervisor.has_connected
        )
        return [_with_memory(node, free_memory() - promised) for node in nodes]

    def _allow(self, name: str, count: int) -> int:
        """How many of the workers that a job sees room for it may place now."""
        supervisors = {other: job.supervisor for other, job in self._running.items() if job.supervisor}
        own = supervisors[name]
        if not own.slots:
            return min(count, 1)
        if len(supervisors) == 1 and not self._waiting:
            return count
        if not self._are_settled():
            return 0
        fewest = min(
            len(one.slots) for one in supervisors.values() if one is own or one.sees_room or not one.slots
        )
        return min(count, 1) if len(own.slots) <= fewest else 0


def _with_memory(node: NodeView, free_bytes: float) -> NodeView:
    memory = min(node.available.get("memory", 0.0), max(free_bytes, 0.0))
    return replace(node, available={**node.available, "memory": memory})
