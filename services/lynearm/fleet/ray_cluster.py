"""The border to Ray: its nodes, and the actors of a fleet, found by name in a namespace of their own."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

from lynearm.cluster.session import RayUse, last_line, ray_session
from lynearm.fleet.placement import Cluster, Node, ServerPlan
from lynearm.fleet.server_actor import ServerReport, TraceServerActor
from lynearm.wire.errors import FleetError

Untyped: TypeAlias = Any
"""An object of Ray, whose remote calls no checker can follow."""

NAMESPACE = "lynearm"
"""Of the actors' names; jobs in any namespace find them there."""

_NAME = re.compile(r"trace-server-(\d+)")
_USE = RayUse(
    "a server on Ray",
    "pip install 'lynearm[ray,service]', on each node",
    error=FleetError,
    remedy="start it with `ray start`, or name a node's host:port with --ray-address",
)
_REMOVAL_SECONDS = 30.0
"""Until Ray has forgotten the name of an actor that it killed."""


class ServerLostError(FleetError):
    """Ray does not start the server again: its node is gone, or it was taken down."""


class ServerActor:
    """One server of a fleet, as seen from outside its process.

    Args:
        ray: The connected module.
        number: Of the server.
        actor: Ray's handle.
    """

    def __init__(self, ray: Untyped, number: int, actor: Untyped) -> None:
        self.number = number
        self._ray = ray
        self._actor = actor
        self._asked: Untyped = None

    def ask(self) -> None:
        """Send the question that `report` takes the answer of, unless one is on its way."""
        # One at a time: a server that starts would else answer a queue of old ones first.
        if self._asked is None:
            self._asked = self._actor.report.remote()

    def report(self, timeout_seconds: float) -> ServerReport | None:
        """What it says of itself; None while it starts, is started again, or has not answered yet.

        Raises:
            ServerLostError: it will never answer.
        """
        self.ask()
        ready, _ = self._ray.wait([self._asked], timeout=timeout_seconds)
        if not ready:
            return None
        asked, self._asked = self._asked, None
        errors = self._ray.exceptions
        try:
            report: ServerReport = self._ray.get(asked)
        except errors.ActorUnavailableError:
            return None
        except (errors.RayActorError, errors.ActorUnschedulableError) as error:
            raise ServerLostError(f"server {self.number} has ended: {last_line(error)}") from error
        except errors.RayError as error:
            raise FleetError(f"server {self.number} does not answer: {last_line(error)}") from error
        return report

    def drain(self) -> Untyped:
        """Begin to drain it; pass what this returns to `RayCluster.wait`."""
        return self._actor.drain.remote()

    def remove(self) -> None:
        """End it at once and for good. Harmless for one that has ended."""
        self._ray.kill(self._actor, no_restart=True)


class RayCluster:
    """A connected Ray.

    Args:
        ray: The module.
    """

    def __init__(self, ray: Untyped) -> None:
        self._ray = ray

    def nodes(self) -> Cluster:
        """The nodes that are alive."""
        nodes = [
            Node(
                str(one["NodeID"]),
                str(one["NodeManagerAddress"]),
                str(one["NodeManagerHostname"]),
                float(one["Resources"].get("CPU", 0.0)),
            )
            for one in self._ray.nodes()
            if one["Alive"]
        ]
        here = self._ray.get_runtime_context().get_node_id()
        home = next((node for node in nodes if node.node_id == here), None)
        if home is None:
            raise FleetError("this process is on no node of the Ray cluster", "run it on one of its machines")
        return Cluster(nodes, home)

    def find(self) -> dict[int, ServerActor]:
        """The servers that there are, in whatever state."""
        found: dict[int, ServerActor] = {}
        for number in self._numbers():
            # One that ends at this moment has no name any more.
            with contextlib.suppress(ValueError):
                actor = self._ray.get_actor(f"trace-server-{number}", namespace=NAMESPACE)
                found[number] = ServerActor(self._ray, number, actor)
        return found

    def start(self, plan: ServerPlan, cpus: float) -> ServerActor:
        """Start a server, or find the one of that number that somebody else has started just now."""
        remote_class = self._ray.remote(
            name=f"trace-server-{plan.number}",
            namespace=NAMESPACE,
            get_if_exists=True,
            # It outlives the command that started it.
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            num_cpus=cpus,
            # One thread waits in `drain` while others report.
            max_concurrency=4,
            scheduling_strategy=self._on(plan.node),
        )(TraceServerActor)
        return ServerActor(self._ray, plan.number, remote_class.remote(plan))

    def free_port(self, node: Node, host: str, timeout_seconds: float) -> int:
        """A port that nobody uses on a node at this moment.

        Raises:
            FleetError: the node does not say in time, or cannot.
        """
        task = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=self._on(node))(find_free_port)
        try:
            port: int = self._ray.get(task.remote(host), timeout=timeout_seconds)
        except self._ray.exceptions.RayError as error:
            raise FleetError(f"node {node.host} finds no free port: {last_line(error)}") from error
        return port

    def wait(self, references: Sequence[Untyped], timeout_seconds: float) -> bool:
        """Whether all calls came to their end, in whatever way, within the time."""
        if not references:
            return True
        ready, _ = self._ray.wait(list(references), num_returns=len(references), timeout=timeout_seconds)
        return len(ready) == len(references)

    def wait_forgotten(self, numbers: Sequence[int]) -> None:
        """Wait until the names of removed servers may be used again.

        Raises:
            FleetError: if that takes too long.
        """
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while left := self._numbers() & set(numbers):
            if time.monotonic() > deadline:
                raise FleetError(
                    f"Ray does not let go of servers {sorted(left)}", "run the same command again"
                )
            time.sleep(0.1)

    def _numbers(self) -> set[int]:
        names = self._ray.util.list_named_actors(all_namespaces=True)
        matches = [_NAME.fullmatch(one["name"]) for one in names if one["namespace"] == NAMESPACE]
        return {int(match[1]) for match in matches if match}

    def _on(self, node: Node) -> Untyped:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node_id=node.node_id, soft=False)


@contextlib.contextmanager
def connect(address: str) -> Generator[RayCluster]:
    """A running Ray. Within a process that is connected already, that connection is used and left open.

    Raises:
        MissingDependencyError: without Ray.
        FleetError: if it cannot be reached.
    """
    with ray_session(address, _USE, namespace=NAMESPACE) as ray:
        yield RayCluster(ray)


def find_free_port(host: str) -> int:
    """A TCP port that can be listened on at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host.strip("[]"), 0))
        port: int = probe.getsockname()[1]
        return port
