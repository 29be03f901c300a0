"""Where the bytes of blocks are kept: immutable objects, each the blocks of one group.

Invariants:

- An object is durable when `write` returns, and never changes afterwards.
- An object means nothing until the catalog has rows that point into it; without rows it is garbage.
- Object keys are made here, never from what a caller sent.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import math
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol, TypeVar

from lynearm.traces import failpoints
from lynearm.traces.direct_writes import DirectWriter
from lynearm.traces.free_space import FreeSpace
from lynearm.wire.errors import StorageError, StorageFullError

WRITE_THREADS = 3
"""Some gather and write groups while others wait for the disk to sync theirs; more gain nothing."""

READ_THREADS = 2
"""Reads come from the page cache or an SSD; more threads only queue for the interpreter lock."""

_SUBDIRECTORIES = tuple(f"{number:02x}" for number in range(256))
_SUBDIRECTORIES_PER_LISTING = 16
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Span:
    """A range of bytes in an object."""

    position: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A group of blocks, durable."""

    key: str
    spans: tuple[Span, ...]
    """Where each block lies, in the order given."""


class BlockStore(Protocol):
    """Immutable objects that hold blocks.

    A store that is reached over a network raises StoreUnavailableError where it cannot be.
    """

    @property
    def where(self) -> str:
        """The store, for people; holds no secret."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether servers on other machines reach it too."""
        ...

    async def write(self, blocks: Sequence[bytes | memoryview]) -> StoredObject:
        """Keep blocks as one object; durable on return. Some may be under way at the same time.

        Raises:
            StorageFullError: there is no room; nothing is kept.
            StorageError: anything else; what was written is abandoned, and the object does not exist.
        """
        ...

    async def read(self, key: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span; shorter than asked where the object ends before, or cannot be read.

        Raises:
            StorageError: the object is missing or cannot be read.
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove an object; success when there is none."""
        ...

    def list_keys(self, min_age_seconds: float = 0) -> AsyncIterator[list[str]]:
        """Every object that was written so long ago, in batches.

        Raises:
            StorageError: they cannot be listed.
        """
        ...

    async def identity(self) -> str:
        """What tells this store from every other one; made at the first call, and kept in the store.

        Raises:
            StorageError: it cannot be read or made.
        """
        ...

    async def close(self) -> None:
        """Wait for operations under way, then release threads and connections."""
        ...


class LocalBlockStore:
    """A `BlockStore` in a local directory: one file per object, in 256 subdirectories.

    A new file under a unique name needs no rename, since only the catalog's commit makes it visible. File
    and directory are synced before `write` returns. A sync that fails is never retried: the kernel may have
    dropped the dirty pages, and a second sync would then report success for lost bytes.

    Args:
        root: The directory, created when missing; its parent exists.
        space: Says whether there is room for an object.

    Raises:
        StorageError: the directory cannot be used.
    """

    is_shared = False

    def __init__(self, root: Path, space: FreeSpace | None = None) -> None:
        self.where = str(root)
        self._root = root
        self._space = space
        self._writers = ThreadPoolExecutor(WRITE_THREADS, "block-writer")
        self._idle_files: SimpleQueue[DirectWriter] = SimpleQueue()
        """One for each of these threads."""
        for _ in range(WRITE_THREADS):
            self._idle_files.put(DirectWriter())
        self._readers = ThreadPoolExecutor(READ_THREADS, "block-reader")
        try:
            _make_directories(root)
        except OSError as error:
            raise _storage_error(error, root) from error

    async def write(self, blocks: Sequence[bytes | memoryview]) -> StoredObject:
        """See `BlockStore.write`."""
        return await self._run(self._writers, lambda: self._write(blocks))

    async def read(self, key: str, spans: Sequence[Span]) -> list[bytes]:
        """See `BlockStore.read`."""
        return await self._run(self._readers, lambda: self._read(key, spans))

    async def delete(self, key: str) -> None:
        """See `BlockStore.delete`."""
        await self._run(self._readers, lambda: self._path(key).unlink(missing_ok=True))

    async def list_keys(self, min_age_seconds: float = 0) -> AsyncIterator[list[str]]:
        """See `BlockStore.list_keys`."""
        latest = time.time() - min_age_seconds if min_age_seconds else math.inf
        for start in range(0, len(_SUBDIRECTORIES), _SUBDIRECTORIES_PER_LISTING):
            names = _SUBDIRECTORIES[start : start + _SUBDIRECTORIES_PER_LISTING]
            yield await self._run(self._readers, partial(self._list_keys, names, latest))

    async def identity(self) -> str:
        """See `BlockStore.identity`."""
        return await self._run(self._readers, self._identity)

    async def close(self) -> None:
        """See `BlockStore.close`."""
        for executor in (self._writers, self._readers):
            await asyncio.to_thread(executor.shutdown)

    async def _run(self, executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, work)
        except OSError as error:
            raise _storage_error(error, self._root) from error

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / key

    def _write(self, blocks: Sequence[bytes | memoryview]) -> StoredObject:
        files = self._idle_files.get()
        try:
            return self._write_object(files, blocks)
        finally:
            self._idle_files.put(files)

    def _write_object(self, files: DirectWriter, blocks: Sequence[bytes | memoryview]) -> StoredObject:
        key = secrets.token_hex(16)
        path = self._path(key)
        failpoints.reach("store.before_write")
        size_bytes = sum(map(len, blocks))
        if self._space is not None:
            self._space.check(size_bytes)
        descriptor = files.create(path, size_bytes)
        try:
            files.write(descriptor, blocks)
            failpoints.reach("store.before_sync")
            _sync_file(descriptor)
        except OSError as error:
            # Room comes back at once; whatever else went wrong, the start-up sweep takes the file.
            if error.errno in _FULL:
                with suppress(OSError):
                    path.unlink()
            raise
        finally:
            os.close(descriptor)
        sync_directory(path.parent)
        failpoints.reach("store.after_write")
        return StoredObject(key, spans_of(blocks))

    def _list_keys(self, subdirectories: Sequence[str], latest: float) -> list[str]:
        return [
            entry.name
            for name in subdirectories
            for entry in os.scandir(self._root / name)
            if latest == math.inf or _modified(entry) <= latest
        ]

    def _identity(self) -> str:
        path = self._root / "identity"
        if not path.exists():
            made = self._root / f"identity.{secrets.token_hex(8)}"
            with made.open("x") as file:
                file.write(new_identity())
                file.flush()
                _sync_file(file.fileno())
            # A link appears whole, and only once: of two servers that begin here, one wins.
            with suppress(FileExistsError):
                os.link(made, path)
            made.unlink()
        # At every start: whoever made it may have died before this, and the catalog is about to name it.
        with path.open("rb") as file:
            _sync_file(file.fileno())
        sync_directory(self._root)
        return path.read_text()

    def _read(self, key: str, spans: Sequence[Span]) -> list[bytes]:
        descriptor = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return [_read_span(descriptor, span) for span in spans]
        finally:
            os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Raises:
        OSError: the directory cannot be synced.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directories(root: Path) -> None:
    root.mkdir(exist_ok=True)
    for name in _SUBDIRECTORIES:
        (root / name).mkdir(exist_ok=True)
    # Even where nothing is new: a server that was killed here may have left the names unsynced.
    sync_directory(root)
    sync_directory(root.parent)


def new_identity() -> str:
    """An identity for a store that has none."""
    return secrets.token_hex(16)


def spans_of(blocks: Sequence[bytes | memoryview]) -> tuple[Span, ...]:
    """Where each block lies when they follow each other."""
    spans: list[Span] = []
    position = 0
    for block in blocks:
        spans.append(Span(position, len(block)))
        position += len(block)
    return tuple(spans)


def _modified(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return math.inf  # deleted meanwhile


def _read_span(descriptor: int, span: Span) -> bytes:
    try:
        failpoints.reach("store.before_read")
        return os.pread(descriptor, span.length, span.position)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        # A bad sector: this block is lost, and no other needs to be.
        return b""


def _sync_file(descriptor: int) -> None:
    if sys.platform == "darwin":
        # fsync on macOS leaves the bytes in the drive's cache.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)


def _storage_error(error: OSError, root: Path) -> StorageFullError | StorageError:
    if isinstance(error, StorageFullError | StorageError):
        return error
    if error.errno in _FULL:
        return StorageFullError(
            f"no room left in the block store {root} ({error.strerror})",
            "free space or delete streams, then publish again",
        )
    return StorageError(f"block store {root}: {error}", "look at the server's disk and log")
