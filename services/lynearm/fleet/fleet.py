"""A fleet of trace servers on Ray: as many as wanted, found where they run, put back where a node was lost.

Who restarts what:

- A process that ends is started again by Ray, on its node, at its endpoint, whether or not anybody watches.
- A node that is lost takes its server along for good. `Fleet.mend`, which `lynearm up` calls while it stays,
  and `Fleet.bring_up`, at the next `lynearm up`, place another one on another node, at another endpoint.
- A server whose node only seems lost may go on beside its replacement. That is harmless: servers of one
  catalog keep nothing to themselves, and those whose data is on a disk never move to another.
- Servers that `take_down` removed stay away: a fleet that watches does not put them back.

Nothing is kept about a fleet but its actors. Each knows its plan, and names are unique in Ray, so that of two
commands that start the same server at once, both find one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lynearm.fleet.config import FleetConfig, check_storage
from lynearm.fleet.members import Member, ServerStatus, look_at, remove
from lynearm.fleet.placement import Cluster, ServerPlan, absolute_paths, differences, plan_server, with_port
from lynearm.fleet.ray_cluster import RayCluster
from lynearm.traces.config import ServeConfig
from lynearm.wire.errors import FleetError, LynearmError, PreconditionError

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """All servers, at one moment."""

    endpoints: str
    """host:port of each, with commas between, as clients take them."""
    serving: int
    """How many take calls."""
    servers: tuple[ServerStatus, ...]


class Fleet:
    """The servers that a configuration asks for.

    Args:
        cluster: Where they run.
        config: How many, and how.
        asked: What each shall be; relative paths are those of this directory.
        on_status: Called with what the servers are whenever that changes.

    Raises:
        ConfigError: several servers cannot share what `asked` keeps to one.
    """

    def __init__(
        self,
        cluster: RayCluster,
        config: FleetConfig,
        asked: ServeConfig,
        *,
        on_status: Callable[[FleetStatus], None] = lambda status: None,
    ) -> None:
        check_storage(asked, config.servers)
        self._cluster = cluster
        self._config = config
        self._asked = absolute_paths(asked)
        self._on_status = on_status
        self._members: dict[int, Member] = {}
        self._told = FleetStatus("", 0, ())

    def bring_up(self) -> FleetStatus:
        """Find the servers that run, start those that are missing, and wait until all serve.

        What this call has started and cannot get to serve, it takes away again.

        Raises:
            PreconditionError: other servers run than those that are asked for, or too few nodes are left.
            ConfigError: a node's address is not safe to listen on.
            FleetError: the servers do not come up in time.
            LynearmError: what keeps a server that was started here from serving, and waiting does not help.
        """
        deadline = time.monotonic() + self._config.start_seconds
        self._members = {number: Member(actor) for number, actor in self._cluster.find().items()}
        self._wait(deadline, self._all_have_answered)
        self._members = {number: member for number, member in self._members.items() if not member.lost}
        self._check_running()
        started: list[Member] = []
        try:
            self._start_missing(self._cluster.nodes(), started)
            self._wait(deadline, lambda: self._all_serve(started))
        except LynearmError:
            remove(self._cluster, started)
            raise
        return self._tell()

    def mend(self) -> FleetStatus:
        """Look at the servers, and replace those whose node is gone, as far as nodes are left.

        Servers that somebody took down are left out from then on.
        """
        look_at(self._members.values())
        for member in self._lost():
            try:
                if self._replace(member) is None:
                    del self._members[member.actor.number]
            except LynearmError as error:
                member.problem = str(error)
        return self._tell()

    def _tell(self) -> FleetStatus:
        status = self._status()
        if status != self._told:
            self._told = status
            self._on_status(status)
        return status

    def _status(self) -> FleetStatus:
        servers = tuple(self._members[number].status() for number in sorted(self._members))
        return FleetStatus(
            ",".join(server.endpoint for server in servers if server.endpoint),
            sum(server.phase == "serving" for server in servers),
            servers,
        )

    def _check_running(self) -> None:
        """Refuse to call servers the wanted ones that are not."""
        running, wanted = len(self._members), self._config.servers
        remedy = "`lynearm down --ray` takes them away"
        if any(number >= wanted for number in self._members):
            raise PreconditionError(f"{running} servers run, and {wanted} are asked for", remedy)
        for member in self._members.values():
            changed = differences(member.plan.asked, self._asked) if member.plan else []
            if changed:
                # Names only: a value may be a secret.
                raise PreconditionError(f"servers run with another {', '.join(changed)}", remedy)

    def _start_missing(self, nodes: Cluster, started: list[Member]) -> None:
        for number in range(self._config.servers):
            if number not in self._members:
                started.append(self._start(number, nodes))

    def _start(self, number: int, nodes: Cluster) -> Member:
        plans = [member.plan for other, member in self._members.items() if other != number]
        placed = [plan for plan in plans if plan is not None]
        plan = plan_server(number, self._asked, nodes, cpus=self._config.cpus, placed=placed)
        if plan.config.port == 0:
            plan = with_port(plan, self._free_port(plan, {one.config.port for one in placed}))
        member = Member(self._cluster.start(plan, self._config.cpus), plan)
        self._members[number] = member
        return member

    def _free_port(self, plan: ServerPlan, taken: set[int]) -> int:
        """A port of the plan's node; not one of those that servers which just start will listen on."""
        port = 0
        while port == 0 or port in taken:
            port = self._cluster.free_port(plan.node, plan.config.host, self._config.start_seconds)
        return port

    def _lost(self) -> list[Member]:
        return [member for member in self._members.values() if member.lost]

    def _replace(self, member: Member) -> Member | None:
        """A server in the place of one whose node is gone; None where it was taken off a live node."""
        nodes = self._cluster.nodes()
        if member.plan is None or any(node.node_id == member.plan.node.node_id for node in nodes.nodes):
            return None
        return self._start(member.actor.number, nodes)

    def _all_have_answered(self) -> bool:
        return all(member.report or member.lost for member in self._members.values())

    def _all_serve(self, started: list[Member]) -> bool:
        for member in self._lost():
            replacement = self._replace(member)
            if replacement is None:
                remedy = "each node needs this lynearm, with its extra `service`; its Ray logs say more"
                raise FleetError(member.problem, remedy)
            started.append(replacement)
        for member in started:
            error = member.report.state.error if member.report else None
            if error is not None and error.retry_seconds is None:
                raise error
        return all(member.status().phase == "serving" for member in self._members.values())

    def _wait(self, deadline: float, is_done: Callable[[], bool]) -> None:
        while True:
            look_at(self._members.values())
            self._tell()
            if is_done():
                return
            if time.monotonic() > deadline:
                raise self._too_slow()
            time.sleep(_POLL_SECONDS)

    def _too_slow(self) -> FleetError:
        waiting = [server for server in self._status().servers if server.phase != "serving"]
        reasons = "; ".join(
            f"server {server.number} at {server.endpoint or 'an unknown address'} is {server.phase}"
            + (f" ({server.error})" if server.error else "")
            for server in waiting
        )
        remedy = "--start-seconds waits longer"
        if any(server.phase == "silent" for server in waiting):
            remedy = (
                "a silent one waits for a free CPU of its node, as `ray status` shows, or its process ends, "
                f"as the node's Ray logs show; {remedy}"
            )
        message = f"not all servers serve after {self._config.start_seconds:g} s: {reasons}"
        return FleetError(message, remedy)


def take_down(cluster: RayCluster) -> int:
    """Drain all servers at once, and take them away. What was acknowledged is durable then.

    Returns:
        How many there were.

    Raises:
        FleetError: if Ray does not let go of them.
    """
    members = [Member(actor) for actor in cluster.find().values()]
    look_at(members)
    remove(cluster, members)
    return len(members)
