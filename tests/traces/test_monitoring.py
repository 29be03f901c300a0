"""What a server shows of itself: metrics, logs, spans and its own contract."""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from models.teacher_thread import wait_until
from traces.certificates import CertificateFiles, TokenFile
from traces.harness import (
    LoopThread,
    Producer,
    Reader,
    RunningServer,
    StartServer,
    code,
    create,
    make_block,
    publish,
)
from traces.serving import ServeCommand, scrape

from lynearm.client import Credentials
from lynearm.client.credentials import open_channel
from lynearm.traces.config import ServeConfig
from lynearm.traces.current_call import Call, Target
from lynearm.traces.logs import JsonFormatter, TokenFilter
from lynearm.traces.metrics import MAX_NAMED_STREAMS, OTHER_STREAMS, ServerMetrics
from lynearm.traces.servicer import SERVICE_NAME
from lynearm.traces.tail import StreamTail
from lynearm.traces.tokens import new_token
from lynearm.traces.tracing import is_tracing_wanted
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.errors import PreconditionError

collector_pb2 = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="needs the extra tracing"
)
collector_grpc = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")


def method(name: str) -> str:
    return f"/{SERVICE_NAME}/{name}"


def metrics_of(server: RunningServer) -> dict[tuple[str, ...], float]:
    return scrape(f"127.0.0.1:{server.server.metrics_port}")


def test_metrics_count_what_happened(start_server: StartServer) -> None:
    server = start_server(metrics_port=0)
    stub = server.stub
    create(stub)
    producer = Producer(stub)
    block = make_block(1, 20_000)
    producer.send(1, block)
    producer.acks(1)
    producer.send(1, block)  # again
    producer.acks(1)
    reader = Reader(stub)
    reader.next()
    with pytest.raises(grpc.RpcError):
        stub.GetStream(pb.GetStreamRequest(name="absent"))
    # A call's status may reach its caller before the server counts it.
    counted = ("lynearm_calls_total", method("GetStream"), "NOT_FOUND")
    wait_until(lambda: counted in metrics_of(server))
    found = metrics_of(server)
    assert found["lynearm_calls_running", method("Publish")] == 1
    assert found["lynearm_calls_total", method("CreateStream"), "OK"] == 1
    assert found[counted] == 1
    assert found["lynearm_errors_total", "STREAM_NOT_FOUND"] == 1
    assert found["lynearm_call_seconds_count", method("GetStream")] == 1
    assert found["lynearm_committed_blocks_total",] == 1
    assert found["lynearm_committed_bytes_total",] == len(block)
    assert found["lynearm_committed_traces_total",] == 2
    assert found["lynearm_committed_completion_tokens_total",] == 5
    assert found["lynearm_repeated_blocks_total",] == 1
    assert found["lynearm_ack_seconds_count",] == 2
    assert found["lynearm_group_blocks_sum",] == 2
    assert found["lynearm_group_bytes_sum",] == 2 * len(block)
    assert found["lynearm_storage_seconds_count", "commit", "catalog"] == 2
    assert 2 * len(block) < found["lynearm_received_bytes_total", method("Publish")] < 2 * len(block) + 200
    assert len(block) < found["lynearm_sent_bytes_total", method("Subscribe")] < len(block) + 100
    assert found["lynearm_cache_bytes",] == len(block)
    assert found["lynearm_queued_bytes",] == 0
    assert found["lynearm_draining",] == 0
    assert found["process_resident_memory_bytes",] > 0
    producer.close()
    reader.cancel()


def test_the_lag_of_a_subscriber_that_stalls_is_seen(start_server: StartServer) -> None:
    server = start_server(metrics_port=0)
    create(server.stub)
    publish(server.stub, range(5))
    reader = Reader(server.stub, credit_bytes=1)
    assert reader.next().offset == 0
    assert reader.is_quiet()
    assert metrics_of(server)["lynearm_subscriber_lag_blocks", "s"] == 4
    publish(server.stub, range(3), producer_id="q")
    found = metrics_of(server)
    assert found["lynearm_subscriber_lag_blocks", "s"] == 7
    assert found["lynearm_subscribers", "s"] == 1
    reader.cancel()


def test_more_streams_do_not_make_more_series() -> None:
    metrics = ServerMetrics()
    for number in range(3 * MAX_NAMED_STREAMS):
        tail = StreamTail()
        tail.advance(number + 1)
        call = Call(method("Subscribe"), target=Target(f"s{number}"), tail=tail, sent_offset=0)
        metrics.begin_call(call)
    (lags,) = [one for one in metrics.registry.collect() if one.name == "lynearm_subscriber_lag_blocks"]
    by_stream = {sample.labels["stream"]: sample.value for sample in lags.samples}
    assert len(by_stream) == MAX_NAMED_STREAMS + 1
    assert by_stream[f"s{3 * MAX_NAMED_STREAMS - 1}"] == 3 * MAX_NAMED_STREAMS - 1
    assert by_stream[OTHER_STREAMS] == 2 * MAX_NAMED_STREAMS - 1


