"""Power failures: what a server has synced is all that it may count on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from faults_power import build_library, lose_unsynced  # no package
from models.server_process import Server, object_files, read_all
from traces.harness import make_block, make_spec

from lynearm.client import TraceClient
from lynearm.traces.direct_writes import DIRECT_BYTES
from lynearm.wire.errors import StorageError


class Power:
    """Data that loses, when the power fails, what was not synced."""

    def __init__(self, directory: Path, library: Path) -> None:
        self.data = directory / "data"
        self._kept = directory / "kept"
        self.environment = {
            "LD_PRELOAD": str(library),
            "POWER_ROOT": str(self.data),
            "POWER_SHADOW": str(self._kept),
        }

    def fail(self) -> None:
        lose_unsynced(self.data, self._kept)

    @contextmanager
    def asking(self, what: Literal["kill", "fail"]) -> Iterator[None]:
        """Once a commit is written, the server dies before its sync, or the sync fails."""
        asked = self._kept.with_suffix("." + what)
        asked.touch()
        yield
        asked.unlink()


@pytest.fixture
def power(tmp_path: Path) -> Power:
    library = build_library(tmp_path)
    if library is None:
        pytest.skip("power failures need a C compiler, and Linux")
    return Power(tmp_path.resolve(), library)


def test_what_was_acknowledged_survives_a_power_failure(power: Power) -> None:
    point = "publish.before_ack=kill@5"
    with Server(power.data, environment=power.environment, failpoints=point) as server:
        port = int(server.target.rpartition(":")[2])
        client = TraceClient(server.target)
        client.create_stream(make_spec())
        publisher = client.publisher("s", "p")
        for number in range(4):
            publisher.publish(make_block(number), [f"prompt-{number}"])
            publisher.flush()
        publisher.publish(make_block(4), ["prompt-4"])
        server.process.wait(30)
    power.fail()
    with Server(power.data, environment=power.environment, port=port):
        # The block whose acknowledgement was about to be sent is there too.
        assert len(object_files(power.data)) == 5
        publisher.close(timeout_seconds=60)
        assert read_all(client) == [make_block(number) for number in range(5)]
        assert client.finished_prompts("s") == {f"prompt-{number}" for number in range(5)}
        client.close()


def test_a_group_that_passed_by_the_page_cache_survives_a_power_failure(power: Power) -> None:
    block = make_block(0, 2 * DIRECT_BYTES)
    with (
        Server(power.data, environment=power.environment) as server,
        TraceClient(server.target) as client,
    ):
        client.create_stream(make_spec())
        with client.publisher("s", "p") as publisher:
            publisher.publish(block)
    power.fail()
    with (
        Server(power.data, environment=power.environment) as server,
        TraceClient(server.target) as client,
    ):
        assert read_all(client) == [block]


def test_a_server_that_does_not_sync_objects_is_caught(power: Power) -> None:
    careless = "import os; os.fdatasync = lambda descriptor: None"
    with Server(power.data, environment=power.environment, prelude=careless) as server:
        client = TraceClient(server.target)
        client.create_stream(make_spec())
        with client.publisher("s", "p") as publisher:
            publisher.publish(make_block(0))
        client.close()
    power.fail()
    assert object_files(power.data) == []


def test_a_commit_that_a_new_server_finds_is_synced_before_anybody_is_told(power: Power) -> None:
    with Server(power.data, environment=power.environment) as server:
        port = int(server.target.rpartition(":")[2])
        client = TraceClient(server.target)
        client.create_stream(make_spec())
        publisher = client.publisher("s", "p")
        publisher.publish(make_block(0))
        publisher.flush()
        with power.asking("kill"):
            publisher.publish(make_block(1))
            server.process.wait(30)
    # The new server finds the group in the log, and says so to the publisher; then the power fails.
    with Server(
        power.data, environment=power.environment, port=port, failpoints="store.before_write=kill@1"
    ) as server:
        publisher.flush(timeout_seconds=60)
        assert publisher.acked_blocks == 2
        publisher.publish(make_block(2))
        server.process.wait(30)
    power.fail()
    with Server(power.data, environment=power.environment, port=port):
        publisher.close(timeout_seconds=60)
        assert read_all(client) == [make_block(number) for number in range(3)]
        client.close()


def test_a_commit_whose_sync_fails_is_not_there_and_takes_nothing_with_it(power: Power) -> None:
    with Server(power.data, environment=power.environment) as server:
        client = TraceClient(server.target)
        client.create_stream(make_spec())
        with client.publisher("s", "p") as publisher:
            publisher.publish(make_block(0), ["prompt-0"])
        publisher = client.publisher("s", "unlucky")
        publisher.publish(make_block(1), ["prompt-1"])
        publisher.flush()
        with power.asking("fail"):
            publisher.publish(make_block(2), ["prompt-2"])
            with pytest.raises(StorageError, match="disk I/O error"):
                publisher.flush()
        assert read_all(client) == [make_block(0), make_block(1)]
        with client.publisher("s", "p") as publisher:
            publisher.publish(make_block(3), ["prompt-2"])
        client.close()
    power.fail()
    with Server(power.data, environment=power.environment) as server, TraceClient(server.target) as client:
        assert read_all(client) == [make_block(0), make_block(1), make_block(3)]
        assert client.finished_prompts("s") == {"prompt-0", "prompt-1", "prompt-2"}
        assert len(object_files(power.data)) == 3
