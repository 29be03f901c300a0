"""Which node gets a server, at which address, and what is refused before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lynearm.fleet.config import FleetConfig, check_storage
from lynearm.fleet.placement import (
    Cluster,
    Node,
    ServerPlan,
    absolute_paths,
    differences,
    plan_server,
    with_port,
)
from lynearm.traces.config import ServeConfig
from lynearm.wire.errors import ConfigError, PreconditionError

REMOTE = {"catalog": "postgresql://db/traces", "blocks": "s3://traces/production"}
SAFE: dict[str, Any] = {"tls_cert": Path("/c.pem"), "tls_key": Path("/k.pem"), "tokens": Path("/t.toml")}

SIMULATED = tuple(Node(f"{number}", "127.0.0.1", "laptop", 1.0) for number in range(3))
REAL = tuple(Node(f"{number}", f"10.0.0.{number}", f"machine-{number}", 8.0) for number in range(3))


def plan(
    nodes: Sequence[Node], count: int, asked: ServeConfig, *, home: int = 0, cpus: float = 1.0
) -> list[ServerPlan]:
    cluster = Cluster(nodes, nodes[home])
    placed: list[ServerPlan] = []
    for number in range(count):
        placed.append(plan_server(number, asked, cluster, cpus=cpus, placed=placed))
    return placed


def test_servers_on_several_machines_listen_on_the_address_of_their_node() -> None:
    plans = plan(REAL, 3, ServeConfig(**REMOTE, **SAFE))
    assert {one.endpoint for one in plans} == {f"10.0.0.{number}:7411" for number in range(3)}
    assert all(one.endpoint == f"{one.config.host}:7411" for one in plans)


def test_an_address_that_others_reach_asks_for_tls_and_tokens() -> None:
    with pytest.raises(ConfigError, match="no TLS"):
        plan(REAL, 1, ServeConfig(**REMOTE))
    assert plan(REAL, 1, ServeConfig(**REMOTE, insecure=True))[0].endpoint == "10.0.0.0:7411"


def test_nodes_of_one_machine_share_loopback_and_take_the_next_ports() -> None:
    plans = plan(SIMULATED, 3, ServeConfig(shared=True, metrics_port=9000))
    assert [one.endpoint for one in plans] == [f"127.0.0.1:{7411 + number}" for number in range(3)]
    assert [one.config.metrics_port for one in plans] == [9000, 9001, 9002]


def test_a_server_that_is_put_back_takes_the_port_that_is_free() -> None:
    first, second, third = plan(SIMULATED, 3, ServeConfig(shared=True))
    again = plan_server(1, first.asked, Cluster(SIMULATED, SIMULATED[0]), cpus=1.0, placed=[first, third])
    assert again.endpoint == second.endpoint
    assert again.node == second.node


def test_every_address_of_a_machine_is_announced_as_that_of_its_node() -> None:
    plans = plan(REAL, 2, ServeConfig(**REMOTE, **SAFE, host="0.0.0.0"))
    assert {one.config.host for one in plans} == {"0.0.0.0"}
    assert {one.endpoint for one in plans} == {"10.0.0.0:7411", "10.0.0.1:7411"}


def test_a_port_that_a_node_chose_is_the_endpoint_from_then_on() -> None:
    (one,) = plan(SIMULATED, 1, ServeConfig(port=0, metrics_port=0))
    assert one.config.metrics_port == 0
    assert with_port(one, 5000).endpoint == "127.0.0.1:5000"


def test_machines_without_a_server_come_first() -> None:
    nodes = (*SIMULATED, Node("9", "10.0.0.9", "other", 1.0))
    plans = plan(nodes, 2, ServeConfig(**REMOTE, insecure=True))
    assert [one.node.machine for one in plans] == ["laptop", "other"]


def test_data_on_a_disk_keeps_its_servers_on_the_machine_of_the_command() -> None:
    assert plan(REAL, 1, ServeConfig(insecure=True), home=2)[0].node == REAL[2]
    with pytest.raises(PreconditionError, match="machine-2, where its data is"):
        plan(REAL, 2, ServeConfig(shared=True, insecure=True), home=2)


@pytest.mark.parametrize(("count", "cpus"), [(4, 1.0), (1, 9.0)])
def test_more_than_the_nodes_have_is_refused(count: int, cpus: float) -> None:
    with pytest.raises(PreconditionError, match=r"no node is left .*3 nodes"):
        plan(REAL, count, ServeConfig(**REMOTE, **SAFE), cpus=cpus)


@pytest.mark.parametrize(
    ("storage", "named"),
    [
        ({}, "catalog and blocks"),
        ({"blocks": "s3://traces/x"}, "catalog"),
        ({"catalog": "postgresql://db/traces"}, "blocks"),
        ({"catalog": "traces.sqlite3", "blocks": "s3://traces/x"}, "catalog"),
        ({"catalog": "postgresql://db/traces", "blocks": "file:///srv/blocks"}, "blocks"),
    ],
)
def test_several_servers_on_what_one_keeps_to_itself_are_refused(storage: dict[str, str], named: str) -> None:
    asked = ServeConfig(**storage)  # type: ignore[arg-type]  # texts only
    with pytest.raises(ConfigError, match=f"2 servers cannot share {named} on the disk of one"):
        check_storage(asked, 2)
    check_storage(asked, 1)


def test_several_servers_on_what_all_reach_are_not_refused() -> None:
    check_storage(ServeConfig(shared=True), 3)
    check_storage(ServeConfig(**REMOTE), 3)


def test_relative_paths_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = absolute_paths(ServeConfig(catalog="c.sqlite3", tokens=Path("t.toml")))
    assert (config.catalog, config.tokens) == (f"{tmp_path}/c.sqlite3", tmp_path / "t.toml")
    assert config.data_dir == tmp_path / "lynearm-data"
    # Nothing is in it then, so that it makes no difference from where a command is given.
    assert absolute_paths(ServeConfig(**REMOTE)) == ServeConfig(**REMOTE)


def test_differences_are_named_and_their_values_are_not() -> None:
    running = ServeConfig(catalog="postgresql://u:secret@db/traces")
    assert differences(running, ServeConfig(port=1)) == ["catalog", "port"]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"servers": 0}, "servers is 0"),
        ({"cpus": 0.0}, "cpus is 0.0"),
        ({"start_seconds": 0.0}, "start_seconds is 0.0"),
        ({"ray_address": "ray://head:10001"}, "ray job submit"),
        ({"ray_address": "local"}, "ray start --head"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        FleetConfig(**fields)
