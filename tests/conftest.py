"""The order of all tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray Train's runs come last.

    They leave something in this process by which actors of a cluster of simulated nodes, joined later, are
    cancelled before they run; the other way round all is well.
    """
    items.sort(key=lambda item: item.path.name == "test_ray_launch.py")
