"""Certificates of an authority that lives as long as a test, and tokens, as files."""

from __future__ import annotations

from pathlib import Path

import trustme

from lynearm.traces.tokens import Scope, format_entry, new_token


class CertificateFiles:
    """PEM files of one authority, a server at 127.0.0.1 and a client."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.authority = trustme.CA()
        self.ca = directory / "ca.pem"
        self.cert = directory / "server.pem"
        self.key = directory / "server.key"
        self.client_cert = directory / "client.pem"
        self.client_key = directory / "client.key"
        self.authority.cert_pem.write_to_path(self.ca)
        self.issue_server()
        client = self.authority.issue_cert("client@example.org")
        _write(client, self.client_cert, self.client_key)

    def issue_server(self, *names: str) -> None:
        """A new certificate of the server, in place of the one before."""
        _write(self.authority.issue_cert(*(names or ("127.0.0.1",))), self.cert, self.key)


class TokenFile:
    """A tokens file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.write_text("")
        self.tokens: dict[str, str] = {}

    def add(self, name: str, *scopes: str, more: str = "") -> str:
        """Add an entry; returns its token."""
        token = self.tokens[name] = new_token()
        entry = format_entry(name, token, [Scope.parse(scope) for scope in scopes])
        self.path.write_text(f"{self.path.read_text()}{entry}{more}\n")
        return token


def _write(issued: trustme.LeafCert, cert: Path, key: Path) -> None:
    cert.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
