"""Codec dictionaries over a socket: put, got, counted, bounded, needed by blocks, kept through restarts."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest
from traces.harness import (
    LoopThread,
    Producer,
    RunningServer,
    ServerProcess,
    StartServer,
    code,
    create,
    details,
    error_name,
    fetch,
    make_block,
    make_spec,
    publish,
    remedy,
)
from traces.storages import catalog_rows

from lynearm.traces.dictionaries import MAX_DICTIONARIES, MAX_DICTIONARY_BYTES, KnownDictionaries
from lynearm.traces.sql_catalog import SqlCatalog
from lynearm.traces.sqlite import SqliteDatabase
from lynearm.v1 import trace_pb2
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.blocks import dictionary_digest
from lynearm.wire.errors import UnknownDictionaryError

DICTIONARY = b"what a codec learned" * 1000
DIGEST = dictionary_digest(DICTIONARY)


def put(stub: TraceServiceStub, dictionary: bytes = DICTIONARY, stream: str = "s") -> bytes:
    return stub.PutDictionary(pb.PutDictionaryRequest(stream=stream, dictionary=dictionary)).digest


def get(stub: TraceServiceStub, digest: bytes = DIGEST, stream: str = "s") -> bytes:
    return stub.GetDictionary(pb.GetDictionaryRequest(stream=stream, digest=digest)).dictionary


def counts(stub: TraceServiceStub, stream: str = "s") -> tuple[int, int]:
    found = stub.GetStream(pb.GetStreamRequest(name=stream)).stream
    return found.dictionary_count, found.dictionary_bytes


def make_needy_block(number: int, digest: bytes = DIGEST) -> bytes:
    """A block whose header names a dictionary."""
    block = trace_pb2.Block.FromString(make_block(number))
    block.header.dictionary_digest = digest
    return block.SerializeToString()


def test_a_dictionary_comes_back_byte_for_byte(stub: TraceServiceStub) -> None:
    assert put(stub) == DIGEST
    assert get(stub) == DICTIONARY


def test_the_counts_of_a_stream_tell_of_its_dictionaries(stub: TraceServiceStub) -> None:
    publish(stub, [1])
    put(stub, b"a" * 10)
    put(stub, b"b" * 20)
    assert counts(stub) == (2, 30)
    (listed,) = stub.ListStreams(pb.ListStreamsRequest()).streams
    assert (listed.dictionary_count, listed.dictionary_bytes) == (2, 30)
    publish(stub, [2], producer_id="q")
    sealed = stub.SealStream(pb.SealStreamRequest(name="s")).stream
    assert (sealed.dictionary_count, sealed.dictionary_bytes) == (2, 30)
    assert sealed.size_bytes == 2 * len(make_block(1))


def test_the_same_dictionary_again_changes_nothing(stub: TraceServiceStub) -> None:
    threads = [threading.Thread(target=put, args=(stub,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert put(stub) == DIGEST
    assert counts(stub) == (1, len(DICTIONARY))


def test_a_dictionary_of_three_mebibytes_passes_and_a_larger_one_does_not(stub: TraceServiceStub) -> None:
    largest = bytes(MAX_DICTIONARY_BYTES)
    assert get(stub, put(stub, largest)) == largest
    for refused in (b"", bytes(MAX_DICTIONARY_BYTES + 1)):
        with pytest.raises(grpc.RpcError, match=f"dictionary of {len(refused)} bytes") as caught:
            put(stub, refused)
        assert (code(caught.value), error_name(caught.value)) == ("INVALID_ARGUMENT", "InvalidInputError")
    assert counts(stub) == (1, MAX_DICTIONARY_BYTES)


def test_a_stream_holds_so_many_dictionaries_and_no_more(stub: TraceServiceStub) -> None:
    for number in range(MAX_DICTIONARIES):
        put(stub, bytes([number]))
    with pytest.raises(grpc.RpcError, match="holds 64 dictionaries") as caught:
        put(stub, b"one more")
    assert (code(caught.value), error_name(caught.value)) == ("RESOURCE_EXHAUSTED", "DictionaryLimitError")
    put(stub, bytes([7]))
    assert counts(stub) == (64, 64)
    create(stub, "other")
    put(stub, b"one more", stream="other")


def test_another_dictionary_of_the_same_digest_is_refused(stub: TraceServiceStub) -> None:
    """Two whose digests are the same, found by trying 95,303."""
    digest = put(stub, b"69235")
    assert dictionary_digest(b"95303") == digest
    with pytest.raises(grpc.RpcError, match=f"'s' holds another dictionary {digest.hex()}") as caught:
        put(stub, b"95303")
    assert (code(caught.value), error_name(caught.value)) == ("ALREADY_EXISTS", "DictionaryConflictError")
    assert "train it on other traces" in remedy(caught.value)
    assert get(stub, put(stub, b"69235")) == b"69235"
    create(stub, "other")
    put(stub, b"95303", stream="other")


def test_a_sealed_stream_takes_no_new_dictionary_and_gives_those_it_has(stub: TraceServiceStub) -> None:
    put(stub)
    stub.SealStream(pb.SealStreamRequest(name="s"))
    assert put(stub) == DIGEST
    assert get(stub) == DICTIONARY
    with pytest.raises(grpc.RpcError, match="sealed") as caught:
        put(stub, b"new")
    assert (code(caught.value), error_name(caught.value)) == ("FAILED_PRECONDITION", "StreamSealedError")
    assert counts(stub) == (1, len(DICTIONARY))


def test_a_dictionary_that_the_stream_does_not_hold_is_not_found(stub: TraceServiceStub) -> None:
    create(stub, "other")
    put(stub, stream="other")
    with pytest.raises(grpc.RpcError, match=f"'s' holds no dictionary {DIGEST.hex()[:12]}") as caught:
        get(stub)
    assert (code(caught.value), error_name(caught.value)) == ("NOT_FOUND", "DictionaryNotFoundError")


@pytest.mark.parametrize("digest", [b"", DIGEST[:3], DIGEST.hex().encode()], ids=["none", "short", "hex"])
def test_a_digest_that_is_none_is_refused(stub: TraceServiceStub, digest: bytes) -> None:
    with pytest.raises(grpc.RpcError, match=f"digest of {len(digest)} bytes") as caught:
        get(stub, digest)
    assert (code(caught.value), error_name(caught.value)) == ("INVALID_ARGUMENT", "InvalidInputError")


def test_dictionaries_of_unknown_streams_are_not_found(stub: TraceServiceStub) -> None:
    for call in (lambda: put(stub, stream="nope"), lambda: get(stub, stream="nope")):
        with pytest.raises(grpc.RpcError, match="no stream 'nope'") as caught:
            call()
        assert (code(caught.value), error_name(caught.value)) == ("NOT_FOUND", "StreamNotFoundError")


def test_a_deleted_stream_takes_its_dictionaries_and_no_others_with_it(server: RunningServer) -> None:
    stub = server.stub
    for name in ("a", "b"):
        create(stub, name)
        put(stub, stream=name)
    stub.DeleteStream(pb.DeleteStreamRequest(name="a"))
    assert get(stub, stream="b") == DICTIONARY
    create(stub, "a")
    assert counts(stub, "a") == (0, 0)
    with pytest.raises(grpc.RpcError, match="'a' holds no dictionary"):
        get(stub, stream="a")
    assert catalog_rows(server.config, "SELECT count(*) FROM dictionaries") == [(1,)]


def test_a_killed_server_keeps_every_acknowledged_dictionary(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        create(server.stub)
        put(server.stub)
        server.process.kill()
    with ServerProcess(tmp_path / "data") as server:
        assert get(server.stub) == DICTIONARY
        assert counts(server.stub) == (1, len(DICTIONARY))


def test_a_dictionary_that_finds_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data", file_size_limit=1 << 20) as starved:
        create(starved.stub)
        with pytest.raises(grpc.RpcError, match="catalog"):
            put(starved.stub, bytes(2 << 20))
        assert counts(starved.stub) == (0, 0)
        assert put(starved.stub) == DIGEST
        assert get(starved.stub) == DICTIONARY


def test_the_catalog_is_asked_once_for_each_dictionary_and_never_trusted_beyond_a_stream(
    loop: LoopThread, tmp_path: Path
) -> None:
    asked: list[tuple[int, bytes]] = []

    class AskedCatalog(SqlCatalog):
        async def has_dictionary(self, stream_id: int, digest: bytes) -> bool:
            asked.append((stream_id, digest))
            return await super().has_dictionary(stream_id, digest)

    async def run() -> None:
        catalog = await AskedCatalog.open(SqliteDatabase(tmp_path / "catalog.sqlite3"))
        assert isinstance(catalog, AskedCatalog)
        known = KnownDictionaries(catalog)
        for _ in range(2):
            await catalog.create_stream(make_spec(), allow_existing=False)
            producer = await catalog.open_producer("s", "p", 0)
            with pytest.raises(UnknownDictionaryError, match=f"block 3 needs dictionary {DIGEST.hex()[:12]}"):
                await known.check(producer, 3, DIGEST)
            await catalog.put_dictionary("s", DIGEST, DICTIONARY)
            for sequence in range(3, 9):
                await known.check(producer, sequence, DIGEST)
            await catalog.delete_stream("s")
        await catalog.close()

    loop.run(run())
    assert asked == [(1, DIGEST), (1, DIGEST), (2, DIGEST), (2, DIGEST)]


def test_a_block_that_needs_an_unknown_dictionary_is_refused_and_those_before_it_are_kept(
    stub: TraceServiceStub,
) -> None:
    producer = Producer(stub)
    producer.send(1, make_block(1))
    producer.send(2, make_needy_block(2))
    acks, error = producer.fail()
    assert acks == {1: 0}
    assert (code(error), error_name(error)) == ("FAILED_PRECONDITION", "UnknownDictionaryError")
    assert f"block 2 needs dictionary {DIGEST.hex()[:12]}" in details(error)
    assert "which stream 's' does not hold" in details(error)
    assert "put the dictionary first" in remedy(error)
    put(stub)
    again = Producer(stub, epoch=producer.epoch)
    again.send(2, make_needy_block(2))
    assert again.close() == {2: 1}
    assert list(fetch(stub, 0, 9)) == [(0, make_block(1)), (1, make_needy_block(2))]


def test_a_producer_may_go_on_with_a_dictionary_that_it_puts_between_blocks(stub: TraceServiceStub) -> None:
    producer = Producer(stub)
    producer.send(1, make_block(1))
    put(stub)
    producer.send(2, make_needy_block(2))
    producer.send(3, make_needy_block(3, put(stub, b"another")))
    assert producer.close() == {1: 0, 2: 1, 3: 2}


def test_a_stream_created_anew_holds_none_of_the_dictionaries_before(stub: TraceServiceStub) -> None:
    put(stub)
    producer = Producer(stub)
    producer.send(1, make_needy_block(1))
    assert producer.close() == {1: 0}
    stub.DeleteStream(pb.DeleteStreamRequest(name="s"))
    create(stub)
    again = Producer(stub)
    again.send(1, make_needy_block(1))
    assert error_name(again.error()) == "UnknownDictionaryError"


def test_after_a_restart_blocks_may_need_what_was_put_before(
    server: RunningServer, start_server: StartServer
) -> None:
    create(server.stub)
    put(server.stub)
    server.stop()
    producer = Producer(start_server().stub)
    producer.send(1, make_needy_block(1))
    assert producer.close() == {1: 0}
