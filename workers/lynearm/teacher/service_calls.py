"""Calls to the service that wait for it when it is away, as publishers and leases do by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lynearm.client import TraceClient
from lynearm.wire.errors import DeadlineError, ServiceUnavailableError

Result = TypeVar("Result")


def patiently(client: TraceClient, call: Callable[[], Result]) -> Result:
    """What an idempotent call returns, however long the service is away.

    Raises:
        LynearmError: what the service said once it answered.
    """
    while True:
        try:
            return call()
        except (ServiceUnavailableError, DeadlineError):
            client.wait_until_ready()
