"""The server's certificate, and whose clients it accepts; replaced files take effect without a restart.

gRPC asks for the certificate at each new connection. Files that did not change cost a stat each; those that
did are read, checked and used from then on, while open connections go on with what they had. Files that
are broken, or replaced at this very moment, are logged once and leave the certificate as it was.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import grpc

from lynearm.wire.errors import ConfigError

logger = logging.getLogger(__name__)

_Fingerprint: TypeAlias = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a server."""

    certificate: Path
    """The server's certificate chain, its own certificate first."""
    key: Path
    """Its private key, without a pass phrase."""
    client_ca: Path | None = None
    """Authorities that vouch for clients; with it, a client without a certificate is not let in."""


class ServerCertificate:
    """The certificate of one server, followed through its files.

    Args:
        files: Where it is.
        on_reload: Told of each attempt to take over replaced files, and whether it went well; called on
            any thread.

    Raises:
        ConfigError: if a file cannot be read, or they do not belong together.
    """

    def __init__(self, files: TlsFiles, on_reload: Callable[[bool], None] = lambda ok: None) -> None:
        self._files = files
        self._on_reload = on_reload
        self._lock = threading.Lock()
        self._seen = self._fingerprint()
        self._configuration = _load(files)

    def credentials(self) -> grpc.ServerCredentials:
        """What a server listens with."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration, self.current, require_client_authentication=self._files.client_ca is not None
        )

    def current(self) -> grpc.ServerCertificateConfiguration:
        """What the next connection is served with. Never raises."""
        with self._lock:
            seen = self._fingerprint()
            if seen != self._seen:
                self._reload(seen)
            return self._configuration

    def _reload(self, seen: _Fingerprint) -> None:
        try:
            configuration = _load(self._files)
        except ConfigError as error:
            # Noted as seen: what is broken is said once, not at each connection.
            self._seen = seen
            self._on_reload(False)
            logger.error("the new TLS files are not used, the certificate in use stays: %s", error)
            return
        if self._fingerprint() != seen:
            return  # replaced while they were read; the next connection looks again
        self._seen, self._configuration = seen, configuration
        self._on_reload(True)
        logger.info("the TLS certificate in %s is in use", self._files.certificate)

    def _fingerprint(self) -> _Fingerprint:
        paths = (self._files.certificate, self._files.key, self._files.client_ca)
        return tuple(_stat(path) for path in paths if path is not None)


def _stat(path: Path) -> tuple[int, int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0, 0)  # reading it says what is wrong
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _load(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    _check(files)
    try:
        pair = (files.key.read_bytes(), files.certificate.read_bytes())
        client_ca = None if files.client_ca is None else files.client_ca.read_bytes()
    except OSError as error:
        raise _unreadable(error) from error
    # Any: the stubs leave the function without types.
    make: Any = grpc.ssl_server_certificate_configuration
    return cast("grpc.ServerCertificateConfiguration", make([pair], client_ca))


def _check(files: TlsFiles) -> None:
    """Let OpenSSL say what gRPC would only say by refusing every connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A pass phrase, though an empty one: without it OpenSSL asks for one at the terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
    except OSError as error:  # ssl.SSLError is one
        raise _unusable(error, f"{files.certificate} and {files.key}") from error
    if files.client_ca is None:
        return
    try:
        context.load_verify_locations(files.client_ca)
    except OSError as error:
        raise _unusable(error, str(files.client_ca)) from error


def _unusable(error: OSError, what: str) -> ConfigError:
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    return ConfigError(
        f"TLS files {what} cannot be used: {reason}",
        "give PEM files: a certificate chain and its unencrypted key, and the authorities of clients",
    )


def _unreadable(error: OSError) -> ConfigError:
    return ConfigError(f"cannot read the TLS file {error.filename}: {error.strerror}", "name a readable file")
