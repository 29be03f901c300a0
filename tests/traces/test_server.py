"""The server as a process on a machine: ports, directories, health, load, stopping."""

from __future__ import annotations

import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
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
    publish,
)
from traces.storages import StoredObjects, on_local_disk

from lynearm.traces.config import ServeConfig
from lynearm.traces.server import run_server
from lynearm.traces.servicer import SERVICE_NAME
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.errors import ConfigError, PreconditionError, StorageError


def health_stub(server: RunningServer) -> Any:
    # Any: the stub's methods are not typed.
    return health_pb2_grpc.HealthStub(server.channel)


def test_a_port_in_use_is_named(start_server: StartServer, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PreconditionError, match=f"127.0.0.1:{port}.*in use.*--port"):
            start_server(port=port)
    assert start_server(port=port).server.port == port


def test_a_server_that_does_not_start_leaves_signals_as_they_were(tmp_path: Path) -> None:
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = ServeConfig(data_dir=tmp_path, port=other.getsockname()[1])
        with pytest.raises(PreconditionError, match="in use"):
            run_server(config, lambda _: None)
    assert [signal.getsignal(number) for number in signals] == before


def test_a_second_server_on_the_port_is_refused(server: RunningServer, start_server: StartServer) -> None:
    with pytest.raises(PreconditionError, match="in use"):
        start_server(port=server.server.port, data_dir=server.config.data_dir.with_name("other"))


@on_local_disk
def test_a_second_server_on_the_data_directory_is_refused(
    server: RunningServer, start_server: StartServer
) -> None:
    with pytest.raises(PreconditionError, match="used by another trace server"):
        start_server()
    server.stop()
    start_server()


@on_local_disk
def test_servers_that_share_and_servers_that_do_not_keep_each_other_out(start_server: StartServer) -> None:
    shared = [start_server(shared=True), start_server(shared=True)]
    with pytest.raises(PreconditionError, match="start both with --shared"):
        start_server()
    for server in shared:
        server.stop()
    start_server()
    with pytest.raises(PreconditionError, match="used by another trace server"):
        start_server(shared=True)


@on_local_disk
@pytest.mark.parametrize("prefixes", [("", ""), ("sqlite://", "file://")], ids=["paths", "urls"])
def test_catalog_and_blocks_go_where_they_are_told_to(
    start_server: StartServer, tmp_path: Path, prefixes: tuple[str, str]
) -> None:
    catalog, blocks = tmp_path / "a dir" / "traces.db", tmp_path / "b" / "blocks"
    places = {"catalog": f"{prefixes[0]}{catalog}", "blocks": f"{prefixes[1]}{blocks}"}
    server = start_server(**places)
    create(server.stub)
    publish(server.stub, range(3))
    assert catalog.is_file()
    assert len(list(blocks.glob("??/*"))) >= 1
    with pytest.raises(PreconditionError, match="used by another trace server"):
        start_server(blocks=places["blocks"], data_dir=tmp_path / "other")
    server.stop()
    assert len(list(fetch(start_server(**places).stub, 0, 9))) == 3
    assert not server.config.data_dir.exists()


@on_local_disk
def test_blocks_whose_identity_was_damaged_are_refused(
    server: RunningServer, start_server: StartServer
) -> None:
    server.stop()
    (server.config.data_dir / "blocks" / "identity").write_text("")
    with pytest.raises(StorageError, match="says that it is '', expected 32"):
        start_server()


def test_a_new_catalog_does_not_take_the_blocks_of_another_for_garbage(
    start_server: StartServer, server: RunningServer, tmp_path: Path
) -> None:
    create(server.stub)
    publish(server.stub, range(3))
    server.stop()
    objects = StoredObjects(server.config)
    before = objects.list_keys()
    # As when the catalog was lost, or the disk that it is on is not mounted.
    blocks = server.config.blocks or str(server.config.data_dir / "blocks")
    for _ in range(2):
        with pytest.raises(PreconditionError, match=r"catalog is new.*holds the blocks of another"):
            start_server(catalog=str(tmp_path / "unmounted" / "catalog.sqlite3"), blocks=blocks)
    assert objects.list_keys() == before
    assert len(list(fetch(start_server().stub, 0, 9))) == 3


