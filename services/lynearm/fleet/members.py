"""The servers of a fleet, one by one, and what was last heard of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lynearm.fleet.placement import ServerPlan
from lynearm.fleet.ray_cluster import RayCluster, ServerActor, ServerLostError
from lynearm.fleet.server_actor import ServerReport

ServerPhase: TypeAlias = Literal["starting", "serving", "stopped", "silent", "lost"]
"""silent: no answer, as while Ray starts its process; lost: its node is gone."""

_REPORT_SECONDS = 1.0
"""Patience in one look at the fleet; a server that serves answers in milliseconds."""

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


class Member:
    """A server of the fleet and what is known of it.

    Args:
        actor: The server.
        plan: What it is; None for one that is found, until it says so.
    """

    def __init__(self, actor: ServerActor, plan: ServerPlan | None = None) -> None:
        self.actor = actor
        self.plan = plan
        self.report: ServerReport | None = None
        self.lost = False
        """Ray does not start it again."""
        self.problem = ""

    @property
    def drain_seconds(self) -> float:
        """Time that its calls get to end."""
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
        """What was heard last."""
        endpoint, machine = (self.plan.endpoint, self.plan.node.machine) if self.plan else ("", "")
        if self.report is None:
            phase: ServerPhase = "lost" if self.lost else "silent"
            return ServerStatus(self.actor.number, endpoint, machine, phase, self.problem)
        state = self.report.state
        error = str(state.error) if state.error else ""
        return ServerStatus(self.actor.number, endpoint, machine, state.phase, error, state.process_id)


def look_at(members: Iterable[Member]) -> None:
    """Ask all at once: a fleet of which half does not answer is looked at as fast as one server."""
    asked = [member for member in members if not member.lost]
    for member in asked:
        member.actor.ask()
    deadline = time.monotonic() + _REPORT_SECONDS
    for member in asked:
        member.look(max(0.0, deadline - time.monotonic()))


def remove(cluster: RayCluster, members: Sequence[Member]) -> None:
    """Drain those that answer, end all."""
    answering = [member for member in members if member.report and not member.lost]
    patience = max((member.drain_seconds for member in answering), default=0.0) + _DRAIN_MARGIN_SECONDS
    cluster.wait([member.actor.drain() for member in answering], patience)
    for member in members:
        member.actor.remove()
    cluster.wait_forgotten([member.actor.number for member in members])
