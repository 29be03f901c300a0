"""The workers that a job has, and the nodes that they are on: as many as there is room and work for.

Decides nothing about a worker that has its place; that is the supervisor's affair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.placement import (
    NodeView,
    WorkerShare,
    fits_nowhere,
    waiting_reason,
    worker_share,
    workers_to_add,
)
from lynearm.teacher.slot import Actor, Place, Slot, Totals
from lynearm.wire.errors import ConfigError

_NODES_SECONDS = 1.0
"""Between two looks at the cluster."""

_SETTLE_SECONDS = 3.0
"""After a worker was placed, until Ray's account of what is free counts it in."""

_STALE_PLACE_SECONDS = 30.0
"""How long a place may be outstanding that there seemed to be room for."""

Allow: TypeAlias = "Callable[[int], int]"
"""Of some workers that a supervisor sees room for, how many it may place now."""


class WorkerCluster(Protocol):
    """Where workers run."""

    def nodes(self) -> Sequence[NodeView]:
        """The nodes that are alive."""
        ...

    def reserve(self, share: WorkerShare) -> Place:
        """Ask for a share of some node."""
        ...

    def start(self, share: WorkerShare, place: Place, *, producer_id: str, holder: str) -> Actor:
        """Start a worker in a place that it has been given."""
        ...


class Crew:
    """The workers of one job, by number; one that is gone leaves its number to the next.

    Args:
        config: How many, and what each is.
        cluster: Where they run.
        allow: Asked before workers are placed.
        clock: Seconds that only grow.
    """

    def __init__(
        self, config: TeachConfig, cluster: WorkerCluster, allow: Allow, clock: Callable[[], float]
    ) -> None:
        self.slots: dict[int, Slot] = {}
        self.sees_room = False
        """Whether there was room and work for more workers when `grow` looked last."""
        self._config = config
        self._cluster = cluster
        self._allow = allow
        self._clock = clock
        self._nodes: Sequence[NodeView] = ()
        self._looked_at = float("-inf")
        self._placed_at = float("-inf")
        self._share = WorkerShare(1)
        # By number, of those that are gone too: what is inherited of one must not be taken for another's.
        self._lives: Counter[int] = Counter()
        self._gone = Totals()

    @property
    def is_settled(self) -> bool:
        """Whether every worker has its place, and Ray's account of what is free counts them in."""
        is_waiting = any(slot.state == "waiting" for slot in self.slots.values())
        return not is_waiting and self._clock() - self._placed_at > _SETTLE_SECONDS

    def totals(self) -> Totals:
        """What all workers did, those that are gone too."""
        total = Totals()
        total.add(self._gone)
        for slot in self.slots.values():
            total.add(slot.all_totals())
        return total

    def look_at_nodes(self) -> bool:
        """Ask for the nodes, unless that was done a moment ago; whether it was done now.

        Raises:
            ConfigError: if a worker can never fit on this machine, where it is to run.
        """
        if self._clock() - self._looked_at < _NODES_SECONDS:
            return False
        self._looked_at = self._clock()
        self._nodes = self._cluster.nodes()
        if not self.slots:
            self._share = worker_share(self._config, self._nodes)
            self._refuse_what_never_fits()
        return True

    def look_soon(self) -> None:
        """Have the next `look_at_nodes` ask."""
        self._looked_at = float("-inf")

    def is_leaving(self, slot: Slot) -> bool:
        """Whether a worker's node is to go."""
        node = next((node for node in self._nodes if node.node_id == slot.node_id), None)
        return node is not None and node.is_draining

    def is_gone(self, slot: Slot) -> bool:
        """Whether a worker's node is gone, or to go."""
        return all(node.node_id != slot.node_id for node in self._nodes) or self.is_leaving(slot)

    def wait_for_place(self, number: int, slot: Slot) -> None:
        """Say why a worker has no place; give up one that is outstanding for long beside others."""
        slot.reason = waiting_reason(self._nodes, self._share)
        is_stale = self._clock() - slot.since > _STALE_PLACE_SECONDS
        if is_stale and not self._config.workers and len(self.slots) > 1 and not slot.place.node_id():
            self.remove(number, slot)

    def grow(self, left_units: int) -> None:
        """Ask for places of more workers, if there is room and work for them.

        Args:
            left_units: Of the job, not done.
        """
        if not self._config.workers and not self.is_settled:
            return  # Ray has not said yet what the last one left
        count = workers_to_add(
            self._nodes,
            self._share,
            wanted=self._config.workers,
            present=len(self.slots),
            useful=-(-left_units // self._config.max_batch),
        )
        self.sees_room = count > 0
        for _ in range(self._allow(count) if count else 0):
            number = next(number for number in range(len(self.slots) + 1) if number not in self.slots)
            name = f"{self._config.producer_id}-{number}"
            slot = Slot(name, self._cluster.reserve(self._share), self._clock)
            slot.lives = slot.earlier_lives = self._lives[number]
            self.slots[number] = slot

    def start_if_placed(self, slot: Slot) -> None:
        """Start a worker that has got its place."""
        slot.node_id = slot.place.node_id()
        if not slot.node_id:
            return
        slot.node_host = next((one.host for one in self._nodes if one.node_id == slot.node_id), "")
        slot.reason = ""
        self._placed_at = self._clock()
        self.start(slot)

    def start(self, slot: Slot) -> None:
        """Start a process for a worker in its place."""
        slot.lives += 1
        slot.actor = self._cluster.start(self._share, slot.place, producer_id=slot.name, holder=slot.holder)
        slot.state = "loading"
        slot.call("load")

    def remove(self, number: int, slot: Slot) -> None:
        """End what is left of a worker, and let others have its place."""
        slot.forget_process()
        self._lives[number] = slot.lives
        self._gone.add(slot.totals)
        slot.place.release()
        del self.slots[number]

    def _refuse_what_never_fits(self) -> None:
        if self._config.ray_address == "local" and fits_nowhere(self._nodes, self._share):
            raise ConfigError(
                f"a worker takes {self._share}, which this machine does not have",
                "take a smaller model, lower kv_cache_mib or threads, or join a cluster with ray_address",
            )
