"""Creating, describing, listing, sealing and deleting streams over a socket."""

from __future__ import annotations

import grpc
import pytest
from traces.harness import RunningServer, code, create, error_name, fetch, make_spec, publish
from traces.storages import StoredObjects

from lynearm.v1 import trace_pb2
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.protobuf import spec_to_proto, stream_from_proto


def test_a_stream_is_described_as_it_was_created(server: RunningServer) -> None:
    spec = make_spec("a.b_c-1", labels={"run": "é 7"})
    created = server.stub.CreateStream(pb.CreateStreamRequest(spec=spec_to_proto(spec))).stream
    found = server.stub.GetStream(pb.GetStreamRequest(name="a.b_c-1")).stream
    assert created == found
    info = stream_from_proto(found)
    assert (info.spec, info.sealed, info.next_offset) == (spec, False, 0)
    assert info.created_unix_nano > 1_700_000_000 * 10**9


def test_streams_are_listed_by_name(server: RunningServer) -> None:
    assert list(server.stub.ListStreams(pb.ListStreamsRequest()).streams) == []
    for name in ("b", "a", "c"):
        create(server.stub, name)
    listed = server.stub.ListStreams(pb.ListStreamsRequest()).streams
    assert [stream.spec.name for stream in listed] == ["a", "b", "c"]


def test_creating_again_succeeds_only_with_an_equal_spec_and_permission(stub: TraceServiceStub) -> None:
    same, other = spec_to_proto(make_spec()), spec_to_proto(make_spec(license="MIT"))
    stub.CreateStream(pb.CreateStreamRequest(spec=same, allow_existing=True))
    for request in (
        pb.CreateStreamRequest(spec=same),
        pb.CreateStreamRequest(spec=other, allow_existing=True),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateStream(request)
        assert (code(caught.value), error_name(caught.value)) == ("ALREADY_EXISTS", "StreamExistsError")


@pytest.mark.parametrize("name", ["", "A", "a/b", "../a", ".a", "a" * 129, "a\nb", "ä"])
def test_bad_names_are_refused(server: RunningServer, name: str) -> None:
    spec = spec_to_proto(make_spec())
    spec.name = name
    with pytest.raises(grpc.RpcError) as caught:
        server.stub.CreateStream(pb.CreateStreamRequest(spec=spec))
    assert (code(caught.value), error_name(caught.value)) == ("INVALID_ARGUMENT", "InvalidInputError")


def test_an_incomplete_spec_is_refused_with_the_field(server: RunningServer) -> None:
    for spec, problem in (
        (trace_pb2.StreamSpec(name="s"), "logprobs_mode is not said"),
        (spec_to_proto(make_spec(labels={"k": "v" * 20_000})), "at most 16384"),
    ):
        with pytest.raises(grpc.RpcError, match=problem) as caught:
            server.stub.CreateStream(pb.CreateStreamRequest(spec=spec))
        assert code(caught.value) == "INVALID_ARGUMENT"


def test_unknown_streams_are_not_found(server: RunningServer) -> None:
    stub = server.stub
    calls = (
        lambda: stub.GetStream(pb.GetStreamRequest(name="nope")),
        lambda: stub.SealStream(pb.SealStreamRequest(name="nope")),
        lambda: stub.DeleteStream(pb.DeleteStreamRequest(name="nope")),
        lambda: list(stub.ListFinishedPrompts(pb.ListFinishedPromptsRequest(stream="nope"))),
        lambda: publish(stub, [1], stream="nope"),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError, match="no stream 'nope'") as caught:
            call()
        assert (code(caught.value), error_name(caught.value)) == ("NOT_FOUND", "StreamNotFoundError")


def test_sealing_is_idempotent(stub: TraceServiceStub) -> None:
    for _ in range(2):
        stream = stub.SealStream(pb.SealStreamRequest(name="s")).stream
        assert stream.state == pb.STREAM_STATE_SEALED


def test_a_deleted_stream_takes_its_objects_and_no_others_with_it(server: RunningServer) -> None:
    stub = server.stub
    for name in ("a", "b"):
        create(stub, name)
        publish(stub, range(5), stream=name)
    stub.DeleteStream(pb.DeleteStreamRequest(name="a"))
    assert len(list(fetch(stub, 0, 10, "b"))) == 5
    assert StoredObjects(server.config).read() != {}
    stub.DeleteStream(pb.DeleteStreamRequest(name="b"))
    assert StoredObjects(server.config).read() == {}


def test_a_stream_created_anew_remembers_nothing(stub: TraceServiceStub) -> None:
    publish(stub, range(5))
    stub.DeleteStream(pb.DeleteStreamRequest(name="s"))
    create(stub)
    assert publish(stub, [9]) == {1: 0}
    assert [offset for offset, _ in fetch(stub, 0, 10)] == [0]
