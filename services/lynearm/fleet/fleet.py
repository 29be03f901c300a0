"""A fleet of trace servers on Ray: as many as wanted, found where they run, put back where a node was lost.

Who restarts what:

- A process that ends is started again by Ray, on its node, at its endpoint, whether or not anybody watches.
- A node that is lost takes its server along for good. `Fleet.mend`, which `lynearm up` calls while it stays,
  and `Fleet.bring_up`, at the next `lynearm up`, place another one on another node, at another endpoint.
- Servers that `take_down` removed stay away: a fleet that watches does not put them back.

Nothing is kept about a fleet but its actors. Each knows its plan, and names are unique in Ray, so that of two
commands that start the same server at once, both find one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lynearm.fleet.config import FleetConfig, check_storage
from lynearm.fleet.placement import Cluster, ServerPlan, absolute_paths, differences, plan_server, with_port
from lynearm.fleet.ray_cluster import RayCluster, ServerActor, ServerLostError
from lynearm.fleet.server_actor import ServerReport
from lynearm.traces.config import ServeConfig
from lynearm.wire.errors import FleetError, LynearmError, PreconditionError

ServerPhase: TypeAlias = Literal["starting", "serving", "stopped", "silent", "lost"]
"""silent: no answer, as while Ray starts its process; lost: its node is gone."""

_REPORT_SECONDS = 1.0
"""Patience in one look at the fleet; a server that serves answers in milliseconds."""

_POLL_SECONDS = 0.2

_DRAIN_MARGIN_SECONDS = 10.0
"""On top of `drain_seconds`: the last group's write, last words, and a trace collector."""


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One server, at one moment."""

    number: int
    endpoint: str
    """host:port; empty where it has not said yet."""
    machine: str
    phase: ServerPhase
    error: str = ""
    """Why it does not serve."""
    process_id: int = 0


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """All servers, at one moment."""

    endpoints: str
    """host:port of each, with commas between, as clients take them."""
    serving: int
    """How many take calls."""
    servers: tuple[ServerStatus, ...]


OnStatus: TypeAlias = Callable[[FleetStatus], None]


class Fleet:
    """The servers that a configuration asks for.

    Args:
        cluster: Where they run.
        config: How many, and how.
        asked: What each shall be; relative paths are those of this directory.

    Raises:
        ConfigError: several servers cannot share what `asked` keeps to one.
    """

    def __init__(self, cluster: RayCluster, config: FleetConfig, asked: ServeConfig) -> None:
        check_storage(asked, config.servers)
        self._cluster = cluster
        self._config = config
        self._asked = absolute_paths(asked)
        self._members: dict[int, _Member] = {}

    def bring_up(self, on_status: OnStatus = lambda status: None) -> FleetStatus:
        """Find the servers that run, start those that are missing, and wait until all serve.

        What this call has started and cannot get to serve, it takes away again.

        Raises:
            PreconditionError: other servers run than those that are asked for, or too few nodes are left.
            ConfigError: a node's address is not safe to listen on.
            FleetError: the servers do not come up in time.
            LynearmError: what keeps a server that was started here from serving, and waiting does not help.
        """
        deadline = time.monotonic() + self._config.start_seconds
        self._members = {number: _Member(actor) for number, actor in self._cluster.find().items()}
        self._wait(deadline, self._all_have_answered, on_status)
        self._members = {number: member for number, member in self._members.items() if not member.lost}
        self._check_running()
        started: list[_Member] = []
        try:
            self._start_missing(self._cluster.nodes(), started)
            self._wait(deadline, lambda: self._all_serve(started), on_status)
        except LynearmError:
            _remove(self._cluster, started)
            raise
        return self.status()

    def mend(self) -> FleetStatus:
        """Look at the servers, and replace those whose node is gone, as far as nodes are left.

        Servers that somebody took down are left out from then on.
        """
        _look(self._members.values())
        for member in self._lost():
            try:
                if self._replace(member) is None:
                    del self._members[member.actor.number]
            except LynearmError as error:
                member.problem = str(error)
        return self.status()

    def status(self) -> FleetStatus:
        """What the last look found."""
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

    def _start_missing(self, nodes: Cluster, started: list[_Member]) -> None:
        for number in range(self._config.servers):
            if number not in self._members:
                started.append(self._start(number, nodes))

    def _start(self, number: int, nodes: Cluster) -> _Member:
        plans = [member.plan for other, member in self._members.items() if other != number]
        placed = [plan for plan in plans if plan is not None]
        plan = plan_server(number, self._asked, nodes, cpus=self._config.cpus, placed=placed)
        if plan.config.port == 0:
            port = self._cluster.free_port(plan.node, plan.config.host, self._config.start_seconds)
            plan = with_port(plan, port)
        member = _Member(self._cluster.start(plan, self._config.cpus), plan)
        self._members[number] = member
        return member

    def _lost(self) -> list[_Member]:
        return [member for member in self._members.values() if member.lost]

    def _replace(self, member: _Member) -> _Member | None:
        """A server in the place of one whose node is gone; None where it was taken from a node that is there."""
        nodes = self._cluster.nodes()
        if member.plan is None or any(node.node_id == member.plan.node.node_id for node in nodes.nodes):
            return None
        return self._start(member.actor.number, nodes)

    def _all_have_answered(self) -> bool:
        return all(member.report or member.lost for member in self._members.values())

    def _all_serve(self, started: list[_Member]) -> bool:
        for member in self._lost():
            replacement = self._replace(member)
            if replacement is None:
                raise FleetError(member.problem, "run the same command again")
            started.append(replacement)
        for member in started:
            error = member.report.state.error if member.report else None
            if error is not None and error.retry_seconds is None:
                raise error
        return all(member.status().phase == "serving" for member in self._members.values())

    def _wait(self, deadline: float, is_done: Callable[[], bool], on_status: OnStatus) -> None:
        while True:
            _look(self._members.values())
            on_status(self.status())
            if is_done():
                return
            if time.monotonic() > deadline:
                raise self._too_slow()
            time.sleep(_POLL_SECONDS)

    def _too_slow(self) -> FleetError:
        waiting = [server for server in self.status().servers if server.phase != "serving"]
        reasons = "; ".join(
            f"server {server.number} at {server.endpoint or 'an unknown address'} is {server.phase}"
            + (f" ({server.error})" if server.error else "")
            for server in waiting
        )
        return FleetError(
            f"not all servers serve after {self._config.start_seconds:g} s: {reasons}",
            "a silent one waits for a free CPU of its node (`ray status`), or its process ends at once (the "
            "node's Ray logs say why); --start-seconds waits longer",
        )


def take_down(cluster: RayCluster) -> int:
    """Drain all servers at once, and take them away. What was acknowledged is durable then.

    Returns:
        How many there were.

    Raises:
        FleetError: if Ray does not let go of them.
    """
    members = [_Member(actor) for actor in cluster.find().values()]
    _look(members)
    _remove(cluster, members)
    return len(members)


def _look(members: Iterable[_Member]) -> None:
    """Ask all at once: a fleet of which half does not answer is looked at as fast as one server."""
    asked = [member for member in members if not member.lost]
    for member in asked:
        member.actor.ask()
    deadline = time.monotonic() + _REPORT_SECONDS
    for member in asked:
        member.look(max(0.0, deadline - time.monotonic()))


def _remove(cluster: RayCluster, members: list[_Member]) -> None:
    """Drain those that answer, end all."""
    answering = [member for member in members if member.report and not member.lost]
    patience = max((member.drain_seconds for member in answering), default=0.0) + _DRAIN_MARGIN_SECONDS
    cluster.wait([member.actor.drain() for member in answering], patience)
    for member in members:
        member.actor.remove()
    cluster.wait_forgotten([member.actor.number for member in members])


class _Member:
    """A server of the fleet and what is known of it."""

    def __init__(self, actor: ServerActor, plan: ServerPlan | None = None) -> None:
        self.actor = actor
        self.plan = plan
        self.report: ServerReport | None = None
        self.lost = False
        self.problem = ""

    @property
    def drain_seconds(self) -> float:
        return self.plan.config.drain_seconds if self.plan else 0.0

    def look(self, timeout_seconds: float) -> None:
        """Take its answer. A server that gives none keeps its plan, and with it its endpoint."""
        try:
            self.report = self.actor.report(timeout_seconds)
        except ServerLostError as error:
            self.report, self.lost, self.problem = None, True, str(error)
        if self.report is not None:
            # Where another command started it first, its own plan is what counts.
            self.plan = self.report.plan

    def status(self) -> ServerStatus:
        endpoint, machine = (self.plan.endpoint, self.plan.node.machine) if self.plan else ("", "")
        if self.report is None:
            phase: ServerPhase = "lost" if self.lost else "silent"
            return ServerStatus(self.actor.number, endpoint, machine, phase, self.problem)
        state = self.report.state
        error = str(state.error) if state.error else ""
        return ServerStatus(self.actor.number, endpoint, machine, state.phase, error, state.process_id)
