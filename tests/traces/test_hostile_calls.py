"""Bytes that nobody should send, to a real server over a socket: it refuses them, and goes on."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from traces.certificates import TokenFile
from traces.harness import LoopThread, RunningServer, code, create, fetch, make_block, publish

from lynearm.client import Credentials
from lynearm.client.credentials import open_channel
from lynearm.traces.config import ServeConfig
from lynearm.traces.servicer import SERVICE_NAME
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub

METHODS = [f"/{SERVICE_NAME}/{one.name}" for one in pb.DESCRIPTOR.services_by_name["TraceService"].methods]

EXPECTED = {
    *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "ALREADY_EXISTS", "FAILED_PRECONDITION"),
    *("UNIMPLEMENTED", "DATA_LOSS", "RESOURCE_EXHAUSTED"),
}
"""What a request may be answered with; any other, such as UNKNOWN, says that the server erred."""

FUZZED = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def server(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all examples: what an earlier one broke, a later one finds."""
    running = RunningServer(loop, ServeConfig(tmp_path_factory.mktemp("hostile") / "data", port=0))
    create(running.stub)
    # Beyond the reach of requests about "s", some of which turn out to delete it.
    create(running.stub, "kept")
    publish(running.stub, range(3), stream="kept")
    yield running
    check_health(running)
    running.close()


def check_health(server: RunningServer) -> None:
    assert [block for _, block in fetch(server.stub, 0, 3, "kept")] == [
        make_block(number) for number in range(3)
    ]


def call(channel: grpc.Channel, method: str, messages: Sequence[bytes], metadata: Any = ()) -> str:
    """The status of a call that sends the messages and takes a few answers."""
    start: Any = channel.stream_stream(method, None, None)
    running = start(iter(messages), metadata=metadata, timeout=30)
    try:
        for _ in zip(range(3), running, strict=False):
            pass
    except grpc.RpcError as error:
        return code(error)
    running.cancel()
    return "OK"


def mangled(message: bytes) -> st.SearchStrategy[bytes]:
    """A real message with some bytes replaced, removed or added."""

    def mangle(edit: tuple[int, int, bytes]) -> bytes:
        start, length, new = edit
        start %= len(message) + 1
        return message[:start] + new + message[start + length :]

    return st.tuples(st.integers(0, 300), st.integers(0, 20), st.binary(max_size=20)).map(mangle)


REAL = [
    pb.PublishRequest(open=pb.PublishOpen(stream="s", producer_id="fuzz")).SerializeToString(),
    pb.PublishRequest(blocks=[pb.PublishBlock(sequence=1, finished_prompt_ids=["a"])]).SerializeToString(),
    pb.SubscribeRequest(open=pb.SubscribeOpen(stream="s", credit_bytes=1 << 20)).SerializeToString(),
    pb.FetchBlocksRequest(stream="s", offset=0, count=2).SerializeToString(),
    pb.GetDictionaryRequest(stream="s", digest=bytes(8)).SerializeToString(),
]
MESSAGES = st.one_of(st.binary(max_size=200), *(mangled(one) for one in REAL))


@FUZZED
@given(st.sampled_from(METHODS), st.lists(MESSAGES, min_size=1, max_size=3))
def test_any_bytes_are_answered_with_a_status_of_ours(
    server: RunningServer, method: str, messages: list[bytes]
) -> None:
    # A method of one request never sees another one: gRPC itself ends such a call.
    takes_many = method.endswith(("/Publish", "/Subscribe"))
    assert call(server.channel, method, messages if takes_many else messages[:1]) in EXPECTED
    check_health(server)


@FUZZED
@given(st.data())
def test_a_publisher_that_turns_hostile_breaks_its_own_call_only(
    server: RunningServer, data: st.DataObject
) -> None:
    block = pb.PublishRequest(blocks=[pb.PublishBlock(sequence=1)]).SerializeToString()
    whole = pb.PublishRequest.FromString(block)
    whole.blocks[0].block.MergeFromString(make_block(9))
    messages = data.draw(st.lists(mangled(whole.SerializeToString()) | st.just(REAL[0]), max_size=3))
    opening = pb.PublishRequest(open=pb.PublishOpen(stream="fuzzed", producer_id="fuzz"))
    try:
        create(server.stub, "fuzzed")
    except grpc.RpcError as error:
        if code(error) != "ALREADY_EXISTS":
            raise
    found = call(server.channel, f"/{SERVICE_NAME}/Publish", [opening.SerializeToString(), *messages])
    assert found in EXPECTED
    check_health(server)


