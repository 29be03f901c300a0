"""Who may ask a served teacher: whoever shows one of its tokens, over TLS, or whoever is on this machine."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from lynearm.teacher.serving_config import ServeTeacherConfig
from lynearm.wire.addresses import host_of, is_loopback
from lynearm.wire.errors import AuthenticationError, ConfigError, LynearmError
from lynearm.wire.status import shorten, trailing_metadata

logger = logging.getLogger(__name__)

MAX_TOKENS = 1000
"""Each call looks at all."""

_TOKEN = re.compile(r"[\x21-\x7e]{16,512}")

_OPEN_SERVICE = "/grpc.health.v1.Health/"
"""Answers anybody: a load balancer has no token."""

# Any: handlers of every method pass through here; gRPC types them by their serialisers.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def server_credentials(config: ServeTeacherConfig) -> grpc.ServerCredentials | None:
    """What the server listens with; None for plain text. Reads the files.

    Raises:
        ConfigError: if one cannot be read.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    pair = (_read(config.tls_key), _read(config.tls_cert))
    client_ca = None if config.tls_client_ca is None else _read(config.tls_client_ca)
    return grpc.ssl_server_credentials(
        [pair], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def warn_if_open(config: ServeTeacherConfig) -> None:
    """Say aloud what --insecure means."""
    if is_loopback(host_of(config.bind)):
        return
    if config.token_file is None and config.tls_client_ca is None:
        logger.warning("without tokens, anybody who reaches %s may use the teacher", config.bind)
    if config.tls_cert is None:
        logger.warning(
            "without TLS, prompts, completions and tokens cross the network to %s in plain text", config.bind
        )


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without one of the tokens of a file.

    Args:
        path: Tokens, one a line; blank lines and those that begin with # are passed over.

    Raises:
        ConfigError: if it cannot be read, holds none, or something that is no token.
    """

    def __init__(self, path: Path) -> None:
        lines = [line.strip() for line in _read(path).decode("utf-8", "replace").splitlines()]
        tokens = [(number, line) for number, line in enumerate(lines, 1) if line and line[0] != "#"]
        if not 0 < len(tokens) <= MAX_TOKENS:
            raise ConfigError(
                f"{path} holds {len(tokens)} tokens, expected 1 to {MAX_TOKENS}", "write one a line"
            )
        for number, token in tokens:
            if _TOKEN.fullmatch(token) is None:
                # Not shown: it may be one, mistyped.
                raise ConfigError(
                    f"{path}:{number} is not a token",
                    "write 16 to 512 printable ASCII characters without spaces, for example those of "
                    "`openssl rand -hex 32`",
                )
        self._digests = [_digest(token) for _, token in tokens]

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """The method's handler, or one that refuses."""
        handler = await continuation(handler_call_details)
        details: Any = handler_call_details  # its stub names no attributes
        method, metadata = str(details.method), details.invocation_metadata or ()
        if handler is None or method.startswith(_OPEN_SERVICE) or self._knows(metadata):
            return handler
        return _refusing(handler)

    def _knows(self, metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        values = [value for key, value in metadata if key == "authorization" and isinstance(value, str)]
        scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        shown = _digest(token)
        # All are compared, so that the time does not tell which one was nearly right.
        found = [hmac.compare_digest(shown, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(found)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: LynearmError) -> None:
    """End a call with the status of an error, and what a client needs to raise it again."""
    code = grpc.StatusCode[error.status_code]
    await context.abort(code, shorten(error.message), trailing_metadata(error))


def _refusing(handler: _Handler) -> _Handler:
    async def refuse(_request: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort(
            context,
            AuthenticationError(
                "the call carries no token that this teacher knows",
                "name the file that holds yours with --token-file or LYNEARM_TOKEN_FILE",
            ),
        )

    shape: Any = handler
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[shape.request_streaming, shape.response_streaming]
    return cast("_Handler", make(refuse, shape.request_deserializer, shape.response_serializer))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "name a readable file") from error
