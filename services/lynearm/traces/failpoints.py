"""Named points at which a server can be made to die or fail, for tests of what it promises.

Off unless `LYNEARM_FAILPOINTS` arms them when a server starts, which its log then says. A failpoint that is
not armed costs one look at an empty dictionary. The variable lists `NAME=ACTION` or `NAME=ACTION@N`, with
semicolons between; with `@N` only the N-th time that the point is reached counts, else every time. Actions:

- `kill`: the process ends at once, as by SIGKILL.
- `eio`, `enospc`: OSError of that kind.
- `sleep:SECONDS`: the thread waits.

`LYNEARM_FAILPOINTS="catalog.before_commit=kill@3"` ends the server in its third commit of a group.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lynearm.wire.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "LYNEARM_FAILPOINTS"
"""Environment variable that arms failpoints."""

NAMES = (
    "store.before_write",  # nothing of the object is there
    "store.before_sync",  # it is written, and in the page cache only
    "store.after_write",  # it is durable, and no row points at it
    "catalog.before_commit",  # the rows are in the transaction
    "catalog.after_commit",  # the blocks exist, and nobody has been told
    "publish.before_ack",  # an acknowledgement is about to be sent
    "store.before_read",  # a block is about to be read from its object
)
"""Every failpoint, in the order in which a block passes them."""

_ENTRY = re.compile(r"(?P<name>[a-z._]+)=(?P<action>kill|eio|enospc|sleep:[0-9.]+)(?:@(?P<hit>[1-9][0-9]*))?")


@dataclass(slots=True)
class _Failpoint:
    action: Callable[[], None]
    only_hit: int
    hits: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reach(self) -> None:
        with self.lock:
            self.hits += 1
            due = self.only_hit in (0, self.hits)
        if due:
            self.action()


_armed: dict[str, _Failpoint] = {}


def reach(name: str) -> None:
    """Do at this point what it is armed with; nothing, as a rule.

    Args:
        name: One of `NAMES`.

    Raises:
        OSError: it is armed so.
    """
    if _armed and (failpoint := _armed.get(name)) is not None:
        failpoint.reach()


def hits(name: str) -> int:
    """How often an armed failpoint was reached; 0 for one that is not armed."""
    return _armed[name].hits if name in _armed else 0


def arm(description: str) -> None:
    """Arm the failpoints of a description, and no others.

    Args:
        description: As in the environment variable; empty disarms all.

    Raises:
        ConfigError: it names something that does not exist.
    """
    armed = dict(_parse(entry.strip()) for entry in description.split(";") if entry.strip())
    _armed.clear()
    _armed.update(armed)


def arm_from_environment() -> None:
    """Arm what `LYNEARM_FAILPOINTS` says, if it says anything.

    Raises:
        ConfigError: it names something that does not exist.
    """
    description = os.environ.get(VARIABLE, "")
    if description:
        arm(description)
        logger.warning("this server fails on purpose: %s is %r", VARIABLE, description)


def _parse(entry: str) -> tuple[str, _Failpoint]:
    match = _ENTRY.fullmatch(entry)
    if match is None or match["name"] not in NAMES:
        raise ConfigError(
            f"{VARIABLE} holds {entry!r}, expected NAME=ACTION or NAME=ACTION@N",
            f"unset it; the names are {', '.join(NAMES)}",
        )
    return match["name"], _Failpoint(_action(match["action"]), int(match["hit"] or 0))


def _action(text: str) -> Callable[[], None]:
    if text == "kill":
        return lambda: os.kill(os.getpid(), signal.SIGKILL)
    if text.startswith("sleep:"):
        seconds = float(text.removeprefix("sleep:"))
        return lambda: time.sleep(seconds)
    number = {"eio": errno.EIO, "enospc": errno.ENOSPC}[text]

    def fail() -> None:
        raise OSError(number, f"{os.strerror(number)} (failpoint)")

    return fail