@on_local_disk
def test_a_data_directory_that_cannot_be_made_is_named(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.data"):
        start_server(data_dir=tmp_path / "file" / "data")


@on_local_disk
def test_a_catalog_that_is_none_is_named(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "catalog.sqlite3").write_bytes(b"something else" * 100)
    with pytest.raises(StorageError, match=r"catalog\.sqlite3.*not a database"):
        start_server()


def test_an_address_beyond_loopback_needs_tls_and_tokens_or_consent(tmp_path: Path) -> None:
    tls = {"tls_cert": tmp_path / "cert", "tls_key": tmp_path / "key"}
    tokens = {"tokens": tmp_path / "tokens"}
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        for settings, missing in (({}, "no TLS .* and no tokens"), (tls, "no tokens"), (tokens, "no TLS")):
            with pytest.raises(ConfigError, match=f"there is {missing}.*--insecure"):
                ServeConfig(tmp_path, host=host, **settings)
            ServeConfig(tmp_path, host=host, insecure=True, **settings)
        ServeConfig(tmp_path, host=host, **tls, **tokens)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"):
        ServeConfig(tmp_path, host=host)


def test_an_open_server_is_warned_about(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    start_server(host="0.0.0.0", insecure=True)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(",")[0] for text in warnings] == ["without tokens", "without TLS"]


@pytest.mark.parametrize(
    "field",
    [
        "port",
        "group_milliseconds",
        "group_bytes",
        "queue_bytes",
        "cache_bytes",
        "min_free_bytes",
        "max_calls",
    ],
)
def test_a_setting_out_of_range_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is -1"):
        ServeConfig(**{field: -1})  # type: ignore[arg-type]  # field by name


def test_every_method_of_the_contract_answers(stub: TraceServiceStub, server: RunningServer) -> None:
    for method in pb.DESCRIPTOR.services_by_name["TraceService"].methods:
        start: Any = server.channel.stream_stream(f"/{SERVICE_NAME}/{method.name}", None, None)
        call = start(iter([b""]))
        with suppress(grpc.RpcError):
            list(call)
        assert call.code() != grpc.StatusCode.UNIMPLEMENTED, method.name


def test_health_says_serving(server: RunningServer) -> None:
    health = health_stub(server)
    for service in ("", SERVICE_NAME):
        response = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_calls_beyond_the_bound_are_refused_at_once(start_server: StartServer) -> None:
    stub = start_server(max_calls=2).stub
    create(stub)
    readers = [Reader(stub), Reader(stub)]
    for reader in readers:
        assert reader.is_quiet()
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListStreams(pb.ListStreamsRequest())
    assert (code(caught.value), error_name(caught.value)) == ("UNAVAILABLE", "ServiceUnavailableError")
    for reader in readers:
        reader.cancel()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(grpc.RpcError):
            stub.ListStreams(pb.ListStreamsRequest())
            break
    else:
        raise AssertionError("calls that ended still count")


def test_stopping_acknowledges_all_that_is_kept_and_ends_every_call(
    start_server: StartServer, server: RunningServer
) -> None:
    stub = server.stub
    create(stub)
    watch = health_stub(server).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    reader, producer = Reader(stub), Producer(stub)
    for sequence in range(1, 201):
        producer.send(sequence, make_block(sequence, 50_000))
    acked = producer.acks(1)
    server.stop()
    last_acks, failure = producer.fail()
    for error in (failure, reader.error()):
        assert (code(error), error_name(error)) == ("UNAVAILABLE", "DrainingError")
    kept = [offset for offset, _ in fetch(start_server().stub, 0, 1000)]
    assert kept == list((acked | last_acks).values())


def test_a_server_comes_back_with_what_it_had(start_server: StartServer, server: RunningServer) -> None:
    create(server.stub)
    publish(server.stub, range(20))
    server.stub.SealStream(pb.SealStreamRequest(name="s"))
    before = server.stub.GetStream(pb.GetStreamRequest(name="s"))
    server.stop()
    stub = start_server().stub
    assert stub.GetStream(pb.GetStreamRequest(name="s")) == before
    assert Reader(stub).rest() == [make_block(number) for number in range(20)]


def test_sigterm_ends_the_process_well(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        create(server.stub)
        reader = Reader(server.stub)
        assert reader.is_quiet()
        server.process.send_signal(signal.SIGTERM)
        assert error_name(reader.error()) == "DrainingError"
        assert server.process.wait(30) == 0
