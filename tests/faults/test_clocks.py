"""Wall clocks that are wrong or jump: durations come from the monotonic clock, and order from none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models.server_process import Server, publish_singly, read_all
from traces.harness import make_block

from lynearm.client import TraceClient

_JUMPS = """
import time
end = time.monotonic() + 0.5
seen = set()
while time.monotonic() < end:
    seen.add(time.gmtime().tm_year)
    time.sleep(0.01)
print(len(seen))
"""

_CLIENT = """
import sys
from models.server_process import publish_singly
from lynearm.client import TraceClient
with TraceClient(sys.argv[1]) as client:
    blocks = iter(client.subscribe("s"))
    assert [next(blocks).offset for _ in range(3)] == [0, 1, 2]
    with client.publisher("s", "client") as publisher:
        from traces.harness import make_block
        for number in range(3, 60):
            publisher.publish(make_block(number))
            publisher.flush()
            assert bytes(next(blocks).block) == make_block(number)
print("done")
"""


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process whose wall clock jumps by a year, ten times a second."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("a clock that jumps is made with a C compiler and LD_PRELOAD")
    library = tmp_path_factory.mktemp("clock") / "jumping_clock.so"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    environment = {"LD_PRELOAD": str(library)}
    # A clock that does not jump would let every test below pass.
    seen = subprocess.run(
        [sys.executable, "-c", _JUMPS], check=True, capture_output=True, env={**os.environ, **environment}
    )
    assert seen.stdout == b"2\n"
    return environment


def test_a_clock_that_jumps_by_years_holds_up_neither_server_nor_client(
    tmp_path: Path, jumping_clock: dict[str, str]
) -> None:
    with (
        Server(tmp_path / "data", environment=jumping_clock, group_milliseconds=5.0) as server,
        TraceClient(server.target) as client,
    ):
        publish_singly(client, range(3))
        paths = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [sys.executable, "-c", _CLIENT, server.target],
            check=True,
            capture_output=True,
            env={**os.environ, **jumping_clock, "PYTHONPATH": paths},
            text=True,
            timeout=120,
        )
        assert done.stdout == "done\n"
        assert read_all(client) == [make_block(number) for number in range(60)]


CLOCKS = {
    "in the past": "time.time = lambda: 1.0; time.time_ns = lambda: 10**9",
    "far ahead": "time.time = lambda: 4e9; time.time_ns = lambda: 4 * 10**18",
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_that_is_wrong_changes_nothing_but_the_date(tmp_path: Path, clock: str) -> None:
    prelude = "import time; " + CLOCKS[clock]
    with (
        Server(tmp_path / "data", prelude=prelude, group_milliseconds=5.0) as server,
        TraceClient(server.target, timeout_seconds=20) as client,
    ):
        publish_singly(client, range(3))
        blocks = iter(client.subscribe("s"))
        assert [next(blocks).offset for _ in range(3)] == [0, 1, 2]
        publish_singly(client, range(3, 5))
        assert [bytes(next(blocks).block) for _ in range(2)] == [make_block(3), make_block(4)]
        created = client.get_stream("s").created_unix_nano
        assert created == {"in the past": 10**9, "far ahead": 4 * 10**18}[clock]
    with Server(tmp_path / "data") as server, TraceClient(server.target) as client:
        publish_singly(client, range(5, 6))
        assert read_all(client) == [make_block(number) for number in range(6)]
