"""Attachments of streams over a socket: put, got, listed, replaced, bounded, kept through restarts."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from traces.harness import RunningServer, StartServer, code, create, details, error_name, publish

from lynearm.client import AsyncTraceClient, TraceClient
from lynearm.traces.attachments import MAX_ATTACHMENTS
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.blocks import MAX_ATTACHMENT_BYTES
from lynearm.wire.errors import (
    AttachmentNotFoundError,
    InvalidInputError,
    StreamNotFoundError,
    StreamSealedError,
)


def put(stub: TraceServiceStub, name: str, content: bytes, stream: str = "s") -> None:
    stub.PutAttachment(pb.PutAttachmentRequest(stream=stream, name=name, content=content))


def get(stub: TraceServiceStub, name: str, stream: str = "s") -> bytes:
    return stub.GetAttachment(pb.GetAttachmentRequest(stream=stream, name=name)).content


def listed(stub: TraceServiceStub, stream: str = "s") -> dict[str, int]:
    answer = stub.ListAttachments(pb.ListAttachmentsRequest(stream=stream))
    return {one.name: one.size_bytes for one in answer.attachments}


def test_what_was_put_last_comes_back_and_is_listed(stub: TraceServiceStub) -> None:
    publish(stub, [1])
    assert listed(stub) == {}
    put(stub, "b", b"first")
    put(stub, "a", bytes(range(256)))
    put(stub, "b", b"second, and longer")
    assert get(stub, "b") == b"second, and longer"
    assert get(stub, "a") == bytes(range(256))
    assert listed(stub) == {"a": 256, "b": 18}
    stamps = stub.ListAttachments(pb.ListAttachmentsRequest(stream="s")).attachments
    assert stamps[1].updated_unix_nano > stamps[0].updated_unix_nano > 1e18


def test_streams_have_attachments_of_their_own_which_go_with_them(stub: TraceServiceStub) -> None:
    create(stub, "t")
    put(stub, "a", b"of s")
    put(stub, "a", b"of t", "t")
    stub.DeleteStream(pb.DeleteStreamRequest(name="s"))
    create(stub, "s")
    assert listed(stub) == {}
    assert get(stub, "a", "t") == b"of t"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("No Caps", b"c", "attachment 'No Caps' is not allowed"),
        ("", b"c", "attachment '' is not allowed"),
        ("a", b"", "attachment 'a' of 0 bytes"),
        ("a", bytes(MAX_ATTACHMENT_BYTES + 1), f"expected 1 to {MAX_ATTACHMENT_BYTES}"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    stub: TraceServiceStub, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        put(stub, name, content)
    assert code(refused.value) == "INVALID_ARGUMENT"
    assert message in details(refused.value)
    assert listed(stub) == {}


def test_a_sealed_stream_keeps_what_it_has_and_takes_no_more(stub: TraceServiceStub) -> None:
    put(stub, "a", b"before")
    stub.SealStream(pb.SealStreamRequest(name="s"))
    with pytest.raises(grpc.RpcError) as refused:
        put(stub, "a", b"after")
    assert error_name(refused.value) == "StreamSealedError"
    assert get(stub, "a") == b"before"


def test_a_stream_that_is_full_takes_others_in_place_only(stub: TraceServiceStub) -> None:
    for number in range(MAX_ATTACHMENTS):
        put(stub, f"a{number}", b"c")
    with pytest.raises(grpc.RpcError) as refused:
        put(stub, "one-more", b"c")
    assert code(refused.value) == "RESOURCE_EXHAUSTED"
    put(stub, "a7", b"replaced")
    assert get(stub, "a7") == b"replaced"
    assert len(listed(stub)) == MAX_ATTACHMENTS


def test_what_is_not_there_is_not_found(stub: TraceServiceStub) -> None:
    for stream, name, error in (("s", "a", "AttachmentNotFoundError"), ("t", "a", "StreamNotFoundError")):
        with pytest.raises(grpc.RpcError) as missing:
            get(stub, name, stream)
        assert error_name(missing.value) == error
    with pytest.raises(grpc.RpcError):
        listed(stub, "t")


def test_attachments_outlive_the_server(tmp_path: Path, start_server: StartServer) -> None:
    first: RunningServer = start_server(data_dir=tmp_path / "data")
    create(first.stub, "s")
    put(first.stub, "a", b"kept")
    first.stop()
    again = start_server(data_dir=tmp_path / "data")
    assert get(again.stub, "a") == b"kept"


def test_both_clients_put_get_and_list(server: RunningServer) -> None:
    import asyncio

    create(server.stub, "s")
    with TraceClient(server.server.address) as client:
        client.attachments.put("s", "a", b"by one client")
        assert [(one.name, one.size_bytes) for one in client.attachments.list("s")] == [("a", 13)]
        with pytest.raises(AttachmentNotFoundError, match="stream 's' has no attachment 'b'"):
            client.attachments.get("s", "b")
        with pytest.raises(StreamNotFoundError):
            client.attachments.list("t")
        with pytest.raises(InvalidInputError, match="attachment of 0 bytes"):
            client.attachments.put("s", "a", b"")

        async def other() -> bytes:
            async with AsyncTraceClient(server.server.address) as twin:
                await twin.attachments.put("s", "b", await twin.attachments.get("s", "a"))
                return bytes([len(await twin.attachments.list("s"))])

        assert asyncio.run(other()) == b"\x02"
        assert client.attachments.get("s", "b") == b"by one client"
        client.seal_stream("s")
        with pytest.raises(StreamSealedError):
            client.attachments.put("s", "a", b"late")
