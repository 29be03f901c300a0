"""Writes the files of a block store past the page cache.

A block that was just received is in the server's memory, from where its readers get it. A copy in the page
cache serves nobody at first, and costs more CPU time than all else that writing does: for each page, it is
made, filled and written back. Direct I/O takes half as much, and is faster on an SSD. It wants memory,
positions and sizes that are whole pages, so blocks are gathered in a buffer first, and what is left for the
file's last page goes through the cache. Reads go through the cache as ever.

Where the file system knows no direct I/O, or wants coarser pages, everything goes through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

DIRECT_BYTES = 1 << 20
"""Size from which a file is written directly. The time of a smaller one is that of the disk's answers, of
which there are fewer when its data goes with its sync."""

_BUFFER_BYTES = 4 << 20
"""Twice or half as much is as fast."""

_PAGE_BYTES = 4096
"""What SSDs and file systems are content with; those that are not refuse, and get it through the cache."""

_MAX_BUFFERS_PER_WRITE = 1024
"""IOV_MAX on Linux and macOS."""

_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""0 on macOS, which has no such flag."""


class DirectWriter:
    """Writes files, one at a time. Holds 4 MiB from the first direct one on."""

    def __init__(self) -> None:
        # Begins at a page, and takes no memory until it is written to.
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))

    def create(self, path: Path, size_bytes: int) -> int:
        """A descriptor of a new file, for `write`.

        Raises:
            OSError: it cannot be made.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        if size_bytes >= DIRECT_BYTES and _DIRECT:
            try:
                return os.open(path, flags | _DIRECT, 0o640)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            # Linux has made the file by the time it finds that the file system knows no direct I/O.
            path.unlink(missing_ok=True)
        return os.open(path, flags, 0o640)

    def write(self, descriptor: int, blocks: Sequence[bytes | memoryview]) -> None:
        """Write blocks, one behind the other, into a file that `create` made.

        Raises:
            OSError: not all was written; with ENOSPC at the end of the disk, a quota or a file's size.
        """
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT:
            self._write_directly(descriptor, blocks)
            return
        for start in range(0, len(blocks), _MAX_BUFFERS_PER_WRITE):
            part = blocks[start : start + _MAX_BUFFERS_PER_WRITE]
            _check_written(os.writev(descriptor, part), sum(map(len, part)))

    def _write_directly(self, descriptor: int, blocks: Sequence[bytes | memoryview]) -> None:
        filled = 0
        for block in blocks:
            rest = memoryview(block)
            while rest:
                taken = min(len(rest), _BUFFER_BYTES - filled)
                self._buffer[filled : filled + taken] = rest[:taken]
                rest = rest[taken:]
                filled += taken
                if filled == _BUFFER_BYTES:
                    _write_pages(descriptor, self._buffer)
                    filled = 0
        whole = filled - filled % _PAGE_BYTES
        _write_pages(descriptor, self._buffer[:whole])
        _write_cached(descriptor, self._buffer[whole:filled])


def _write_pages(descriptor: int, pages: memoryview) -> None:
    try:
        _check_written(os.write(descriptor, pages), len(pages))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # The disk wants coarser pages, or a limit leaves room for a part of one.
        _write_cached(descriptor, pages)


def _write_cached(descriptor: int, data: memoryview) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)
    _check_written(os.write(descriptor, data), len(data))


def _check_written(written: int, expected: int) -> None:
    # At a quota, a file-size limit or the end of the disk the kernel writes what fits and raises nothing.
    if written != expected:
        raise OSError(errno.ENOSPC, f"wrote {written} of {expected} bytes")