def test_methods_that_nobody_has_make_no_series(start_server: StartServer) -> None:
    server = start_server(metrics_port=0)
    before = set(metrics_of(server))
    for number in range(5):
        start: Any = server.channel.unary_unary(f"/x.Service{number}/Method", None, None)
        with pytest.raises(grpc.RpcError) as caught:
            start(b"")
        assert code(caught.value) == "UNIMPLEMENTED"
    assert set(metrics_of(server)) == before


def test_failures_of_the_store_are_counted(loop: LoopThread, tmp_path: Path) -> None:
    server = RunningServer(loop, ServeConfig(tmp_path / "data", port=0, metrics_port=0, cache_bytes=0))
    create(server.stub)
    publish(server.stub, [1])
    for file in (tmp_path / "data" / "blocks").rglob("*"):
        if file.is_file():
            file.unlink()
    reader = Reader(server.stub)
    assert code(reader.error()) == "INTERNAL"
    assert metrics_of(server)["lynearm_storage_errors_total", "read", "store", "STORAGE"] == 1
    server.close()


def test_a_metrics_port_in_use_is_named(start_server: StartServer) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(PreconditionError, match="--metrics-port"):
            start_server(metrics_port=other.getsockname()[1])
    start_server(metrics_port=0)


def test_without_a_port_there_are_no_metrics(server: RunningServer) -> None:
    assert server.server.metrics_port == 0


def test_reflection_is_off_unless_asked_for(server: RunningServer) -> None:
    assert reflect(server.channel) == "UNIMPLEMENTED"


def test_reflection_lists_the_contract_to_administrators(start_server: StartServer, tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.toml")
    admin, other = tokens.add("admin", "admin:*"), tokens.add("other", "publish:*", "consume:*")
    server = start_server(tokens=tokens.path, reflection=True)
    with (
        open_channel(server.server.address, Credentials(token=admin)) as channel,
        open_channel(server.server.address, Credentials(token=other)) as other_channel,
    ):
        assert SERVICE_NAME in reflect(channel)
        assert reflect(other_channel) == "PERMISSION_DENIED"
    assert reflect(server.channel) == "UNAUTHENTICATED"


def reflect(channel: grpc.Channel) -> str | list[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    try:
        (response,) = stub.ServerReflectionInfo(iter([request]), timeout=30)
    except grpc.RpcError as error:
        return code(error)
    return [service.name for service in response.list_services_response.service]


def test_logs_are_json_and_name_the_call(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.toml")
    token = tokens.add("trainer", "admin:*")
    arguments = ("--tokens", str(tokens.path))
    with ServeCommand(tmp_path / "data", *arguments, credentials=Credentials(token=token)) as server:
        create(server.stub)
        publish(server.stub, [1])
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError):
            TraceServiceStub(channel).ListStreams(pb.ListStreamsRequest())
        server.stub.DeleteStream(pb.DeleteStreamRequest(name="s"))
    assert server.process.returncode == 0
    records = server.log()
    assert all({"time", "level", "logger", "message"} <= set(record) for record in records)
    (published,) = [one for one in records if one.get("method") == method("Publish")]
    assert published["level"] == "info"
    assert (published["caller"], published["stream"], published["producer"]) == ("trainer", "s", "p")
    assert published["status"] == "OK"
    assert published["received_bytes"] > 2000
    (refused,) = [one for one in records if one.get("status") == "UNAUTHENTICATED"]
    assert (refused["level"], refused["method"]) == ("info", method("ListStreams"))
    (deleted,) = [one for one in records if one.get("method") == method("DeleteStream")]
    assert deleted["caller"] == "trainer"
    assert not [one for one in records if one.get("method") == method("CreateStream")], "too much at INFO"
    assert "stopped serving" in records[-1]["message"]


def test_an_exception_stays_on_its_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.getLogger("lynearm.x").makeRecord(
            "lynearm.x", logging.ERROR, __file__, 1, "it\nfailed", (), None
        )
        record.exc_info = __import__("sys").exc_info()
    line = JsonFormatter().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert entry["message"] == "it\nfailed"
    assert "ValueError: first" in entry["exception"]


def test_a_token_in_a_record_is_cut_out() -> None:
    token = new_token()
    record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "got %s", (token,), None)
    assert token not in JsonFormatter().format(record)
    TokenFilter().filter(record)
    assert record.getMessage() == "got lyn_…"


def test_no_secret_is_logged_shown_or_represented(tmp_path: Path) -> None:
    """A server that logs all it can, of calls that carry tokens, right and wrong ones."""
    files, tokens = CertificateFiles(tmp_path / "tls"), TokenFile(tmp_path / "tokens.toml")
    right, wrong = tokens.add("somebody", "publish:s"), new_token()
    tls = ("--tls-cert", str(files.cert), "--tls-key", str(files.key))
    arguments = ("--tokens", str(tokens.path), *tls, "--debug", "--reflection")
    root = files.ca.read_bytes()
    environment = {**os.environ, "GRPC_VERBOSITY": "debug"}
    with ServeCommand(tmp_path / "data", *arguments, environment=environment) as server:
        for token in (right, wrong):
            secure = grpc.ssl_channel_credentials(root)
            with grpc.secure_channel(server.address, secure) as channel:
                for name in ("CreateStream", "GetStream", "ListStreams", "Publish", "Subscribe", "Absent"):
                    start: Any = channel.stream_stream(method(name), None, None)
                    for metadata in ([("authorization", f"Bearer {token}")], [("authorization", token)]):
                        with pytest.raises(grpc.RpcError) as caught:
                            list(start(iter([b"\x0a\x01s"]), metadata=metadata, timeout=30))
                        assert token not in str(caught.value)
        shown = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=30).read()
        tokens.path.write_text(f'[[tokens]]\nname = "x"\nsha256 = "{right}"\nscopes = ["admin:*"]\n')
        server.wait_for_metric("lynearm_reloads_total", 1, "tokens", "failed")
    log = "".join(server.lines)
    assert "UNAUTHENTICATED" in log
    assert "tokens file is not used" in log
    secrets = [right, wrong, *files.key.read_text().splitlines()[1:-1]]
    for secret in secrets:
        assert secret not in log
        assert secret.encode() not in shown


