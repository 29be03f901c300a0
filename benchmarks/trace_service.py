"""Throughput and CPU cost of publish and subscribe against a plain copy over loopback, in one run.

    python benchmarks/trace_service.py [--mebibytes 256] [--block-kibibytes 256]

A server process and this client process share the machine; CPU-seconds are those of both ends together.
Blocks are random bytes. Publishing is durable: every acknowledgement follows a sync of data and index.
Rows: a loopback TCP copy between two processes; publish; publish with a follower on the live tail; replay
from the server's memory; replay from its files. Wall times are as noisy as the machine: trust ratios and
CPU-seconds. Linux only.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lynearm.client import TraceClient
from lynearm.wire.blocks import BlockHeader, checksum, join_block
from lynearm.wire.specs import CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec

_SERVER = """
import sys
from pathlib import Path
from lynearm.traces.config import ServeConfig
from lynearm.traces.server import run_server
config = ServeConfig(data_dir=Path(sys.argv[1]), port=0, cache_bytes=int(sys.argv[2]))
run_server(config, lambda address: print(address, flush=True))
"""

_SINK = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
buffer = bytearray(1 << 20)
while connection.recv_into(buffer): pass
connection.sendall(b"done")
sys.stdin.read()
"""

_DISTINCT_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class Load:
    """What each row moves: `count` blocks, the distinct ones in turn."""

    distinct: list[bytes]
    count: int

    def block(self, number: int) -> bytes:
        return self.distinct[number % len(self.distinct)]

    @property
    def size_bytes(self) -> int:
        return sum(len(self.block(number)) for number in range(self.count))


class Peer:
    """A process at the other end, whose CPU time counts."""

    def __init__(self, code: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline().strip()

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=256)
    parser.add_argument("--block-kibibytes", type=int, default=256)
    options = parser.parse_args()
    load = make_load(options.mebibytes << 20, options.block_kibibytes << 10)
    print(f"{load.count} blocks of {options.block_kibibytes} KiB; {os.cpu_count()} cores")
    print(f"{'':32}{'MB/s':>8}{'CPU-s/GB':>10}{'of copy':>9}")
    with tempfile.TemporaryDirectory() as directory:
        copy_rate = measure_copy(load)
        measure_service(load, Path(directory), cache_bytes=2 * load.size_bytes, copy_rate=copy_rate)
        measure_service(load, Path(directory), cache_bytes=0, copy_rate=copy_rate, replay_only=True)


def make_load(size_bytes: int, block_bytes: int) -> Load:
    distinct: list[bytes] = []
    for _ in range(_DISTINCT_BLOCKS):
        payload = secrets.token_bytes(block_bytes)
        header = BlockHeader(1, "standard", 1, 100, 3000, 4 * block_bytes, checksum(payload))
        distinct.append(join_block(header, payload))
    return Load(distinct, max(1, size_bytes // block_bytes))


def measure_copy(load: Load) -> float:
    peer = Peer(_SINK)

    def copy() -> None:
        with socket.create_connection(("127.0.0.1", int(peer.said))) as connection:
            for number in range(load.count):
                connection.sendall(load.block(number))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(4)

    rate = measure("loopback copy", load, peer, copy)
    peer.stop()
    return rate


def measure_service(
    load: Load, data_dir: Path, *, cache_bytes: int, copy_rate: float, replay_only: bool = False
) -> None:
    peer = Peer(_SERVER, str(data_dir), str(cache_bytes))
    with TraceClient(peer.said) as client:
        if replay_only:
            measure("replay from files", load, peer, lambda: replay(client, load, "plain"), copy_rate)
        else:
            for name in ("plain", "live"):
                client.create_stream(make_spec(name))
            measure("publish", load, peer, lambda: publish(client, load, "plain"), copy_rate)
            measure("replay from memory", load, peer, lambda: replay(client, load, "plain"), copy_rate)
            measure("publish and follow", load, peer, lambda: relay(client, load, "live"), copy_rate)
    peer.stop()


def publish(client: TraceClient, load: Load, stream: str) -> None:
    with client.publisher(stream, "benchmark") as publisher:
        for number in range(load.count):
            publisher.publish(load.block(number))


def replay(client: TraceClient, load: Load, stream: str) -> None:
    with client.subscribe(stream) as subscription:
        for received in subscription:
            if received.offset == load.count - 1:
                return


def relay(client: TraceClient, load: Load, stream: str) -> None:
    follower = threading.Thread(target=replay, args=(client, load, stream))
    follower.start()
    publish(client, load, stream)
    follower.join()


def measure(
    name: str, load: Load, peer: Peer, work: Callable[[], None], copy_rate: float | None = None
) -> float:
    """Runs `work`, prints a row, and returns its rate in MB/s."""
    wall, cpu = time.perf_counter(), time.process_time() + peer.cpu_seconds()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() + peer.cpu_seconds() - cpu
    rate = load.size_bytes / wall / 1e6
    share = f"{rate / copy_rate:9.0%}" if copy_rate else ""
    print(f"{name:32}{rate:8.0f}{cpu / load.size_bytes * 1e9:10.2f}{share}", flush=True)
    return rate


def make_spec(name: str) -> StreamSpec:
    return StreamSpec(
        name=name,
        teacher=TeacherSpec("benchmark", "sha256:00", "none", "float32", 1 << 16, 4096),
        tokenizer=TokenizerSpec("benchmark", bytes(32), b"", 1 << 16, (0,)),
        codec=CodecSpec("standard", 64),
        license="Apache-2.0",
    )


if __name__ == "__main__":
    main()
