"""A disk that is nearly full, full, limited, or that fails to sync."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from models.server_process import Server, ServerEnded, object_files, publish_singly, read_all
from traces.harness import make_block, make_spec

from lynearm.client import TraceClient
from lynearm.traces.failpoints import NAMES
from lynearm.wire.errors import InternalError, LynearmError, StorageError, StorageFullError

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def publish_until_refused(client: TraceClient, stream: str = "s", *, size_bytes: int = 200_000) -> int:
    """Publish blocks one after the other until one is refused; how many were acknowledged."""
    client.create_stream(make_spec(stream), allow_existing=True)
    publisher = client.publisher(stream, "filler")

    def fill() -> None:
        for number in range(1000):
            publisher.publish(make_block(number, size_bytes))
            publisher.flush()

    with pytest.raises(StorageFullError) as caught:
        fill()
    assert "free space" in caught.value.remedy
    with contextlib.suppress(LynearmError):
        publisher.close()
    return publisher.acked_blocks


def free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def test_writes_are_refused_before_the_disk_is_full_and_reads_go_on(small_disk: Path) -> None:
    with (
        Server(small_disk / "data", min_free_bytes=6 * MIB, cache_bytes=0) as server,
        TraceClient(server.target, patience_seconds=0.3) as client,
    ):
        count = publish_until_refused(client)
        assert count > 20
        assert 5 * MIB < free_bytes(small_disk) < 7 * MIB
        assert read_all(client) == [make_block(number, 200_000) for number in range(count)]
        # Neither small blocks nor dictionaries get around it; what needs little goes on.
        with pytest.raises(StorageFullError, match=r"MiB are kept free"):
            client.put_dictionary("s", bytes(1 << 20))
        client.create_stream(make_spec("other"))
        client.delete_stream("s")
        assert publish_until_refused(client, "other") >= count // 2


def test_a_publisher_waits_out_a_disk_without_room(tmp_path: Path) -> None:
    room = tmp_path / "free"
    room.write_text("0")
    # The file system is real, only what it says about itself is not.
    prelude = (
        "import os, types\n"
        f"os.statvfs = lambda _: types.SimpleNamespace(f_bavail=int(open({str(room)!r}).read()), f_frsize=1)"
    )
    with (
        Server(tmp_path / "data", prelude=prelude, min_free_bytes=MIB) as server,
        TraceClient(server.target) as client,
    ):
        client.create_stream(make_spec())
        with client.publisher("s", "p") as publisher:
            publisher.publish(make_block(1))
            while "kept free" not in publisher.waiting_reason:
                assert publisher.acked_blocks == 0
            assert object_files(tmp_path / "data") == []
            room.write_text(str(2 * MIB))
            publisher.flush(timeout_seconds=60)
        assert read_all(client) == [make_block(1)]


def test_a_refusal_for_want_of_room_says_when_to_try_again(small_disk: Path) -> None:
    pytest.importorskip("lynearm.wire.status", reason="errors do not carry google.rpc.Status here")
    with (
        Server(small_disk / "data", min_free_bytes=1 << 40) as server,
        TraceClient(server.target, patience_seconds=0) as client,
    ):
        client.create_stream(make_spec())
        with pytest.raises(StorageFullError) as caught:
            client.put_dictionary("s", b"dictionary")
        assert getattr(caught.value, "retry_seconds", None) == 5.0


def test_a_disk_that_is_full_to_the_last_byte_loses_nothing_acknowledged(small_disk: Path) -> None:
    with (
        Server(small_disk / "data", min_free_bytes=0, cache_bytes=0) as server,
        TraceClient(server.target, patience_seconds=0.3) as client,
    ):
        publish_singly(client, range(3))
        ballast = small_disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        assert free_bytes(small_disk) == 0
        count = publish_until_refused(client)
        first = [make_block(number) for number in range(3)]
        filled = [make_block(number, 200_000) for number in range(count)]
        assert read_all(client) == first + filled
        ballast.unlink()
        with client.publisher("s", "later") as publisher:
            publisher.publish(make_block(99), ["prompt-99"])
        assert read_all(client) == [*first, *filled, make_block(99)]
        assert client.finished_prompts("s") == {"prompt-0", "prompt-1", "prompt-2", "prompt-99"}


def test_a_limit_on_file_sizes_that_stops_the_catalog_loses_nothing_acknowledged(tmp_path: Path) -> None:
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))"
    acked = 0
    with (
        Server(tmp_path / "data", prelude=prelude, cache_bytes=0) as server,
        TraceClient(server.target, patience_seconds=0.3) as client,
    ):
        client.create_stream(make_spec())
        publisher = client.publisher("s", "p")

        def fill() -> None:
            for number in range(5000):
                publisher.publish(make_block(number, 100), [f"prompt {number} {'x' * 200}"])
                if number % 20 == 0:
                    publisher.flush()

        with pytest.raises((StorageError, StorageFullError)):
            fill()
        acked = publisher.acked_blocks
        assert acked > 20
        kept = read_all(client)
        assert len(kept) >= acked
    with Server(tmp_path / "data") as server, TraceClient(server.target) as client:
        assert read_all(client) == kept == [make_block(number, 100) for number in range(len(kept))]
        assert len(client.finished_prompts("s")) == len(kept)


def test_a_failed_sync_fails_its_group_and_is_not_tried_again(tmp_path: Path) -> None:
    with (
        Server(tmp_path / "data", failpoints="store.before_sync=eio@2") as server,
        TraceClient(server.target) as client,
    ):
        publish_singly(client, range(1))
        publisher = client.publisher("s", "unlucky")
        publisher.publish(make_block(1))
        with pytest.raises(StorageError, match="Input/output error"):
            publisher.flush()
        # Its file is given up: what was not synced may never reach the disk, whatever a second sync says.
        assert len(object_files(tmp_path / "data")) == 2
        assert client.get_stream("s").next_offset == 1
        publish_singly(client, range(2, 3))
        assert read_all(client) == [make_block(0), make_block(2)]
    with Server(tmp_path / "data") as server, TraceClient(server.target) as client:
        assert len(object_files(tmp_path / "data")) == 2
        assert read_all(client) == [make_block(0), make_block(2)]


def test_a_commit_that_fails_leaves_nothing_of_its_group(tmp_path: Path) -> None:
    with (
        Server(tmp_path / "data", failpoints="catalog.before_commit=eio@2") as server,
        TraceClient(server.target) as client,
    ):
        publish_singly(client, range(1))
        publisher = client.publisher("s", "unlucky")
        publisher.publish(make_block(1), ["prompt-1"])
        with pytest.raises(InternalError, match="failed to commit"):
            publisher.flush()
        publish_singly(client, range(1, 2))
        assert read_all(client) == [make_block(0), make_block(1)]
        assert client.finished_prompts("s") == {"prompt-0", "prompt-1"}
        assert "this server fails on purpose" in server.log


def test_a_failpoint_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for wrong in ("store=kill", "store.before_write=explode", "store.before_write=kill@0"):
        with pytest.raises(ServerEnded, match=NAMES[0]):
            Server(tmp_path / "data", failpoints=wrong)
