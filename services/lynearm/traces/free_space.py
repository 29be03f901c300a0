"""Refuses writes while a disk still has room, so that it never gets full.

What is kept free is for the catalog, whose log needs room to grow while it shrinks something else: deleting
streams, storing cursors and answering readers go on when blocks are refused.
"""

from __future__ import annotations

import os
from pathlib import Path

from lynearm.wire.errors import StorageFullError

_MIB = 1 << 20


class FreeSpace:
    """The watermark of one file system.

    Args:
        path: A directory on it.
        min_free_bytes: What writes must leave free; 0 lets them have all.
    """

    def __init__(self, path: Path, min_free_bytes: int) -> None:
        self._path = path
        self._min_free_bytes = min_free_bytes

    def check(self, size_bytes: int) -> None:
        """Let pass a write of so many bytes. Asks the file system, which takes a microsecond.

        Raises:
            StorageFullError: it would leave too little.
            OSError: the file system does not answer.
        """
        if not self._min_free_bytes:
            return
        status = os.statvfs(self._path)
        free_bytes = status.f_bavail * status.f_frsize
        if free_bytes - size_bytes < self._min_free_bytes:
            raise StorageFullError(
                f"{self._path} has {free_bytes / _MIB:.0f} MiB left, of which "
                f"{self._min_free_bytes / _MIB:.0f} MiB are kept free",
                "free space or delete streams, then publish again; reading goes on meanwhile",
            )
