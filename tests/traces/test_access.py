"""Who may do what: every method has its rule, and nothing is allowed that no scope grants."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from traces.certificates import TokenFile
from traces.harness import (
    Producer,
    Reader,
    RunningServer,
    StartServer,
    code,
    create,
    error_name,
    make_block,
    make_spec,
    publish,
)

import lynearm.v1
from lynearm.client import Credentials, TraceClient
from lynearm.client.credentials import open_channel
from lynearm.traces.access import OPEN_SERVICES, RULES, check_caller
from lynearm.traces.limits import CallerLimits, CallerQuota
from lynearm.traces.servicer import SERVICE_NAME
from lynearm.traces.tokens import PERMISSIONS, Caller, Permission, Scope
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.errors import AccessDeniedError, AuthenticationError
from lynearm.wire.protobuf import spec_to_proto


def creation(name: str) -> pb.CreateStreamRequest:
    spec = spec_to_proto(make_spec())
    spec.name = name
    return pb.CreateStreamRequest(spec=spec)


# One sensible request for each method on a stream, by method.
REQUESTS: dict[str, Callable[[str], Any]] = {
    "CreateStream": creation,
    "GetStream": lambda name: pb.GetStreamRequest(name=name),
    "DeleteStream": lambda name: pb.DeleteStreamRequest(name=name),
    "SealStream": lambda name: pb.SealStreamRequest(name=name),
    "Publish": lambda name: pb.PublishRequest(open=pb.PublishOpen(stream=name, producer_id="p")),
    "Subscribe": lambda name: pb.SubscribeRequest(open=pb.SubscribeOpen(stream=name, credit_bytes=1)),
    "FetchBlocks": lambda name: pb.FetchBlocksRequest(stream=name, count=1),
    "ListFinishedPrompts": lambda name: pb.ListFinishedPromptsRequest(stream=name),
    "PutDictionary": lambda name: pb.PutDictionaryRequest(stream=name, dictionary=b"d"),
    "GetDictionary": lambda name: pb.GetDictionaryRequest(stream=name, digest=bytes(8)),
    "PutAttachment": lambda name: pb.PutAttachmentRequest(stream=name, name="a", content=b"c"),
    "GetAttachment": lambda name: pb.GetAttachmentRequest(stream=name, name="a"),
    "ListAttachments": lambda name: pb.ListAttachmentsRequest(stream=name),
}

ALLOWED: dict[str, set[Permission]] = {
    "CreateStream": {"publish"},
    "GetStream": {"publish", "consume"},
    "DeleteStream": set(),
    "SealStream": {"publish"},
    "Publish": {"publish"},
    "Subscribe": {"consume"},
    "FetchBlocks": {"consume"},
    "ListFinishedPrompts": {"publish", "consume"},
    "PutDictionary": {"publish"},
    "GetDictionary": {"publish", "consume"},
    "PutAttachment": {"publish"},
    "GetAttachment": {"publish", "consume"},
    "ListAttachments": {"publish", "consume"},
}


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens.toml")


@pytest.fixture
def channel_of() -> Iterator[Callable[[RunningServer, str], grpc.Channel]]:
    opened: list[grpc.Channel] = []

    def open_one(server: RunningServer, token: str) -> grpc.Channel:
        opened.append(open_channel(server.server.address, Credentials(token=token)))
        return opened[-1]

    yield open_one
    for channel in opened:
        channel.close()


ChannelOf = Callable[[RunningServer, str], grpc.Channel]


def caller(*scopes: str) -> Caller:
    return Caller("somebody", [Scope.parse(scope) for scope in scopes], CallerLimits(CallerQuota(10)))


def methods() -> list[str]:
    """Full names of every method in the contract that the trace service may have, of every file there is."""
    folder = Path(lynearm.v1.__file__).parent
    # A teacher's service has servers and tokens of its own: `lynearm.teacher.teacher_access`.
    names = {path.name.removesuffix(".py") for path in folder.glob("*_pb2.py")} - {"teacher_service_pb2"}
    assert "trace_service_pb2" in names
    found: list[str] = []
    for name in names:
        module = __import__(f"lynearm.v1.{name}", fromlist=["DESCRIPTOR"])
        for service in module.DESCRIPTOR.services_by_name.values():
            found += [f"/{service.full_name}/{method.name}" for method in service.methods]
    return found


def outcome(channel: grpc.Channel, method: str, request: Any) -> str:
    """The status of a call that sends one message, and takes at most one."""
    start: Any = channel.stream_stream(f"/{SERVICE_NAME}/{method}", type(request).SerializeToString, None)
    call = start(iter([request]), timeout=30)
    try:
        next(iter(call), None)
    except grpc.RpcError as error:
        return code(error)
    call.cancel()
    return "OK"


def test_every_method_of_the_contract_has_a_rule() -> None:
    missing = [method for method in methods() if method not in RULES]
    assert not missing, f"name the permissions of {missing} in access.py"


def test_every_rule_is_of_a_method_and_names_a_permission() -> None:
    ours = {method for method in RULES if method.startswith("/lynearm.")}
    assert ours <= set(methods())
    for method, rule in RULES.items():
        assert rule.permissions, method
        assert set(rule.permissions) <= set(PERMISSIONS), method


def test_only_the_health_service_answers_anybody() -> None:
    assert sorted(OPEN_SERVICES) == ["grpc.health.v1.Health"]


def test_a_method_without_a_rule_is_denied_even_to_an_administrator() -> None:
    with pytest.raises(AccessDeniedError):
        check_caller(caller("admin:*"), f"/{SERVICE_NAME}/SomethingNew")


def test_a_caller_without_scopes_may_call_nothing() -> None:
    for method in RULES:
        with pytest.raises(AccessDeniedError):
            check_caller(caller(), method)


@pytest.mark.parametrize("permission", PERMISSIONS)
def test_each_permission_opens_its_methods_and_no_others(
    start_server: StartServer, tokens: TokenFile, channel_of: ChannelOf, permission: Permission
) -> None:
    create_token = tokens.add("creator", "admin:*")
    token = tokens.add("tested", f"{permission}:s-*")
    server = start_server(tokens=tokens.path)
    creator, tested = TraceServiceStub(channel_of(server, create_token)), channel_of(server, token)
    for number, (method, allowed) in enumerate(ALLOWED.items()):
        stream = f"s-{number}"
        if method != "CreateStream":
            create(creator, stream)
        found = outcome(tested, method, REQUESTS[method](stream))
        if permission == "admin" or permission in allowed:
            # What is asked for may be missing; what counts is that the method was reached.
            assert found in ("OK", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT"), method
        else:
            assert found == "PERMISSION_DENIED", method


def test_the_table_above_speaks_of_every_method_on_a_stream() -> None:
    on_streams = {name.rpartition("/")[2] for name, rule in RULES.items() if rule.target is not None}
    assert on_streams >= set(ALLOWED) == set(REQUESTS)


def test_a_scope_ends_at_its_prefix(
    start_server: StartServer, tokens: TokenFile, channel_of: ChannelOf
) -> None:
    token = tokens.add("team-a", "admin:team-a.*", "consume:shared")
    server = start_server(tokens=tokens.path)
    channel = channel_of(server, token)
    # Whether it exists or not, the answer is the same.
    create(TraceServiceStub(channel_of(server, add_token(server, tokens, "admin", "admin:*"))), "team-b.x")
    for method, stream in itertools.product(ALLOWED, ("team-b.x", "team-a", "team-c.absent", "", "../x")):
        assert outcome(channel, method, REQUESTS[method](stream)) == "PERMISSION_DENIED", (method, stream)
    assert outcome(channel, "CreateStream", REQUESTS["CreateStream"]("team-a.1")) == "OK"
    assert outcome(channel, "Publish", REQUESTS["Publish"]("shared")) == "PERMISSION_DENIED"
    assert outcome(channel, "GetStream", REQUESTS["GetStream"]("shared")) == "NOT_FOUND"


def add_token(server: RunningServer, tokens: TokenFile, name: str, *scopes: str) -> str:
    """A token that the running server has taken over by itself."""
    token = tokens.add(name, *scopes)
    with open_channel(server.server.address, Credentials(token=token)) as channel:
        stub = TraceServiceStub(channel)
        for _ in range(300):
            try:
                stub.ListStreams(pb.ListStreamsRequest(), timeout=30)
            except grpc.RpcError as error:
                if code(error) == "UNAUTHENTICATED":
                    time.sleep(0.1)
                    continue
            return token
    raise AssertionError("the server does not take the token over")


def test_listing_shows_what_one_may_read(
    start_server: StartServer, tokens: TokenFile, channel_of: ChannelOf
) -> None:
    admin = tokens.add("admin", "admin:*")
    readers = {
        "a": (tokens.add("a", "consume:a-*"), ["a-1", "a-2"]),
        "one": (tokens.add("one", "consume:b-1", "publish:*"), ["b-1"]),
        "all": (tokens.add("all", "consume:*"), ["a-1", "a-2", "b-1"]),
    }
    server = start_server(tokens=tokens.path)
    for name in ("a-1", "a-2", "b-1"):
        create(TraceServiceStub(channel_of(server, admin)), name)
    for token, visible in readers.values():
        with TraceClient(server.server.address, credentials=Credentials(token=token)) as client:
            assert [one.spec.name for one in client.list_streams()] == visible
    publisher = add_token(server, tokens, "publisher", "publish:*")
    assert outcome(channel_of(server, publisher), "ListStreams", pb.ListStreamsRequest()) == (
        "PERMISSION_DENIED"
    )


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer lyn_wrong"),),
        (("authorization", "Basic {token}"),),
        (("authorization", "{token}"),),
        (("authorization", "Bearer {token} "),),
        (("authorization", "Bearer  {token}"),),
        (("authorization", "Bearer {token}"), ("authorization", "Bearer {token}")),
        (("authorization-bin", b"Bearer"),),
        (("token", "{token}"),),
        (("authorization", "Bearer " + "x" * 2000),),
    ],
)
def test_whoever_shows_no_token_is_told_so_by_every_method(
    start_server: StartServer, tokens: TokenFile, metadata: tuple[tuple[str, str | bytes], ...]
) -> None:
    token = tokens.add("somebody", "admin:*")
    server = start_server(tokens=tokens.path)
    shown = [(key, value.format(token=token) if isinstance(value, str) else value) for key, value in metadata]
    for method in [f"/{SERVICE_NAME}/{name}" for name in (*ALLOWED, "ListStreams", "SomethingNew")]:
        start: Any = server.channel.stream_stream(method, None, None)
        with pytest.raises(grpc.RpcError) as caught:
            list(start(iter([b""]), metadata=shown, timeout=30))
        expected = "UNIMPLEMENTED" if method.endswith("New") else "UNAUTHENTICATED"
        assert code(caught.value) == expected, method


def test_a_client_with_a_token_gets_what_it_came_for(start_server: StartServer, tokens: TokenFile) -> None:
    teacher, student = tokens.add("teacher", "publish:s"), tokens.add("student", "consume:s")
    server = start_server(tokens=tokens.path)
    address = server.server.address
    with (
        TraceClient(address, credentials=Credentials(token=teacher)) as publishing,
        TraceClient(address, credentials=Credentials(token=student)) as reading,
    ):
        publishing.create_stream(make_spec())
        with publishing.publisher("s", "p") as publisher:
            publisher.publish(make_block(1))
        assert [bytes(one.block) for one in reading.subscribe("s", follow=False)] == [make_block(1)]
        with pytest.raises(AccessDeniedError, match=r"student.*delete|student.*DeleteStream"):
            reading.delete_stream("s")
    with TraceClient(address, credentials=Credentials()) as nobody, pytest.raises(AuthenticationError):
        nobody.list_streams()


def test_a_revoked_token_ends_its_calls_and_no_others(
    start_server: StartServer, tokens: TokenFile, channel_of: ChannelOf
) -> None:
    kept, revoked = tokens.add("kept", "admin:*"), tokens.add("revoked", "admin:*")
    server = start_server(tokens=tokens.path)
    stub, other = TraceServiceStub(channel_of(server, kept)), TraceServiceStub(channel_of(server, revoked))
    create(stub)
    readers = [Reader(one) for one in (stub, other)]
    producer = Producer(other)
    producer.send(1, make_block(1))
    for reader in readers:
        assert reader.next().offset == 0
    lines = tokens.path.read_text().split("[[tokens]]")
    tokens.path.write_text("[[tokens]]".join(lines[:2]))
    assert producer.acks(1) == {1: 0}
    assert (code(producer.error()), code(readers[1].error())) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
    with pytest.raises(grpc.RpcError) as caught:
        create(other, "t")
    assert error_name(caught.value) == "AuthenticationError"
    publish(stub, [2], producer_id="q")
    assert readers[0].next().offset == 1
    readers[0].cancel()


def test_a_call_names_its_stream_once(
    start_server: StartServer, tokens: TokenFile, channel_of: ChannelOf
) -> None:
    admin, token = tokens.add("admin", "admin:*"), tokens.add("narrow", "publish:mine")
    server = start_server(tokens=tokens.path)
    for name in ("mine", "theirs"):
        create(TraceServiceStub(channel_of(server, admin)), name)
    start: Any = channel_of(server, token).stream_stream(
        f"/{SERVICE_NAME}/Publish", pb.PublishRequest.SerializeToString, pb.PublishResponse.FromString
    )
    openings = [
        pb.PublishRequest(open=pb.PublishOpen(stream=name, producer_id="p")) for name in ("mine", "theirs")
    ]
    with pytest.raises(grpc.RpcError) as caught:
        list(start(iter(openings), timeout=30))
    assert code(caught.value) == "INVALID_ARGUMENT"
    # The same field twice in one message: protobuf takes the last, and so must the check.
    both = b"".join(one.SerializeToString() for one in openings)
    start = channel_of(server, token).stream_stream(f"/{SERVICE_NAME}/Publish", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        list(start(iter([both]), timeout=30))
    assert code(caught.value) in ("PERMISSION_DENIED", "INVALID_ARGUMENT")
