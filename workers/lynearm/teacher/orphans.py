"""Ends a process whose parent has ended.

Ray's workers end with their raylet when they find its process gone. Where nobody has collected what is left
of it yet, as in a container whose first process collects nothing, they do not: such a worker would hold its
leases, and renew them, while its driver takes it for dead.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import NoReturn

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


def end_with_parent() -> None:
    """From now on, end this process at once when the process that started it has ended.

    Nothing is said to anybody and nothing flushed, as at a SIGKILL: what was leased falls to others.
    """
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), name="watch-parent", daemon=True).start()


def _watch(parent: int) -> NoReturn:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    logger.error("process %d, which started this one, has ended: ending too", parent)
    os._exit(1)
