"""The process of one server, as Ray runs it, without Ray."""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models.service_process import unused_target
from models.trace_blocks import make_block, make_spec

from lynearm.client import TraceClient
from lynearm.wire.errors import DrainingError, LynearmError

_CODE = """
import json, sys, time
from pathlib import Path
from lynearm.fleet.placement import Node, ServerPlan
from lynearm.fleet.server_actor import TraceServerActor
from lynearm.traces.config import ServeConfig
config = ServeConfig(data_dir=Path(sys.argv[1]), port=int(sys.argv[2]), drain_seconds=30.0)
actor = TraceServerActor(ServerPlan(0, Node("n", "127.0.0.1", "m", 1.0), 0, config, config))
shown = None
while True:
    state = actor.report().state
    seen = {"phase": state.phase, "error": str(state.error or "")}
    if seen != shown:
        print(json.dumps(seen), flush=True)
        shown = seen
    time.sleep(0.02)
"""

StartActor = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start_actor(tmp_path: Path) -> Iterator[StartActor]:
    started: list[subprocess.Popen[str]] = []

    def start(target: str) -> subprocess.Popen[str]:
        port = target.rpartition(":")[2]
        command = [sys.executable, "-c", _CODE, str(tmp_path / "data"), port]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_state(process: subprocess.Popen[str], **wanted: str) -> dict[str, Any]:
    """The next state that has these values."""
    assert process.stdout is not None
    while True:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        assert ready, "nothing changed for a minute"
        line = process.stdout.readline()
        assert line, "the process ended"
        state: dict[str, Any] = json.loads(line)
        if all(wanted_text in state[key] for key, wanted_text in wanted.items()):
            return state


def test_a_server_whose_port_is_taken_says_so_and_serves_when_it_is_free(start_actor: StartActor) -> None:
    target = unused_target()
    host, _, port = target.rpartition(":")
    with socket.create_server((host, int(port))):
        process = start_actor(target)
        wait_for_state(process, phase="starting", error=f"cannot listen on {target}")
    wait_for_state(process, phase="serving")
    with TraceClient(target) as client:
        assert client.list_streams() == []


def test_sigterm_drains_and_ends_the_process(start_actor: StartActor) -> None:
    target = unused_target()
    process = start_actor(target)
    wait_for_state(process, phase="serving")
    with TraceClient(target, patience_seconds=0) as client:
        client.create_stream(make_spec())
        with client.publisher("s", "p") as publisher:
            publisher.publish(make_block(0))
        with client.subscribe("s") as blocks:
            assert bytes(next(blocks).block) == make_block(0)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(LynearmError) as caught:
                next(blocks)
    assert isinstance(caught.value, DrainingError)
    assert process.wait(60) == 0
    again = start_actor(target)
    wait_for_state(again, phase="serving")
    with TraceClient(target) as client:
        assert [bytes(one.block) for one in client.fetch("s", 0, 1)] == [make_block(0)]
