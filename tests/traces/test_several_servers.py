"""Two servers on one catalog: each takes and gives what the other does, and either may die."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    error_name,
    fetch,
    make_block,
    make_spec,
    publish,
)
from traces.jobs import Unit, create_job, finish, finished, get_job, lease, publish_work, units_of
from traces.storages import catalog_rows, on_cluster, on_shared_storage

from lynearm.traces import postgresql_listen
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.errors import PreconditionError
from lynearm.wire.protobuf import spec_to_proto


@pytest.fixture
def servers(start_server: StartServer) -> tuple[RunningServer, RunningServer]:
    """Two servers with one stream, "s"."""
    both = (start_server(), start_server())
    create(both[0].stub)
    return both


@on_shared_storage
def test_subscribers_of_one_server_follow_publishers_of_the_other(
    servers: tuple[RunningServer, RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Woken by what the database tells, then, not by looking now and then.
    monkeypatch.setattr(postgresql_listen, "POLL_SECONDS", 3600.0)
    first, second = servers
    reader = Reader(second.stub)
    producer = Producer(first.stub)
    for sequence in range(1, 11):
        producer.send(sequence, make_block(sequence))
        received = reader.next()
        assert received.offset == sequence - 1
        assert received.block.SerializeToString() == make_block(sequence)
    first.stub.SealStream(pb.SealStreamRequest(name="s"))
    assert reader.next_or_end() is None


@on_shared_storage
def test_subscribers_of_one_server_end_with_a_stream_deleted_on_the_other(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    first, second = servers
    publish(first.stub, [1])
    reader = Reader(second.stub)
    assert reader.next().offset == 0
    first.stub.DeleteStream(pb.DeleteStreamRequest(name="s"))
    assert error_name(reader.error()) == "StreamNotFoundError"


@on_shared_storage
def test_what_no_notification_told_is_found_by_looking(
    servers: tuple[RunningServer, RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_listen, "decode_change", lambda _: None)
    monkeypatch.setattr(postgresql_listen, "POLL_SECONDS", 0.1)
    first, second = servers
    reader = Reader(second.stub)
    assert reader.is_quiet()
    # As a pooler that loses notifications would have it: nothing is told.
    catalog_rows(first.config, "UPDATE streams SET sealed = true")
    assert reader.next_or_end() is None


@on_shared_storage
def test_publishers_on_both_servers_share_one_order(servers: tuple[RunningServer, RunningServer]) -> None:
    offsets: list[dict[int, int]] = [{}, {}]

    def work(index: int) -> None:
        numbers = range(1000 * index, 1000 * index + 100)
        offsets[index] = publish(servers[index].stub, numbers, producer_id=f"p{index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(offset for given in offsets for offset in given.values()) == list(range(200))
    for given in offsets:
        assert list(given) == sorted(given, key=given.__getitem__)
    everything = list(fetch(servers[0].stub, 0, 1000))
    assert everything == list(fetch(servers[1].stub, 0, 1000))
    for index, given in enumerate(offsets):
        for sequence, offset in given.items():
            assert everything[offset] == (offset, make_block(1000 * index + sequence - 1))


@on_shared_storage
def test_a_producer_that_opens_on_one_server_is_fenced_off_on_the_other(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    first, second = servers
    old = Producer(first.stub)
    new = Producer(second.stub)
    old.send(1, make_block(1))
    assert error_name(old.error()) == "ProducerFencedError"
    new.send(1, make_block(1))
    assert new.close() == {1: 0}


@on_shared_storage
def test_workers_at_both_servers_share_a_job(servers: tuple[RunningServer, RunningServer]) -> None:
    create_job(servers[0].stub, 30, samples=2)
    leased: list[list[Unit]] = [[], [], [], []]

    def work(index: int) -> None:
        mine, other = servers[index % 2].stub, servers[1 - index % 2].stub
        while (answer := lease(mine, 3, f"w{index}")).HasField("lease"):
            units = units_of(answer.lease)
            leased[index] += units
            # What one server handed out, the other one takes.
            publish_work(other, finish(answer.lease.key, units), producer_id=f"w{index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = sorted((f"p{number}", sample) for number in range(30) for sample in range(2))
    assert sorted(unit for of_worker in leased for unit in of_worker) == expected
    assert get_job(servers[0].stub).done_count == len(expected)
    assert sorted(finished(servers[1].stub)) == sorted(f"p{number}" for number in range(30))


@on_shared_storage
def test_of_two_servers_that_create_the_same_stream_one_does(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    for number in range(10):
        request = pb.CreateStreamRequest(spec=spec_to_proto(make_spec(f"new-{number}")))
        calls = [server.stub.CreateStream.future(request) for server in servers]
        ends = sorted("OK" if call.exception() is None else call.code().name for call in calls)
        assert ends == ["ALREADY_EXISTS", "OK"]


@on_shared_storage
def test_servers_that_start_at_once_make_the_tables_once(storage: dict[str, Any], tmp_path: Path) -> None:
    started: list[ServerProcess] = []
    threads = [
        threading.Thread(target=lambda: started.append(ServerProcess(tmp_path / "data", **storage)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with started[0] as first, started[1] as second:
        create(first.stub)
        assert publish(second.stub, [1]) == {1: 0}


@on_cluster
def test_a_server_whose_blocks_are_elsewhere_is_refused(
    servers: tuple[RunningServer, RunningServer], start_server: StartServer, tmp_path: Path
) -> None:
    for blocks in ("s3://blocks/elsewhere", str(tmp_path / "elsewhere")):
        with pytest.raises(PreconditionError, match=r"in another store than .*elsewhere"):
            start_server(blocks=blocks)


@on_cluster
def test_connections_that_the_database_drops_are_made_anew(
    servers: tuple[RunningServer, RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_listen, "POLL_SECONDS", 0.1)
    first, second = servers
    reader = Reader(second.stub)
    publish(first.stub, [0])
    assert reader.next().offset == 0
    drop = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
        "AND application_name = 'lynearm'"
    )
    for number in range(1, 4):
        assert catalog_rows(first.config, drop)[0][0] > 0
        publish_until_acked(first.stub, number)
        assert reader.next().offset == number


def publish_until_acked(stub: TraceServiceStub, number: int) -> None:
    """As a client does: the same block under the same sequence number, until it is acknowledged."""
    while True:
        try:
            producer = Producer(stub, epoch=1)
            producer.send(number + 1, make_block(number))
            assert producer.close() == {number + 1: number}
        except grpc.RpcError as error:
            if code(error) != "UNAVAILABLE":
                raise
        else:
            return


class RestartedServer:
    """A server process that is started again, at another address, each time that it is killed."""

    def __init__(self, data_dir: Path, storage: dict[str, Any]) -> None:
        self._data_dir, self._storage = data_dir, storage
        self.process = ServerProcess(data_dir, **storage)
        self.broken_calls = 0
        self._killed: list[ServerProcess] = []

    def kill(self) -> None:
        self.process.process.kill()
        # Its channel stays open: some thread may be about to use it.
        self._killed.append(self.process)
        self.process = ServerProcess(self._data_dir, **self._storage)

    def close(self) -> None:
        for server in (*self._killed, self.process):
            server.__exit__()

    def note_broken_call(self) -> None:
        """Count it, and leave time for the next process to start."""
        self.broken_calls += 1
        time.sleep(0.01)


@pytest.fixture
def processes(storage: dict[str, Any], tmp_path: Path) -> Iterator[tuple[RestartedServer, RestartedServer]]:
    both = (RestartedServer(tmp_path / "data", storage), RestartedServer(tmp_path / "data", storage))
    create(both[0].process.stub)
    yield both
    for server in both:
        server.close()


BLOCKS_PER_PRODUCER = 300


def publish_all(server: RestartedServer, name: str, acked: dict[int, int]) -> None:
    """Publish every block, whatever happens to the server on the way; a few are under way at any time."""
    base = 1000 * int(name[1:])
    epoch = 0
    while len(acked) < BLOCKS_PER_PRODUCER:
        try:
            producer = Producer(server.process.stub, producer_id=name, epoch=epoch)
            epoch = producer.epoch
            sequence = len(acked) + 1  # also what is committed and was never acknowledged
            while sequence <= BLOCKS_PER_PRODUCER:
                last = min(sequence + 7, BLOCKS_PER_PRODUCER)
                for number in range(sequence, last + 1):
                    producer.send(number, make_block(base + number, 20_000), [f"{name}-{number}"])
                acked.update(producer.acks(last + 1 - sequence))
                sequence = last + 1
            producer.close()
        except (grpc.RpcError, StopIteration):
            server.note_broken_call()


def read_all(server: RestartedServer, count: int, blocks: list[bytes]) -> None:
    """Read to the end, from wherever the server was killed."""
    while len(blocks) < count:
        reader = Reader(server.process.stub, start_offset=len(blocks))
        try:
            while len(blocks) < count:
                received = reader.next_or_end()
                assert received is not None
                assert received.offset == len(blocks)
                blocks.append(received.block.SerializeToString())
        except grpc.RpcError:
            server.note_broken_call()
        reader.cancel()


@on_shared_storage
def test_nothing_is_lost_doubled_or_reordered_when_servers_are_killed(
    processes: tuple[RestartedServer, RestartedServer],
) -> None:
    publishing, reading = processes
    acked: dict[str, dict[int, int]] = {"p1": {}, "p2": {}}
    blocks: list[bytes] = []
    total = BLOCKS_PER_PRODUCER * len(acked)
    threads = [
        *(threading.Thread(target=publish_all, args=(publishing, *item)) for item in acked.items()),
        threading.Thread(target=read_all, args=(reading, total, blocks)),
    ]
    for thread in threads:
        thread.start()
    for part, victim in ((0.2, publishing), (0.4, reading), (0.6, publishing), (0.8, publishing)):
        while sum(map(len, acked.values())) < part * total:
            time.sleep(0.005)
        victim.kill()
    for thread in threads:
        thread.join(120)
    assert publishing.broken_calls
    assert reading.broken_calls
    expected = {
        offset: make_block(1000 * int(name[1:]) + sequence, 20_000)
        for name, offsets in acked.items()
        for sequence, offset in offsets.items()
    }
    assert sorted(expected) == list(range(total))
    assert blocks == [expected[offset] for offset in range(total)]
    for offsets in acked.values():
        in_order = [offsets[sequence] for sequence in range(1, BLOCKS_PER_PRODUCER + 1)]
        assert in_order == sorted(in_order)
    pages = reading.process.stub.ListFinishedPrompts(pb.ListFinishedPromptsRequest(stream="s"))
    prompts = [prompt_id for page in pages for prompt_id in page.prompt_ids]
    assert sorted(prompts) == sorted(f"{name}-{number}" for name in acked for number in acked[name])
