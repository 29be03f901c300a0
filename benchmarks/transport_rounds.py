"""One round of the transport benchmark: each way of moving blocks once, at one block size."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import transport_roles as roles
import trustme
from transport_grpc import AT_ONCE, Pace, read_blocks, serve_blocks
from transport_processes import ServerProcess, Usage, Worker
from transport_roles import Load, Source

from lynearm.traces.config import MIB, ServeConfig

SUBSCRIBERS = 4

_SETTLE_SECONDS = 0.2
"""For a subscriber to reach the live tail, and for a process to put aside what it did before."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a row."""

    size_bytes: int
    wall_seconds: float
    cpu_seconds: float


class Rows:
    """The samples of each row, by name and block size."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, int], list[Sample]] = defaultdict(list)

    def add(self, name: str, load: Load, wall_seconds: float, cpu_seconds: float) -> None:
        self._samples[name, load.block_bytes].append(Sample(load.size_bytes, wall_seconds, cpu_seconds))

    @property
    def names(self) -> list[tuple[str, int]]:
        return list(self._samples)

    def cpu_seconds_per_gb(self, name: str, block_bytes: int) -> float:
        """The least of all rounds: other work on the machine only ever adds to it."""
        samples = self._samples[name, block_bytes]
        return min(sample.cpu_seconds / sample.size_bytes for sample in samples) * 1e9

    def median_cpu_seconds_per_gb(self, name: str, block_bytes: int) -> float:
        samples = self._samples[name, block_bytes]
        return statistics.median(sample.cpu_seconds / sample.size_bytes for sample in samples) * 1e9

    def megabytes_per_second(self, name: str, block_bytes: int) -> float:
        """Median of all rounds."""
        samples = self._samples[name, block_bytes]
        return statistics.median(sample.size_bytes / sample.wall_seconds for sample in samples) / 1e6


class Site:
    """Servers and workers on this machine. Use it as a context manager.

    Args:
        directory: Where the servers keep their data, and the bare loop its files.
        read_loads: What a round reads and copies at each block size; servers that are read from get it once.
        rows: Receives the samples.
    """

    def __init__(self, directory: Path, read_loads: Sequence[Load], rows: Rows) -> None:
        self._directory = directory
        self._groups = directory / "groups"
        self._loads = read_loads
        self._rows = rows
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start everything and publish what will be read."""
        self.publisher, *self.readers = [self._stack.enter_context(Worker()) for _ in range(1 + SUBSCRIBERS)]
        self._live = self._serve("live")
        self._live_sources = {
            load.block_bytes: Source(self._live.address, f"live-{load.block_bytes}") for load in self._loads
        }
        self._from_memory = self._serve("memory", cache_bytes=512 * MIB)
        self._from_files = self._serve("files", cache_bytes=0)
        self._grpc = self._stack.enter_context(ServerProcess(serve_blocks))
        self._root_ca, secure = _make_certificate(self._directory)
        self._secure = self._serve("secure", cache_bytes=512 * MIB, **secure)
        for worker in (self.publisher, *self.readers):
            for load in self._loads:
                worker.run(roles.warm_up, load.block_bytes)
        for load in self._loads:
            for source in (self._memory_source(load), self._file_source(load), self._secure_source(load)):
                self.publisher.run(roles.make_stream, source)
                self.publisher.run(roles.publish, source, load)
        for source in self._live_sources.values():
            self.publisher.run(roles.make_stream, source)
        self.publisher.run(roles.make_groups, self._groups)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop everything."""
        self._stack.close()

    def run_round(self, load: Load, *, publish_load: Load, with_tls: bool) -> None:
        """Each row once.

        Args:
            load: What is read and copied; one of those given at the start.
            publish_load: What is published, in blocks of the same size.
            with_tls: Fetch over TLS too.
        """
        self._copy(load)
        self._read("fetch", self._from_memory, roles.fetch, self._memory_source(load), load)
        if with_tls:
            self._read("fetch over TLS", self._secure, roles.fetch, self._secure_source(load), load)
        self._read_grpc("gRPC alone", load, AT_ONCE)
        self._commit_groups(publish_load)
        self._publish(publish_load)
        tail_seconds = self._follow(publish_load)
        self._follow_grpc(load, publish_load, _pace_of(publish_load, tail_seconds))
        self._read("replay from files", self._from_files, roles.subscribe, self._file_source(load), load)
        self._read("replay from memory", self._from_memory, roles.subscribe, self._memory_source(load), load)
        self._fan_out("server, one subscriber", self.readers[:1], load)
        self._fan_out("server, four subscribers", self.readers, load)

    def _serve(self, name: str, **options: object) -> ServerProcess:
        config = ServeConfig(data_dir=self._directory / name, port=0, **options)  # type: ignore[arg-type]
        return self._stack.enter_context(ServerProcess(config))

    def _memory_source(self, load: Load) -> Source:
        return Source(self._from_memory.address, f"read-{load.block_bytes}")

    def _file_source(self, load: Load) -> Source:
        return Source(self._from_files.address, f"read-{load.block_bytes}")

    def _secure_source(self, load: Load) -> Source:
        return Source(self._secure.address, f"read-{load.block_bytes}", self._root_ca)

    def _copy(self, load: Load) -> None:
        reader = self.readers[0]
        port = reader.run(roles.listen).result
        reader.begin(roles.receive_copy, load.block_bytes)
        sent = self.publisher.run(roles.send_copy, port, load)
        received = reader.wait()
        self._rows.add("TCP copy", load, sent.wall_seconds, sent.cpu_seconds + received.cpu_seconds)

    def _read(
        self, name: str, server: ServerProcess, role: Callable[..., None], source: Source, load: Load
    ) -> None:
        before = server.cpu_seconds()
        used = self.readers[0].run(role, source, load.count)
        cpu_seconds = used.cpu_seconds + server.cpu_seconds() - before
        self._rows.add(name, load, used.wall_seconds, cpu_seconds)

    def _read_grpc(self, name: str, load: Load, pace: Pace) -> None:
        before = self._grpc.cpu_seconds()
        used = self.readers[0].run(read_blocks, self._grpc.address, load, pace)
        cpu_seconds = used.cpu_seconds + self._grpc.cpu_seconds() - before
        self._rows.add(name, load, used.wall_seconds, cpu_seconds)

    def _follow_grpc(self, load: Load, publish_load: Load, pace: Pace) -> None:
        """As the live tail comes, with the same neighbours, and from a server that has nothing else to do."""
        source = self._live_sources[load.block_bytes]
        self.publisher.begin(roles.publish, source, publish_load)
        self._read_grpc("gRPC alone, as the live tail", load, pace)
        self.publisher.wait()
        self.publisher.run(roles.give_up_blocks, source)

    def _publish(self, load: Load) -> None:
        source = self._live_sources[load.block_bytes]
        before = self._live.cpu_seconds()
        used = self.publisher.run(roles.publish, source, load)
        server_seconds = self._live.cpu_seconds() - before
        self._rows.add("durable publish", load, used.wall_seconds, used.cpu_seconds + server_seconds)
        self._rows.add("server, publish", load, used.wall_seconds, server_seconds)
        self.publisher.run(roles.give_up_blocks, source)

    def _follow(self, load: Load) -> float:
        """Publish again, now with a subscriber; returns the seconds until it has all."""
        source = self._live_sources[load.block_bytes]
        start = self.publisher.run(roles.next_offset, source).result
        reader = self.readers[0]
        reader.begin(roles.subscribe, source, load.count, start)
        time.sleep(_SETTLE_SECONDS)
        before = self._live.cpu_seconds()
        self.publisher.begin(roles.publish, source, load)
        followed = reader.wait()
        self.publisher.wait()
        server_seconds = self._live.cpu_seconds() - before
        wall_seconds = followed.wall_seconds - _SETTLE_SECONDS
        self._rows.add("server, publish and live tail", load, wall_seconds, server_seconds)
        self._rows.add("reader, live tail", load, wall_seconds, followed.cpu_seconds)
        self.publisher.run(roles.give_up_blocks, source)
        return wall_seconds

    def _fan_out(self, name: str, readers: Sequence[Worker], load: Load) -> None:
        before = self._from_memory.cpu_seconds()
        for reader in readers:
            reader.begin(roles.subscribe, self._memory_source(load), load.count)
        used: list[Usage] = [reader.wait() for reader in readers]
        sent = Load(load.block_bytes, load.count * len(readers))
        cpu_seconds = self._from_memory.cpu_seconds() - before
        self._rows.add(name, sent, max(usage.wall_seconds for usage in used), cpu_seconds)

    def _commit_groups(self, load: Load) -> None:
        used = self.publisher.run(roles.commit_groups, self._groups, load, ServeConfig().group_bytes)
        self._rows.add("bare group commit", load, used.wall_seconds, used.cpu_seconds)
        self.publisher.run(roles.give_up_groups, self._groups)


def _pace_of(load: Load, wall_seconds: float) -> Pace:
    """A group at once, as commits come, and the time of the whole load for as many bytes."""
    burst = max(1, ServeConfig().group_bytes // load.block_bytes)
    return Pace(burst, wall_seconds * burst / load.count)


def _make_certificate(directory: Path) -> tuple[Path, dict[str, Path]]:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    root_ca, cert, key = (directory / name for name in ("ca.pem", "cert.pem", "key.pem"))
    root_ca.write_bytes(authority.cert_pem.bytes())
    cert.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return root_ca, {"tls_cert": cert, "tls_key": key}
