"""What one caller may take of a server: calls at a time, requests and published bytes a second.

Rates are token buckets that hold one second's worth. A publisher that is a little too fast is held back, by
not reading its next block; only one that would wait for long is refused, and told for how long.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from lynearm.wire.errors import LimitError, RateLimitedError

MAX_HOLD_SECONDS = 5.0
"""How long a publisher is held back rather than refused: below what a client takes for a frozen peer."""


@dataclass(frozen=True, slots=True)
class CallerQuota:
    """How much one caller may take."""

    max_calls: int
    """Calls at the same time."""
    requests_per_second: float = math.inf
    """Calls that begin."""
    publish_bytes_per_second: float = math.inf
    """Bytes of Publish messages."""


class TokenBucket:
    """A rate with one second's worth of slack.

    Args:
        per_second: The rate; infinite means none.
        clock: Seconds that only grow.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._capacity = max(1.0, per_second)
        self._level = self._capacity
        self._filled_at = clock()

    def wait_seconds(self) -> float:
        """How long until what was taken is paid off; 0 when more may be taken."""
        if math.isinf(self._per_second):
            return 0.0
        self._fill()
        return max(0.0, -self._level / self._per_second)

    def take(self, amount: float) -> None:
        """Take an amount, going into debt where there is less."""
        if not math.isinf(self._per_second):
            self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled_at) * self._per_second)
        self._filled_at = now


class CallerLimits:
    """The limits that all calls of one caller share. Lives on the event loop's thread.

    Args:
        quota: How much that is.
        clock: Seconds that only grow.
    """

    def __init__(self, quota: CallerQuota, clock: Callable[[], float] = time.monotonic) -> None:
        self._quota = quota
        self._calls = 0
        self._requests = TokenBucket(quota.requests_per_second, clock)
        self._publish_bytes = TokenBucket(quota.publish_bytes_per_second, clock)

    @property
    def is_idle(self) -> bool:
        """Whether no call is running, and all that was taken is paid off."""
        return not (self._calls or self._requests.wait_seconds() or self._publish_bytes.wait_seconds())

    @contextmanager
    def call(self, caller_name: str) -> Generator[None]:
        """Count a call from its beginning to its end.

        Raises:
            LimitError: if there are too many at the same time.
            RateLimitedError: if too many began lately.
        """
        if self._calls >= self._quota.max_calls:
            error = LimitError(
                f"{caller_name} has {self._calls} calls already",
                "end some, share one client between threads, or raise max_calls_per_caller",
            )
            error.retry_seconds = 1.0
            raise error
        wait_seconds = self._requests.wait_seconds()
        if wait_seconds:
            raise _rate_limited(
                f"{caller_name} makes more than {self._quota.requests_per_second:g} requests a second",
                wait_seconds,
            )
        self._requests.take(1)
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    async def pay_for_publish(self, caller_name: str, size_bytes: int) -> None:
        """Wait until the messages before this one are paid off.

        A message larger than a second's worth passes too, and those behind it wait the longer.

        Raises:
            RateLimitedError: if that would take long; the message must not be used.
        """
        wait_seconds = self._publish_bytes.wait_seconds()
        if wait_seconds > MAX_HOLD_SECONDS:
            raise _rate_limited(
                f"{caller_name} publishes more than {self._quota.publish_bytes_per_second:g} bytes a second",
                wait_seconds,
            )
        # Taken before the wait, so that others who come meanwhile wait behind this one.
        self._publish_bytes.take(size_bytes)
        if wait_seconds:
            await asyncio.sleep(wait_seconds)


def _rate_limited(message: str, wait_seconds: float) -> RateLimitedError:
    error = RateLimitedError(
        message, f"wait {math.ceil(wait_seconds)} s, or ask whoever runs the service for a higher rate"
    )
    error.retry_seconds = wait_seconds
    return error