def test_nothing_that_holds_a_token_represents_it() -> None:
    token = new_token()
    call = Call("/a/b", metadata=(("authorization", f"Bearer {token}"),))
    for holder in (call, Credentials(token=token)):
        assert token not in f"{holder!r} {holder}"


class Collector(collector_grpc.TraceServiceServicer):  # type: ignore[misc, name-defined]  # no stubs
    """An OpenTelemetry collector, as far as a test needs one."""

    def __init__(self) -> None:
        self.spans: queue.SimpleQueue[tuple[dict[str, Any], Any]] = queue.SimpleQueue()
        self._server = grpc.server(ThreadPoolExecutor(2))
        collector_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  (gRPC's name)
        for resource in request.resource_spans:
            about = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put((about, span))
        return collector_pb2.ExportTraceServiceResponse()

    def close(self) -> None:
        self._server.stop(None).wait(30)

    def received(self) -> list[tuple[dict[str, Any], Any]]:
        found: list[tuple[dict[str, Any], Any]] = []
        while not self.spans.empty():
            found.append(self.spans.get())
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


def test_spans_go_on_the_callers_trace_and_to_a_collector(tmp_path: Path, collector: Collector) -> None:
    environment = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
        "OTEL_SERVICE_NAME": "traces-of-a-test",
    }
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with ServeCommand(tmp_path / "data", environment=environment) as server:
        create(server.stub)
        publish(server.stub, [1])
        with pytest.raises(grpc.RpcError):
            server.stub.GetStream(
                pb.GetStreamRequest(name="absent"),
                metadata=(("traceparent", f"00-{trace_id}-{parent}-01"),),
            )
    assert server.process.returncode == 0
    spans = collector.received()
    assert {about["service.name"] for about, _ in spans} == {"traces-of-a-test"}
    by_name = {span.name: span for _, span in spans}
    asked = by_name[f"{SERVICE_NAME}/GetStream"]
    assert (asked.trace_id.hex(), asked.parent_span_id.hex()) == (trace_id, parent)
    attributes = {one.key: one.value for one in asked.attributes}
    assert attributes["rpc.grpc.status_code"].int_value == 5
    assert attributes["error.type"].string_value == "STREAM_NOT_FOUND"
    assert attributes["lynearm.stream"].string_value == "absent"
    # What the call made the catalog do is a part of it.
    inner = [span for _, span in spans if span.parent_span_id == asked.span_id]
    assert [span.name for span in inner] == ["catalog get_stream"]
    assert {"store write", "catalog commit", f"{SERVICE_NAME}/Publish"} <= set(by_name)
    logged = [record for record in server.log() if record.get("method") == method("Publish")]
    assert logged[0]["trace_id"] == by_name[f"{SERVICE_NAME}/Publish"].trace_id.hex()


def test_a_collector_that_is_gone_does_not_keep_a_server_from_ending(tmp_path: Path) -> None:
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    with ServeCommand(tmp_path / "data", environment=environment) as server:
        create(server.stub)
        server.process.terminate()
        assert server.process.wait(30) == 0


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_tracing_is_on_where_the_standard_variables_say_so(environment: dict[str, str], wanted: bool) -> None:
    assert is_tracing_wanted(environment) is wanted
