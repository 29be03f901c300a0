"""The border to Ray's nodes: what there is, what is to go, and places reserved for workers."""

from __future__ import annotations

import logging
from typing import Any, TypeAlias

from lynearm.teacher.placement import NodeView, WorkerShare

logger = logging.getLogger(__name__)

Untyped: TypeAlias = Any
"""An object of Ray, whose remote calls no checker can follow."""


class Reservation:
    """A share of some node, reserved for one worker.

    Args:
        ray: The connected module.
        share: What is reserved.
    """

    def __init__(self, ray: Untyped, share: WorkerShare) -> None:
        from ray.util.placement_group import placement_group

        self._ray = ray
        self._group: Untyped = placement_group([share.resources()], strategy="STRICT_PACK")

    def node_id(self) -> str:
        """The node that it is on; empty while there is no room for it."""
        table: Untyped = self._ray.util.placement_group_table(self._group)
        if table.get("state") != "CREATED":
            return ""
        return str(table["bundles_to_node_id"][0])

    def strategy(self) -> Untyped:
        """What an actor is given to run in it."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(
            placement_group=self._group,
            placement_group_bundle_index=0,
            placement_group_capture_child_tasks=False,
        )

    def release(self) -> None:
        """Let others have it; ends what still runs in it."""
        try:
            self._ray.util.remove_placement_group(self._group)
        except self._ray.exceptions.RayError as error:
            logger.warning("Ray keeps a worker's place: %s", error)


def live_nodes(ray: Untyped) -> list[NodeView]:
    """The nodes that are alive."""
    from ray._private import state

    private: Untyped = state
    available: dict[str, dict[str, float]] = private.available_resources_per_node()
    # Not public, but what Ray's own libraries ask; without it, a drain is noticed when the node goes.
    find_draining: Untyped = getattr(private.state, "get_draining_nodes", dict)
    draining: dict[str, int] = find_draining()
    return [
        NodeView(
            node_id=str(one["NodeID"]),
            host=str(one["NodeManagerAddress"]),
            total=dict(one["Resources"]),
            available=dict(available.get(one["NodeID"], {})),
            is_draining=one["NodeID"] in draining,
        )
        for one in ray.nodes()
        if one["Alive"]
    ]
