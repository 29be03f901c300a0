"""Which node gets a server, and at which address: pure decisions over what Ray knows of its nodes.

- A server is bound to its node. Ray starts its process there again, at the same address; it never moves by
  itself, since its address would be another one, and since on another disk it would serve no stream at all.
- A catalog or blocks on a disk keep all servers on the machine of the command, which is where the disk is.
- The port is chosen once: the one that is configured, or the next ones where several nodes share a machine.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lynearm.fleet.config import is_on_one_machine
from lynearm.traces.config import ServeConfig
from lynearm.wire.addresses import is_loopback, join_address
from lynearm.wire.errors import PreconditionError

_WILDCARDS = ("", "0.0.0.0", "::")
"""Hosts that mean every address of a machine; none of them can be connected to."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a Ray cluster."""

    node_id: str
    host: str
    """Address by which Ray reaches it."""
    machine: str
    """Name of the machine; several nodes of a simulated cluster have the same."""
    cpus: float
    """All that it offers, in use or not."""


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """One server of a fleet. What Ray starts again, it starts with this."""

    number: int
    """0 and up; names it."""
    node: Node
    offset: int
    """How far its ports are from those that were asked for."""
    config: ServeConfig
    """Its own, with its address."""
    asked: ServeConfig
    """What all servers of the fleet were asked to be, with paths that hold in any directory."""

    @property
    def endpoint(self) -> str:
        """What clients connect to, host:port."""
        return join_address(_shown_host(self.config.host, self.node), self.config.port)


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes that there are."""

    nodes: Sequence[Node]
    home: Node
    """The one that the command runs on."""

    @property
    def has_one_machine(self) -> bool:
        """Whether all nodes are one machine, which reaches itself by loopback."""
        return len({node.machine for node in self.nodes}) == 1


def plan_server(
    number: int, asked: ServeConfig, cluster: Cluster, *, cpus: float, placed: Sequence[ServerPlan]
) -> ServerPlan:
    """Where a server goes.

    Args:
        number: Of the server.
        asked: What it shall be.
        cluster: Where it may go.
        cpus: What it takes of its node.
        placed: The other servers, whose nodes and ports are taken.

    Raises:
        PreconditionError: no node is left for it.
        ConfigError: it would listen on the address of its node, without what makes that safe.
    """
    node = _choose_node(asked, cluster, cpus, placed)
    host = asked.host
    if is_loopback(host) and not cluster.has_one_machine:
        # Loopback would be an address that nobody else reaches; ServeConfig asks for TLS and tokens then.
        host = node.host
    offset = _free_offset(_shown_host(host, node), placed)
    config = dataclasses.replace(
        asked,
        host=host,
        port=asked.port + offset if asked.port else 0,
        metrics_port=asked.metrics_port + offset if asked.metrics_port else asked.metrics_port,
    )
    return ServerPlan(number, node, offset, config, asked)


def with_port(plan: ServerPlan, port: int) -> ServerPlan:
    """The plan with a port that was found free."""
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, port=port))


def absolute_paths(config: ServeConfig) -> ServeConfig:
    """The configuration with the paths of this directory: servers on Ray run in another one."""
    changed: dict[str, Any] = {}  # Any: paths and texts, each for a field of its type
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            changed[field.name] = value.expanduser().absolute()
        elif field.name in ("catalog", "blocks") and value and "://" not in value:
            changed[field.name] = str(Path(value).expanduser().absolute())
    if config.catalog and config.blocks:
        # Nothing is kept in it, so that it need not be the same in each directory.
        del changed["data_dir"]
    return dataclasses.replace(config, **changed)


def differences(running: ServeConfig, asked: ServeConfig) -> list[str]:
    """Names of the fields in which two configurations differ; values may be secret."""
    return [
        field.name
        for field in dataclasses.fields(running)
        if getattr(running, field.name) != getattr(asked, field.name)
    ]


def _choose_node(asked: ServeConfig, cluster: Cluster, cpus: float, placed: Sequence[ServerPlan]) -> Node:
    machines = Counter(plan.node.machine for plan in placed)
    taken = {plan.node.node_id for plan in placed}
    stays = is_on_one_machine(asked)
    free = [
        node
        for node in cluster.nodes
        if node.node_id not in taken
        and node.cpus >= cpus
        and (not stays or node.machine == cluster.home.machine)
    ]
    if not free:
        where = f" on machine {cluster.home.machine}, where its data is," if stays else ""
        raise PreconditionError(
            f"no node{where} is left for one more server ({len(cluster.nodes)} nodes, "
            f"of which each server takes one with {cpus:g} CPUs)",
            "start more nodes, or ask for fewer with --servers, or for less with --cpus",
        )
    return min(free, key=lambda node: (machines[node.machine], node.node_id))


def _free_offset(host: str, placed: Sequence[ServerPlan]) -> int:
    used = {plan.offset for plan in placed if _shown_host(plan.config.host, plan.node) == host}
    return next(offset for offset in range(len(used) + 1) if offset not in used)


def _shown_host(host: str, node: Node) -> str:
    return node.host if host in _WILDCARDS else host
