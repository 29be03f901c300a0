"""The order of all tests."""

from __future__ import annotations

import pytest

_FIRST, _LAST = "test_fleet.py", "test_ray_launch.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cluster of simulated nodes comes before any other Ray in this process, Ray Train's runs after all.

    Ray remembers things in a process, by which actors of a cluster that it joins later are cancelled before
    they run. The other way round all is well.
    """
    items.sort(key=lambda item: {_FIRST: 0, _LAST: 2}.get(item.path.name, 1))
