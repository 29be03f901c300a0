"""What survives when a server is killed, starved of disk, or finds its files damaged."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from traces.harness import (
    Producer,
    Reader,
    RunningServer,
    ServerProcess,
    StartServer,
    code,
    create,
    details,
    error_name,
    fetch,
    make_block,
    publish,
    remedy,
)
from traces.storages import StoredObjects, on_local_disk

from lynearm.traces.config import ServeConfig
from lynearm.v1 import trace_service_pb2 as pb


def test_a_killed_server_replays_every_acknowledged_block_and_takes_the_rest_again(tmp_path: Path) -> None:
    acked: dict[int, int] = {}
    with ServerProcess(tmp_path / "data") as server:
        create(server.stub)
        producer = Producer(server.stub)
        killer = threading.Timer(0.3, server.process.kill)
        sequence = 0
        try:
            while True:
                for _ in range(20):
                    sequence += 1
                    producer.send(sequence, make_block(sequence, 50_000), [f"prompt-{sequence}"])
                acked.update(producer.acks(1))
                if not killer.is_alive():
                    killer.start()
        except (grpc.RpcError, StopIteration, RuntimeError):
            pass
        killer.join()
    assert acked
    with ServerProcess(tmp_path / "data") as server:
        kept = dict(fetch(server.stub, 0, 100_000))
        assert set(acked.values()) <= set(kept)
        again = Producer(server.stub, epoch=producer.epoch)
        assert again.next_sequence == len(kept) + 1
        for number in range(1, sequence + 1):
            again.send(number, make_block(number, 50_000), [f"prompt-{number}"])
        offsets = again.close()
        assert offsets == {number: number - 1 for number in range(1, sequence + 1)}
        assert acked.items() <= offsets.items()
        blocks = Reader(server.stub, follow=False).rest()
        assert blocks == [make_block(number, 50_000) for number in range(1, sequence + 1)]
        pages = server.stub.ListFinishedPrompts(pb.ListFinishedPromptsRequest(stream="s"))
        prompts = [prompt_id for page in pages for prompt_id in page.prompt_ids]
        assert prompts == [f"prompt-{number}" for number in range(1, sequence + 1)]


@pytest.fixture
def starved(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that can write no file beyond 1 MiB: what a full disk does, without filling one."""
    with ServerProcess(tmp_path / "data", file_size_limit=1 << 20) as server:
        create(server.stub)
        yield server


def test_a_full_disk_is_said_and_nothing_of_the_block_is_kept(starved: ServerProcess, tmp_path: Path) -> None:
    producer = Producer(starved.stub)
    producer.send(1, make_block(1), ["a"])
    assert producer.acks(1) == {1: 0}
    producer.send(2, make_block(2, 2 << 20), ["b"])
    error = producer.error()
    assert (code(error), error_name(error)) == ("RESOURCE_EXHAUSTED", "StorageFullError")
    assert "free space" in remedy(error)
    assert len(StoredObjects(ServeConfig(tmp_path / "data")).read()) == 1
    again = Producer(starved.stub, epoch=producer.epoch)
    assert again.next_sequence == 2
    again.send(2, make_block(2), ["b"])
    assert again.close() == {2: 1}
    assert list(fetch(starved.stub, 0, 9)) == [(0, make_block(1)), (1, make_block(2))]


@on_local_disk
def test_objects_that_were_never_committed_are_swept_at_the_start(
    server: RunningServer, start_server: StartServer
) -> None:
    create(server.stub)
    publish(server.stub, range(3))
    server.stop()
    objects = StoredObjects(server.config)
    committed = objects.read()
    for key in ("00" * 16, "ff" * 16):
        objects.write(key, b"half a group")
    stub = start_server().stub
    assert objects.read() == committed
    assert len(list(fetch(stub, 0, 9))) == 3


def test_a_damaged_block_is_named_and_the_others_stay_readable(
    server: RunningServer, start_server: StartServer
) -> None:
    create(server.stub)
    for number in range(3):
        publish(server.stub, [number], producer_id=f"p{number}")
    server.stop()
    objects = StoredObjects(server.config)
    for key, data in objects.read().items():
        if data == make_block(1):
            objects.write(key, data[:-1] + b"x")
    reader = Reader(start_server().stub)
    assert reader.next().block.SerializeToString() == make_block(0)
    error = reader.error()
    assert (code(error), error_name(error)) == ("DATA_LOSS", "CorruptBlockError")
    assert "block 1 of stream 's'" in details(error)
    assert "continue from offset 2" in remedy(error)


def test_an_object_that_is_missing_is_said(server: RunningServer, start_server: StartServer) -> None:
    create(server.stub)
    publish(server.stub, [1])
    server.stop()
    objects = StoredObjects(server.config)
    for key in objects.read():
        objects.delete(key)
    with pytest.raises(grpc.RpcError) as caught:
        list(fetch(start_server().stub, 0, 1))
    assert (code(caught.value), error_name(caught.value)) == ("INTERNAL", "StorageError")
