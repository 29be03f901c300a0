"""Who a client believes it talks to, and who it says that it is.

A token is sent over TLS, or to this very machine, and never otherwise. Files are read when a channel opens
(certificates) or a call begins (token), so that what rotates them restarts nobody, and what is pickled holds
paths in their place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import grpc

from lynearm.wire.addresses import host_of, is_loopback
from lynearm.wire.errors import ConfigError

TLS_CA_VARIABLE = "LYNEARM_TLS_CA"
"""Environment variable: PEM file of the authorities that may vouch for the service, or "system"."""

TLS_CERT_VARIABLE = "LYNEARM_TLS_CERT"
"""Environment variable: PEM file of the client's certificate chain, for a service that asks for one."""

TLS_KEY_VARIABLE = "LYNEARM_TLS_KEY"
"""Environment variable: PEM file of its private key."""

TLS_SERVER_NAME_VARIABLE = "LYNEARM_TLS_SERVER_NAME"
"""Environment variable: name in the service's certificate, where it is not the host of the address."""

TOKEN_FILE_VARIABLE = "LYNEARM_TOKEN_FILE"
"""Environment variable: file with the bearer token."""

TOKEN_VARIABLE = "LYNEARM_TOKEN"
"""Environment variable: the bearer token itself, for platforms that hand out secrets so."""

SYSTEM_AUTHORITIES = "system"
"""In place of a CA file: the authorities that gRPC brings with it."""

_TOKEN = re.compile(r"[\x21-\x7e]{1,512}")
_MAX_FILE_BYTES = 1 << 20

Metadata: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """How a channel is encrypted, and by whom both ends are vouched for."""

    root_ca: Path | None = None
    """PEM file of the authorities that may vouch for the service; None: those that gRPC brings with it."""

    certificate: Path | None = None
    """PEM file of the client's own certificate chain, for a service that asks for one."""

    key: Path | None = None
    """PEM file of its private key."""

    server_name: str = ""
    """Name that the service's certificate bears, where it is not the host of the address."""

    def __post_init__(self) -> None:
        """Check that certificate and key come together."""
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a client certificate needs its key, and a key its certificate", "give both")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client shows and what it asks to see.

    Raises:
        ConfigError: if there are two tokens, or what is given is none.
    """

    tls: TlsConfig | None = None
    """None: plain text, which suits a service on this machine or behind a tunnel."""

    token: str = field(default="", repr=False)
    """Bearer token. Prefer `token_file`: it is read anew for each call, and no pickle holds it."""

    token_file: Path | None = None
    """File with the bearer token, alone on its first line."""

    def __post_init__(self) -> None:
        """Check the token."""
        if self.token and self.token_file is not None:
            raise ConfigError("a token and a token file are given", "choose one")
        if self.token:
            _check_token(self.token, "the token")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Credentials:
        """What the variables named in this module say; an empty one counts as absent.

        Raises:
            ConfigError: if they contradict each other.
        """

        def path(name: str) -> Path | None:
            return Path(environment[name]).expanduser() if environment.get(name) else None

        root_ca, certificate = environment.get(TLS_CA_VARIABLE), path(TLS_CERT_VARIABLE)
        server_name = environment.get(TLS_SERVER_NAME_VARIABLE, "")
        tls = None
        if root_ca:
            ca_file = None if root_ca == SYSTEM_AUTHORITIES else path(TLS_CA_VARIABLE)
            tls = TlsConfig(ca_file, certificate, path(TLS_KEY_VARIABLE), server_name)
        elif certificate is not None or path(TLS_KEY_VARIABLE) is not None or server_name:
            raise ConfigError(
                f"the environment speaks of TLS but lacks {TLS_CA_VARIABLE}",
                f"set it to a PEM file, or to {SYSTEM_AUTHORITIES!r}",
            )
        return cls(tls, environment.get(TOKEN_VARIABLE, ""), path(TOKEN_FILE_VARIABLE))

    def check_target(self, target: str) -> None:
        """Refuse to send a token where others could read it.

        Raises:
            ConfigError: if there is a token, no TLS, and the target is another machine.
        """
        has_token = bool(self.token) or self.token_file is not None
        if has_token and self.tls is None and not is_loopback(host_of(target)):
            raise ConfigError(
                f"a token would go to {target} in plain text",
                f"turn on TLS ({TLS_CA_VARIABLE} or --tls-ca), or use a tunnel that ends on 127.0.0.1",
            )

    def call_metadata(self) -> Metadata:
        """What each call must carry; holds the token.

        Raises:
            ConfigError: if the token file cannot be read or holds no token.
        """
        token = self.token
        if self.token_file is not None:
            first_line = _read(self.token_file).decode("ascii", "replace").partition("\n")[0].strip()
            token = _check_token(first_line, f"the first line of {self.token_file}")
        return (("authorization", f"Bearer {token}"),) if token else ()

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """What a secure channel is opened with, sync or aio; None for plain text. Reads the files.

        Raises:
            ConfigError: if one cannot be read.
        """
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            _read_optional(self.tls.root_ca),
            _read_optional(self.tls.key),
            _read_optional(self.tls.certificate),
        )

    def channel_options(self) -> tuple[tuple[str, str], ...]:
        """Options that a channel needs besides."""
        name = self.tls.server_name if self.tls is not None else ""
        return (("grpc.ssl_target_name_override", name),) if name else ()


def open_channel(
    target: str, credentials: Credentials, options: tuple[tuple[str, int], ...] = ()
) -> grpc.Channel:
    """A channel on which every call carries the token, if there is one.

    Args:
        target: host:port.
        credentials: Of the client.
        options: Further gRPC options.

    Raises:
        ConfigError: if a file cannot be read, or the token would go out in plain text.
    """
    credentials.check_target(target)
    all_options = (*options, *credentials.channel_options())
    secure = credentials.channel_credentials()
    if secure is None:
        channel = grpc.insecure_channel(target, options=all_options)
    else:
        channel = grpc.secure_channel(target, secure, options=all_options)
    if not credentials.token and credentials.token_file is None:
        return channel
    return grpc.intercept_channel(channel, _TokenInterceptor(credentials))


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


# Any: an interceptor passes on what it is given, of whatever kind of call.
_Continue: TypeAlias = Callable[[Any, Any], Any]


class _TokenInterceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to the metadata of each call; messages pass it by."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def intercept_unary_unary(self, continuation: _Continue, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)

    intercept_unary_stream = intercept_unary_unary

    def intercept_stream_unary(
        self, continuation: _Continue, client_call_details: Any, request_iterator: Iterator[Any]
    ) -> Any:
        return continuation(self._with_token(client_call_details), request_iterator)

    intercept_stream_stream = intercept_stream_unary

    def _with_token(self, details: Any) -> _CallDetails:
        metadata = (*(details.metadata or ()), *self._credentials.call_metadata())
        return _CallDetails(
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )


def _check_token(token: str, where: str) -> str:
    # The message must not say what the token is.
    if _TOKEN.fullmatch(token) is None:
        raise ConfigError(
            f"{where} is not a token", "use what `lynearm tokens new` printed: printable ASCII without spaces"
        )
    return token


def _read_optional(path: Path | None) -> bytes | None:
    return None if path is None else _read(path)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "name a readable file") from error
