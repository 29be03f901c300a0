"""`lynearm up` on a Ray cluster of three nodes: real processes, of which any may die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models.ray_start import patiently
from models.trace_blocks import make_block, make_spec

from lynearm.client import TraceClient
from lynearm.wire.errors import DrainingError, LynearmError

pytestmark = [
    pytest.mark.slow,
    # Ray leaves its child processes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}

PATIENCE_SECONDS = 120
"""With a busy machine; nothing here asserts a time."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and two more nodes, found by commands through RAY_ADDRESS as in a submitted job."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # At nice 15, which is Ray's default, workers would starve on a busy machine.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        head = {**NODE, "include_dashboard": False}
        made = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            for _ in range(2):
                patiently(lambda: made.add_node(**NODE))
            patch.setenv("RAY_ADDRESS", made.address)
            yield made
        finally:
            made.shutdown()


class Up:
    """`lynearm up` in the foreground, and what it says."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            lynearm("up", *arguments, "--progress", "json"), stdout=subprocess.PIPE, text=True
        )
        self.statuses: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def servers(self) -> list[dict[str, Any]]:
        return list(self.statuses[-1]["servers"])

    def wait(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The latest status, once something holds of it."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: (self.statuses and holds(self.statuses[-1])) or not self._reader.is_alive(),
                PATIENCE_SECONDS,
            )
            assert done, self.statuses[-1:]
            assert holds(self.statuses[-1]), self.statuses[-1:]
            return self.statuses[-1]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)
        self._reader.join(30)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self._changed:
                    self.statuses.append(json.loads(line))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def lynearm(verb: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "lynearm.cli.main", verb, "--ray", *arguments]


def run(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        lynearm(verb, *arguments), capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )


def parent_of(process_id: int) -> int:
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def all_serve(status: dict[str, Any]) -> bool:
    return status["serving"] == 3


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    data_dir = tmp_path_factory.mktemp("fleet") / "data"
    return ("--servers", "3", "--shared", "--data-dir", str(data_dir), "--port", "0")


@pytest.fixture(scope="module")
def watching(cluster: Any, flags: tuple[str, ...]) -> Iterator[list[Up]]:
    """The command that watches; a list, so that a test that ends it can be followed by any other."""
    running: list[Up] = []
    yield running
    for up in running:
        up.close()
    run("down")


@pytest.fixture
def up(watching: list[Up], flags: tuple[str, ...]) -> Up:
    """Three servers, and the command that watches them."""
    if not watching or watching[-1].process.poll() is not None:
        watching.append(Up(*flags))
    watching[-1].wait(all_serve)
    return watching[-1]


def test_three_servers_on_three_nodes_are_one_service(up: Up) -> None:
    endpoints = up.statuses[-1]["endpoints"].split(",")
    assert len(set(endpoints)) == 3
    # Each node of a simulated cluster has a raylet of its own, which starts its processes.
    assert len({parent_of(server["process_id"]) for server in up.servers}) == 3
    with TraceClient(endpoints[0]) as client:
        client.create_stream(make_spec("shared"))
        with client.publisher("shared", "p") as publisher:
            for number in range(20):
                publisher.publish(make_block(number))
        client.seal_stream("shared")
    expected = [make_block(number) for number in range(20)]
    for service in (endpoints[1], endpoints[2], ",".join(reversed(endpoints))):
        with TraceClient(service) as client, client.subscribe("shared") as blocks:
            assert [bytes(one.block) for one in blocks] == expected


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_server_that_ends_comes_back_at_its_endpoint_and_its_publisher_goes_on(
    up: Up, end: signal.Signals
) -> None:
    stream = end.name.lower()
    endpoints = up.statuses[-1]["endpoints"]
    first = endpoints.split(",")[0]
    (victim,) = (server["process_id"] for server in up.servers if server["endpoint"] == first)
    with TraceClient(endpoints) as client:
        client.create_stream(make_spec(stream))
        with client.publisher(stream, "p") as publisher:
            for number in range(300):
                publisher.publish(make_block(number), (f"prompt-{number}",))
                if number == 100:
                    publisher.flush()
                    os.kill(victim, end)
        client.seal_stream(stream)
        with client.subscribe(stream) as blocks:
            assert [bytes(one.block) for one in blocks] == [make_block(number) for number in range(300)]

    def is_back(status: dict[str, Any]) -> bool:
        server = next(one for one in status["servers"] if one["endpoint"] == first)
        return all_serve(status) and server["process_id"] != victim

    assert up.wait(is_back)["endpoints"] == endpoints
    with TraceClient(first) as client:
        assert client.get_stream(stream).next_offset == 300


def test_ctrl_c_leaves_the_servers_where_they_are(up: Up, watching: list[Up], flags: tuple[str, ...]) -> None:
    before = up.statuses[-1]
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(PATIENCE_SECONDS) == 130
    watching.append(Up(*flags))
    assert watching[-1].wait(all_serve) == before


def test_up_again_finds_the_servers_and_changes_nothing(
    up: Up, flags: tuple[str, ...], tmp_path: Path
) -> None:
    before = up.servers
    file = tmp_path / "endpoints"
    again = run("up", *flags, "--detach", "--endpoints-file", str(file))
    assert again.returncode == 0, again.stderr
    assert again.stdout == up.statuses[-1]["endpoints"] + "\n" == file.read_text()
    other = run("up", *flags, "--detach", "--drain-seconds", "3")
    assert other.returncode == 1
    assert "servers run with another drain_seconds: `lynearm down --ray`" in other.stderr
    assert up.wait(all_serve)["servers"] == before


def test_a_server_whose_node_is_lost_is_placed_on_another(up: Up, cluster: Any) -> None:
    before = up.statuses[-1]
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=True)
    up.wait(lambda status: status["serving"] == 2)
    patiently(lambda: cluster.add_node(**NODE))
    after = up.wait(all_serve)
    kept = [one for one in after["servers"] if one in before["servers"]]
    assert len(kept) == 2
    with TraceClient(after["endpoints"]) as client:
        client.create_stream(make_spec("moved"), allow_existing=True)


def test_down_drains_and_takes_all_servers_away(up: Up) -> None:
    endpoint = up.servers[0]["endpoint"]
    with TraceClient(endpoint, patience_seconds=0) as client:
        client.create_stream(make_spec("drained"))
        with client.publisher("drained", "p") as publisher:
            publisher.publish(make_block(0))
        with client.subscribe("drained") as blocks:
            assert bytes(next(blocks).block) == make_block(0)
            down = run("down")
            with pytest.raises(LynearmError) as caught:
                next(blocks)
    assert isinstance(caught.value, DrainingError), "the server was killed, not drained"
    assert (down.returncode, down.stderr) == (0, "3 servers drained and taken away\n")
    assert up.process.wait(PATIENCE_SECONDS) == 0, "a command that watches does not put them back"


def test_servers_that_cannot_serve_are_taken_away_again(cluster: Any) -> None:
    run("down")
    failed = run("up", "--data-dir", "/proc/nowhere", "--port", "0", "--detach")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "error: data directory /proc/nowhere: No such file or directory: choose" in failed.stderr
    assert run("down").stderr == "no server runs\n"
