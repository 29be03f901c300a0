"""Codec dictionaries through the SDK, against a real server over a socket."""

from __future__ import annotations

import socket
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from models.service_process import ServiceProcess

from lynearm.client import DictionaryCache, TraceClient
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1 import trace_service_pb2_grpc
from lynearm.wire.blocks import dictionary_digest
from lynearm.wire.errors import (
    CorruptBlockError,
    DictionaryLimitError,
    DictionaryNotFoundError,
    InvalidInputError,
    ServiceUnavailableError,
    StreamNotFoundError,
    StreamSealedError,
)
from lynearm.wire.specs import CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec

DICTIONARY = b"what a codec learned" * 1000
DIGEST = dictionary_digest(DICTIONARY)


def make_spec(name: str = "s") -> StreamSpec:
    return StreamSpec(
        name=name,
        teacher=TeacherSpec("teacher", "sha256:00", "test", "float32", 128, 512),
        tokenizer=TokenizerSpec("tok", bytes(32), b"", 128, (2,)),
        codec=CodecSpec("exact", 4),
        license="Apache-2.0",
    )


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path / "data") as process:
        yield process


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[TraceClient]:
    """A client of a service with one stream, "s"."""
    with TraceClient(service.target) as one:
        one.create_stream(make_spec())
        yield one


class LyingService(trace_service_pb2_grpc.TraceServiceServicer):
    """Answers every put with the digest of something else."""

    def PutDictionary(  # noqa: N802, the name is gRPC's
        self, request: pb.PutDictionaryRequest, context: grpc.ServicerContext
    ) -> pb.PutDictionaryResponse:
        return pb.PutDictionaryResponse(digest=dictionary_digest(request.dictionary + b"x"))


@pytest.fixture
def lying_target() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(LyingService(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_dictionary_comes_back_as_it_was_put(client: TraceClient) -> None:
    assert client.put_dictionary("s", DICTIONARY) == DIGEST
    assert client.put_dictionary("s", DICTIONARY) == DIGEST
    assert client.get_dictionary("s", DIGEST) == DICTIONARY


def test_what_the_service_refuses_is_typed(client: TraceClient) -> None:
    with pytest.raises(DictionaryNotFoundError, match="'s' holds no dictionary"):
        client.get_dictionary("s", DIGEST)
    with pytest.raises(InvalidInputError, match="digest of 3 bytes"):
        client.get_dictionary("s", b"abc")
    for number in range(64):
        client.put_dictionary("s", bytes([number]))
    with pytest.raises(DictionaryLimitError, match="at most 64"):
        client.put_dictionary("s", DICTIONARY)
    client.create_stream(make_spec("sealed"))
    client.seal_stream("sealed")
    with pytest.raises(StreamSealedError):
        client.put_dictionary("sealed", DICTIONARY)
    for call in (
        lambda: client.put_dictionary("nope", DICTIONARY),
        lambda: client.get_dictionary("nope", DIGEST),
    ):
        with pytest.raises(StreamNotFoundError, match="'nope'"):
            call()


def test_a_dictionary_has_at_most_three_mebibytes(client: TraceClient) -> None:
    largest = bytes(3 << 20)
    assert client.get_dictionary("s", client.put_dictionary("s", largest)) == largest
    for refused in (b"", largest + b"x", bytes(5 << 20)):
        with pytest.raises(InvalidInputError, match=f"dictionary of {len(refused)} bytes"):
            client.put_dictionary("s", refused)


def test_a_dictionary_survives_the_service(service: ServiceProcess, client: TraceClient) -> None:
    client.put_dictionary("s", DICTIONARY)
    service.kill()
    with pytest.raises(ServiceUnavailableError, match="no trace service answers"):
        client.get_dictionary("s", DIGEST)
    service.start()
    assert client.get_dictionary("s", DIGEST) == DICTIONARY


def test_a_dictionary_damaged_on_the_server_is_not_handed_out(
    service: ServiceProcess, client: TraceClient, tmp_path: Path
) -> None:
    client.put_dictionary("s", DICTIONARY)
    service.stop()
    with closing(sqlite3.connect(tmp_path / "data" / "catalog.sqlite3")) as catalog, catalog:
        catalog.execute("UPDATE dictionaries SET content = ?", (DICTIONARY + b"x",))
    service.start()
    with pytest.raises(CorruptBlockError, match=f"dictionary {DIGEST.hex()} of stream 's' came with"):
        client.get_dictionary("s", DIGEST)


def test_a_service_that_received_something_else_is_noticed(lying_target: str) -> None:
    with (
        TraceClient(lying_target) as client,
        pytest.raises(CorruptBlockError, match=f"sent was {DIGEST.hex()}"),
    ):
        client.put_dictionary("s", DICTIONARY)


def test_a_cache_asks_the_service_once_for_each_dictionary(
    service: ServiceProcess, client: TraceClient
) -> None:
    digests = [client.put_dictionary("s", bytes([number])) for number in range(3)]
    fetch = DictionaryCache(client, "s", capacity=2)
    assert [fetch(digest) for digest in digests[:2]] == [b"\0", b"\1"]
    assert fetch(digests[0]) == b"\0"
    assert fetch(digests[2]) == b"\2"  # in the place of the one used least lately
    service.stop()
    assert [fetch(digests[0]), fetch(digests[2])] == [b"\0", b"\2"]
    with pytest.raises(ServiceUnavailableError):
        fetch(digests[1])


def test_a_cache_remembers_no_failure(client: TraceClient) -> None:
    fetch = DictionaryCache(client, "s")
    with pytest.raises(DictionaryNotFoundError):
        fetch(DIGEST)
    client.put_dictionary("s", DICTIONARY)
    assert fetch(DIGEST) == DICTIONARY


def test_threads_that_miss_the_same_dictionary_fetch_it_once(client: TraceClient) -> None:
    client.put_dictionary("s", DICTIONARY)
    fetched: list[bytes] = []
    together = threading.Barrier(8)

    class CountingClient(TraceClient):
        def get_dictionary(self, stream: str, digest: bytes) -> bytes:
            fetched.append(digest)
            return super().get_dictionary(stream, digest)

    def read() -> bytes:
        together.wait(30)
        return fetch(DIGEST)

    with CountingClient(client.target) as counting, ThreadPoolExecutor(8) as pool:
        fetch = DictionaryCache(counting, "s")
        found = [one.result(30) for one in [pool.submit(read) for _ in range(8)]]
    assert found == [DICTIONARY] * 8
    assert fetched == [DIGEST]


def test_a_hit_does_not_wait_for_a_service_that_hangs(client: TraceClient) -> None:
    client.put_dictionary("s", DICTIONARY)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        waiting = threading.Event()

        class HangingClient(TraceClient):
            def get_dictionary(self, stream: str, digest: bytes) -> bytes:
                if digest == DIGEST:
                    return client.get_dictionary(stream, digest)
                waiting.set()
                return super().get_dictionary(stream, digest)

        with HangingClient(target, timeout_seconds=3.0) as hanging, ThreadPoolExecutor(1) as pool:
            fetch = DictionaryCache(hanging, "s")
            fetch(DIGEST)
            stuck = pool.submit(fetch, bytes(32))
            assert waiting.wait(30)
            assert fetch(DIGEST) == DICTIONARY
            assert not stuck.done()
            assert stuck.exception(30) is not None


def test_a_cache_of_nothing_is_refused(client: TraceClient) -> None:
    with pytest.raises(InvalidInputError, match="capacity is 0"):
        DictionaryCache(client, "s", capacity=0)
