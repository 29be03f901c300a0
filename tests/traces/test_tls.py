"""TLS on real sockets: who is let in, and certificates that change while a server runs."""

from __future__ import annotations

import logging
import socket
import ssl
from pathlib import Path

import pytest
from traces.certificates import CertificateFiles
from traces.harness import RunningServer, StartServer, make_block, make_spec

from lynearm.client import Credentials, TlsConfig, TraceClient
from lynearm.traces.config import ServeConfig
from lynearm.wire.errors import ConfigError, ServiceUnavailableError


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    return CertificateFiles(tmp_path / "tls")


def start_tls(start_server: StartServer, files: CertificateFiles, **config: object) -> RunningServer:
    return start_server(tls_cert=files.cert, tls_key=files.key, **config)


def client(server: RunningServer, tls: TlsConfig | None) -> TraceClient:
    return TraceClient(server.server.address, timeout_seconds=20, credentials=Credentials(tls))


def serial_number(server: RunningServer, files: CertificateFiles) -> str:
    """Of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=files.ca)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", server.server.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as encrypted,
    ):
        certificate = encrypted.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])


def test_blocks_go_both_ways_over_tls(start_server: StartServer, files: CertificateFiles) -> None:
    server = start_tls(start_server, files)
    with client(server, TlsConfig(files.ca)) as traces:
        traces.create_stream(make_spec())
        with traces.publisher("s", "p") as publisher:
            publisher.publish(make_block(1, 500_000))
        assert [bytes(one.block) for one in traces.subscribe("s", follow=False)] == [make_block(1, 500_000)]
        assert [bytes(one.block) for one in traces.fetch("s", 0)] == [make_block(1, 500_000)]


def test_a_client_without_tls_or_of_another_authority_is_not_served(
    start_server: StartServer, files: CertificateFiles, tmp_path: Path
) -> None:
    server = start_tls(start_server, files)
    others = CertificateFiles(tmp_path / "others")
    for tls in (None, TlsConfig(), TlsConfig(others.ca)):
        with client(server, tls) as traces, pytest.raises(ServiceUnavailableError):
            traces.list_streams()


def test_a_server_under_another_name_needs_an_override(
    start_server: StartServer, files: CertificateFiles
) -> None:
    files.issue_server("traces.example")
    server = start_tls(start_server, files)
    with client(server, TlsConfig(files.ca)) as traces, pytest.raises(ServiceUnavailableError):
        traces.list_streams()
    with client(server, TlsConfig(files.ca, server_name="traces.example")) as traces:
        assert traces.list_streams() == []


def test_only_clients_with_a_certificate_get_in_where_one_is_asked_for(
    start_server: StartServer, files: CertificateFiles, tmp_path: Path
) -> None:
    server = start_tls(start_server, files, tls_client_ca=files.ca)
    with client(server, TlsConfig(files.ca, files.client_cert, files.client_key)) as traces:
        assert traces.list_streams() == []
    others = CertificateFiles(tmp_path / "others")
    for tls in (TlsConfig(files.ca), TlsConfig(files.ca, others.client_cert, others.client_key)):
        with client(server, tls) as traces, pytest.raises(ServiceUnavailableError):
            traces.list_streams()


def test_a_new_certificate_is_shown_to_new_connections_and_old_ones_go_on(
    start_server: StartServer, files: CertificateFiles
) -> None:
    server = start_tls(start_server, files)
    before = serial_number(server, files)
    with client(server, TlsConfig(files.ca)) as traces:
        traces.create_stream(make_spec())
        blocks = traces.subscribe("s")
        publisher = traces.publisher("s", "p")
        publisher.publish(make_block(1))
        assert next(blocks).offset == 0
        files.issue_server()
        after = serial_number(server, files)
        publisher.publish(make_block(2))
        assert next(blocks).offset == 1
        publisher.close()
        blocks.close()
    assert after != before
    with client(server, TlsConfig(files.ca)) as traces:
        assert traces.get_stream("s").next_offset == 2


def test_new_authorities_of_clients_take_effect(
    start_server: StartServer, files: CertificateFiles, tmp_path: Path
) -> None:
    others = CertificateFiles(tmp_path / "others")
    server = start_tls(start_server, files, tls_client_ca=files.ca)
    theirs = TlsConfig(files.ca, others.client_cert, others.client_key)
    with client(server, theirs) as traces, pytest.raises(ServiceUnavailableError):
        traces.list_streams()
    files.ca.write_bytes(files.ca.read_bytes() + others.ca.read_bytes())
    with client(server, theirs) as traces:
        assert traces.list_streams() == []


@pytest.mark.parametrize("how", ["not PEM", "empty", "of another key", "gone"])
def test_a_broken_new_file_is_logged_once_and_the_certificate_stays(
    start_server: StartServer,
    files: CertificateFiles,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    server = start_tls(start_server, files)
    before = serial_number(server, files)
    with caplog.at_level(logging.INFO, "lynearm"):
        if how == "gone":
            files.key.unlink()
        elif how == "of another key":
            files.key.write_bytes(CertificateFiles(tmp_path / "others").key.read_bytes())
        else:
            files.cert.write_text("no certificate" if how == "not PEM" else "")
        assert [serial_number(server, files) for _ in range(3)] == [before] * 3
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        assert "certificate in use stays" in errors[0].getMessage()
        files.issue_server()
        assert serial_number(server, files) != before
    assert "is in use" in caplog.records[-1].getMessage()


def test_files_that_cannot_be_used_end_the_start(start_server: StartServer, files: CertificateFiles) -> None:
    for field, problem in (("tls_cert", "cannot be used"), ("tls_client_ca", "cannot be used")):
        broken = files.ca.with_name("broken.pem")
        broken.write_text("nothing")
        config = {"tls_cert": files.cert, "tls_key": files.key, field: broken}
        with pytest.raises(ConfigError, match=problem):
            start_server(**config)
    with pytest.raises(ConfigError, match=r"absent\.pem"):
        start_server(tls_cert=files.cert.with_name("absent.pem"), tls_key=files.key)


def test_a_key_with_a_pass_phrase_is_refused_and_nobody_is_asked(
    start_server: StartServer, files: CertificateFiles
) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"pass phrase"),
        )
    )
    with pytest.raises(ConfigError, match="unencrypted key"):
        start_tls(start_server, files)


def test_tls_settings_come_together(tmp_path: Path) -> None:
    for settings in ({"tls_cert": tmp_path}, {"tls_key": tmp_path}, {"tls_client_ca": tmp_path}):
        with pytest.raises(ConfigError, match=r"tls_cert"):
            ServeConfig(**settings)


def test_only_recent_versions_of_tls_are_spoken(start_server: StartServer, files: CertificateFiles) -> None:
    server = start_tls(start_server, files)

    def version(oldest: ssl.TLSVersion, newest: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=files.ca)
        context.set_alpn_protocols(["h2"])
        context.set_ciphers("ALL:@SECLEVEL=0")  # this end would speak anything
        context.minimum_version, context.maximum_version = oldest, newest
        with (
            socket.create_connection(("127.0.0.1", server.server.port), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as encrypted,
        ):
            return encrypted.version()

    versions = ssl.TLSVersion
    assert version(versions.TLSv1_2, versions.TLSv1_3) == "TLSv1.3"
    assert version(versions.TLSv1_2, versions.TLSv1_2) == "TLSv1.2"
    with pytest.warns(DeprecationWarning, match="deprecated"), pytest.raises(ssl.SSLError):
        version(versions.TLSv1, versions.TLSv1_1)
