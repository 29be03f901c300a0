"""Both clients over TLS, with a token, against a server that asks for certificates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from lynearm.client import AsyncTraceClient, Credentials, TlsConfig, TraceClient
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import ConfigError, ServiceUnavailableError

TOKEN = "lyn_" + "x" * 43


class Recorder(grpc.GenericRpcHandler):
    """Notes what callers show, and knows no streams."""

    def __init__(self) -> None:
        self.authorizations: list[str] = []
        self.names: list[bytes] = []

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler[Any, Any]:
        def answer(_request: bytes, context: grpc.ServicerContext) -> bytes:
            metadata = dict(handler_call_details.invocation_metadata)
            self.authorizations.append(str(metadata.get("authorization", "")))
            self.names.extend(context.auth_context().get("x509_subject_alternative_name", ()))
            return pb.ListStreamsResponse().SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)


class Secured:
    """A server with a certificate, and the files of one that may call it."""

    def __init__(self, folder: Path) -> None:
        ca = trustme.CA()
        server, caller = ca.issue_cert("localhost"), ca.issue_cert("trainer@example.org")
        self.ca, self.certificate, self.key = (folder / name for name in ("ca.pem", "me.pem", "me.key"))
        ca.cert_pem.write_to_path(str(self.ca))
        caller.cert_chain_pems[0].write_to_path(str(self.certificate))
        caller.private_key_pem.write_to_path(str(self.key))
        self.recorder = Recorder()
        self._server = grpc.server(ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers((self.recorder,))
        pair = (server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())
        credentials = grpc.ssl_server_credentials((pair,), ca.cert_pem.bytes(), require_client_auth=True)
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    server = Secured(tmp_path_factory.mktemp("certificates"))
    yield server
    server.close()


def list_streams(kind: type[TraceClient | AsyncTraceClient], target: str, credentials: Credentials) -> object:
    client = kind(target, credentials=credentials)
    if isinstance(client, TraceClient):
        with client:
            return client.list_streams()

    async def scenario() -> object:
        async with client:
            return await client.list_streams()

    return asyncio.run(scenario())


@pytest.mark.parametrize("kind", [TraceClient, AsyncTraceClient])
def test_certificates_and_a_token_are_shown(
    secured: Secured, kind: type[TraceClient | AsyncTraceClient]
) -> None:
    secured.recorder.authorizations.clear()
    secured.recorder.names.clear()
    for host, server_name in (("localhost", ""), ("127.0.0.1", "localhost")):
        tls = TlsConfig(secured.ca, secured.certificate, secured.key, server_name)
        credentials = Credentials(tls, token=TOKEN)
        assert list_streams(kind, f"{host}:{secured.port}", credentials) == []
    assert secured.recorder.authorizations == [f"Bearer {TOKEN}"] * 2
    assert secured.recorder.names == [b"trainer@example.org"] * 2


@pytest.mark.parametrize("kind", [TraceClient, AsyncTraceClient])
def test_a_server_that_nobody_vouches_for_is_not_talked_to(
    secured: Secured, kind: type[TraceClient | AsyncTraceClient], tmp_path: Path
) -> None:
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(str(stranger))
    secured.recorder.authorizations.clear()
    tls = TlsConfig(stranger, secured.certificate, secured.key)
    with pytest.raises(ServiceUnavailableError):
        list_streams(kind, f"localhost:{secured.port}", Credentials(tls, token=TOKEN))
    assert secured.recorder.authorizations == []


@pytest.mark.parametrize("kind", [TraceClient, AsyncTraceClient])
def test_files_that_are_missing_are_named(
    secured: Secured, kind: type[TraceClient | AsyncTraceClient], tmp_path: Path
) -> None:
    for credentials in (
        Credentials(TlsConfig(tmp_path / "absent.pem")),
        Credentials(TlsConfig(secured.ca), token_file=tmp_path / "absent.token"),
    ):
        with pytest.raises(ConfigError, match=r"absent\.(pem|token)"):
            list_streams(kind, f"localhost:{secured.port}", credentials)