KEYS = st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,20}\Z").filter(
    lambda key: not key.startswith("grpc-") and not key.endswith("-bin")
)
METADATA = st.lists(
    st.one_of(
        st.tuples(KEYS, st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)),
        st.tuples(KEYS.map("{}-bin".format), st.binary(max_size=60)),
        st.tuples(
            st.sampled_from(["authorization", "traceparent", "tracestate", "lynearm-error", "te", "host"]),
            st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60),
        ),
    ),
    max_size=6,
)


@FUZZED
@given(METADATA, st.sampled_from(METHODS))
def test_any_metadata_passes_or_is_refused(
    server: RunningServer, metadata: list[tuple[str, Any]], method: str
) -> None:
    found = call(server.channel, method, [b""], metadata)
    assert found in EXPECTED, found
    check_health(server)


@FUZZED
@given(METADATA)
def test_no_metadata_opens_a_server_with_tokens(
    locked: RunningServer, metadata: list[tuple[str, Any]]
) -> None:
    for method in METHODS:
        assert call(locked.channel, method, [b""], metadata) == "UNAUTHENTICATED"


@pytest.fixture(scope="module")
def locked(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("locked")
    tokens = TokenFile(directory / "tokens.toml")
    token = tokens.add("somebody", "admin:*")
    running = RunningServer(loop, ServeConfig(directory / "data", port=0, tokens=tokens.path))
    yield running
    with open_channel(running.server.address, Credentials(token=token)) as channel:
        create(TraceServiceStub(channel))
    running.close()


@pytest.mark.parametrize("size", [10_000, 1 << 20])
def test_headers_that_are_too_large_are_refused(server: RunningServer, size: int) -> None:
    found = call(server.channel, METHODS[0], [b""], [("x", "y" * size)])
    assert found in ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL")  # whichever end notices first
    check_health(server)


def test_a_small_message_that_unpacks_to_a_large_one_is_refused(server: RunningServer) -> None:
    request = pb.GetStreamRequest(name="x" * (64 << 20))  # some 64 KiB on the wire
    with pytest.raises(grpc.RpcError) as caught:
        server.stub.GetStream(request, compression=grpc.Compression.Gzip, timeout=60)
    assert code(caught.value) == "RESOURCE_EXHAUSTED"
    check_health(server)


HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@FUZZED
@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_a_socket_that_speaks_no_grpc_is_dropped(server: RunningServer, data: bytes, preface: bool) -> None:
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=30) as peer:
        peer.sendall((HTTP2_PREFACE if preface else b"") + data)
        peer.shutdown(socket.SHUT_WR)
        try:
            while peer.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
    check_health(server)


NAMES = [
    *(
        "",
        ".",
        "..",
        "../s",
        "s/../s",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "A",
        "é",
        "a b",
        "a\n",
        "a\0",
        "-a",
        "_a",
    ),
    *(".a", "a" * 129, "%2e%2e", "a:b", "a*", "${HOME}", "~", "s ", " s"),
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_no_name_beyond_the_pattern_is_taken_and_none_becomes_a_path(
    server: RunningServer, tmp_path: Path, name: str
) -> None:
    data_dir = server.config.data_dir
    before = sorted(data_dir.parent.rglob("*"))
    creation = pb.CreateStreamRequest()
    creation.spec.CopyFrom(server.stub.GetStream(pb.GetStreamRequest(name="kept")).stream.spec)
    creation.spec.name = name
    assert call(server.channel, f"/{SERVICE_NAME}/CreateStream", [creation.SerializeToString()]) == (
        "INVALID_ARGUMENT"
    )
    opening = pb.PublishRequest(open=pb.PublishOpen(stream="kept", producer_id=name))
    assert call(server.channel, f"/{SERVICE_NAME}/Publish", [opening.SerializeToString()]) == (
        "INVALID_ARGUMENT"
    )
    for method in ("GetStream", "DeleteStream", "SealStream"):
        request = pb.GetStreamRequest(name=name).SerializeToString()  # the three have the same one field
        assert call(server.channel, f"/{SERVICE_NAME}/{method}", [request]) == "NOT_FOUND"
    assert sorted(data_dir.parent.rglob("*")) == before


def test_a_broken_request_leaves_no_traceback(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for method in METHODS:
            call(server.channel, method, [b"\xff\xff\xff"])
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
