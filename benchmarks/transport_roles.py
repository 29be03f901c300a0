"""What the workers of the transport benchmark do: copy over TCP, publish, read, write groups without us."""

from __future__ import annotations

import os
import secrets
import socket
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from lynearm.client import Credentials, Retention, TlsConfig, TraceClient
from lynearm.wire.blocks import BlockHeader, checksum, join_block
from lynearm.wire.specs import CodecMode, CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec

VOCAB_SIZE = 1 << 16

_DISTINCT_BLOCKS = 16
"""Enough that neither cache nor disk meets the same bytes at once, and few enough to be made quickly."""


_GROUPS = "groups.sqlite3"


@dataclass(frozen=True, slots=True)
class Load:
    """What a row moves: `count` blocks of random bytes, which nothing on the way can compress."""

    block_bytes: int
    count: int

    @property
    def size_bytes(self) -> int:
        return self.block_bytes * self.count

    def blocks(self) -> Iterator[bytes]:
        distinct = _distinct_blocks(self.block_bytes)
        return (distinct[number % len(distinct)] for number in range(self.count))


@dataclass(frozen=True, slots=True)
class Source:
    """A stream at a server."""

    address: str
    stream: str
    root_ca: Path | None = None
    """Of the server's certificate; None without TLS."""

    @property
    def client(self) -> TraceClient:
        """One for each server and process, whose channel stays open."""
        return _client(self.address, self.root_ca)


def make_stream(source: Source, mode: CodecMode = "standard") -> None:
    """Create it."""
    spec = StreamSpec(
        name=source.stream,
        teacher=TeacherSpec("benchmark", "sha256:00", "none", "float32", VOCAB_SIZE, 4096),
        tokenizer=TokenizerSpec("benchmark", bytes(32), b"", VOCAB_SIZE, (0,)),
        codec=CodecSpec(mode, 64),
        license="Apache-2.0",
    )
    source.client.create_stream(spec)


def next_offset(source: Source) -> int:
    """Of the stream."""
    return source.client.get_stream(source.stream).next_offset


def give_up_blocks(source: Source) -> None:
    """Let the server delete what the stream holds on the disk, as the bare loop deletes its files."""
    source.client.set_retention(source.stream, Retention(max_bytes=1))
    source.client.collect_garbage()


def publish(source: Source, load: Load) -> None:
    """Publish, until everything is durable."""
    with source.client.publisher(source.stream, "benchmark") as publisher:
        for block in load.blocks():
            publisher.publish(block)


def subscribe(source: Source, count: int, start: int = 0) -> None:
    """Follow a stream for so many blocks."""
    with source.client.subscribe(source.stream, start=start) as subscription:
        for received in subscription:
            if received.offset == start + count - 1:
                return


def fetch(source: Source, count: int) -> None:
    """Fetch a range of blocks."""
    received = sum(1 for _ in source.client.fetch(source.stream, 0, count))
    if received != count:
        raise ValueError(f"{received} of {count} blocks came")


def listen() -> int:
    """Open a port for `receive_copy`."""
    _listeners.append(socket.create_server(("127.0.0.1", 0)))
    port: int = _listeners[-1].getsockname()[1]
    return port


def receive_copy(block_bytes: int) -> None:
    """Take what one connection sends, into one buffer of a block's size: nothing moves bytes for less."""
    listener = _listeners.pop()
    connection, _ = listener.accept()
    buffer = memoryview(bytearray(block_bytes))
    with listener, connection:
        while connection.recv_into(buffer):
            pass
        connection.sendall(b"done")


def send_copy(port: int, load: Load) -> None:
    """Send blocks to `receive_copy`."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for block in load.blocks():
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(4)


def make_groups(directory: Path) -> None:
    """Make ready for `commit_groups`."""
    directory.mkdir()
    _open_groups(directory).execute("CREATE TABLE groups (name TEXT PRIMARY KEY, size INTEGER)")


def commit_groups(directory: Path, load: Load, group_bytes: int) -> None:
    """The bare loop: for each group a file of its own, synced with its name, and a synced row in SQLite."""
    database = _open_groups(directory)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    for group in _groups(load, group_bytes):
        name = secrets.token_hex(16)
        file = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        size_bytes = os.writev(file, group)
        os.fdatasync(file)
        os.close(file)
        os.fsync(folder)
        database.execute("INSERT INTO groups VALUES (?, ?)", (name, size_bytes))
    os.close(folder)


def give_up_groups(directory: Path) -> None:
    """Delete the files of the bare loop, which goes on with its database."""
    for path in directory.iterdir():
        if not path.name.startswith(_GROUPS):
            path.unlink()
    # Or the next that syncs has to wait for the disk to let go of them.
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(folder)
    os.close(folder)


def warm_up(block_bytes: int) -> None:
    """Make the blocks, which is no part of any row."""
    _distinct_blocks(block_bytes)


_listeners: list[socket.socket] = []


@cache
def _open_groups(directory: Path) -> sqlite3.Connection:
    database = sqlite3.connect(directory / _GROUPS, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    return database


@cache
def _client(address: str, root_ca: Path | None) -> TraceClient:
    tls = None if root_ca is None else TlsConfig(root_ca=root_ca)
    return TraceClient(address, timeout_seconds=60, credentials=Credentials(tls=tls))


@cache
def _distinct_blocks(block_bytes: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    blocks: list[bytes] = []
    for _ in range(_DISTINCT_BLOCKS):
        payload = rng.bytes(block_bytes - 64)
        header = BlockHeader(2, "standard", 1, 100, 3000, 4 * block_bytes, checksum(payload))
        blocks.append(join_block(header, payload))
    return blocks


def _groups(load: Load, group_bytes: int) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    for block in load.blocks():
        group.append(block)
        if sum(map(len, group)) >= group_bytes:
            yield group
            group = []
    if group:
        yield group
