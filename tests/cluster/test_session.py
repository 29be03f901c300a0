"""Connecting to Ray: what is tried again, what is refused, and what is shut down.

Jobs, fleets and students connect to real ones in their own tests.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lynearm.cluster import session
from lynearm.cluster.session import RayUse, ray_session
from lynearm.wire.errors import FleetError, MissingDependencyError

USE = RayUse("a test", "pip install it", FleetError, remedy="start one")


class FakeRay(SimpleNamespace):
    """Stands for the module; fails to start as often as it is told."""

    def __init__(self, failures: int = 0, *, connected: bool = False) -> None:
        super().__init__(failures=failures, connected=connected, inits=[], shutdowns=0)

    def is_initialized(self) -> bool:
        return bool(self.connected)

    def init(self, **arguments: Any) -> None:
        self.inits.append(arguments)
        if len(self.inits) <= self.failures:
            raise RuntimeError("The node\ntimed out.")

    def shutdown(self) -> None:
        self.shutdowns += 1


def install(monkeypatch: pytest.MonkeyPatch, ray: FakeRay) -> FakeRay:
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_worker_niceness", "15")
    return ray


def test_a_ray_that_was_slow_to_start_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = install(monkeypatch, FakeRay(failures=2))
    with ray_session("local", USE, local={"num_cpus": 2}, namespace="n") as found:
        assert found is ray
        assert ray.shutdowns == 2
    assert ray.shutdowns == 3
    assert [(one["num_cpus"], one["namespace"]) for one in ray.inits] == [(2, "n")] * 3


def test_a_ray_that_does_not_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = install(monkeypatch, FakeRay(failures=9))
    with pytest.raises(FleetError, match="cannot start Ray here: timed out"), ray_session("local", USE):
        pass
    assert len(ray.inits) == 3


def test_an_address_is_tried_once_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = install(monkeypatch, FakeRay(failures=9))
    told = r"cannot reach Ray \(auto\): timed out.*start one"
    with pytest.raises(FleetError, match=told), ray_session("auto", USE, local={"num_cpus": 2}):
        pass
    (arguments,) = ray.inits
    assert "num_cpus" not in arguments
    # Nobody listens there: Ray itself would try for minutes.
    monkeypatch.setattr(session, "_PROBE_SECONDS", 1.0)
    with pytest.raises(FleetError, match="refused"), ray_session("ray://127.0.0.1:1", USE):
        pass
    assert len(ray.inits) == 1


def test_a_connection_that_is_there_is_used_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = install(monkeypatch, FakeRay(connected=True))
    with ray_session("auto", USE) as found:
        assert found is ray
    assert (ray.inits, ray.shutdowns) == ([], 0)


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    told = r"a test needs Ray.*pip install it"
    with pytest.raises(MissingDependencyError, match=told), ray_session("auto", USE):
        pass
