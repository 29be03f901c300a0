"""Where an object store is: what its URL says, and what comes from the environment.

Credentials come from the environment alone, or from the machine's identity, as obstore finds them: a URL is
seen in process lists and logs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from lynearm.traces.object_errors import first_line
from lynearm.wire.errors import ConfigError, MissingDependencyError

_REQUEST_TIMEOUT = timedelta(seconds=30)
_RETRY_TIMEOUT = timedelta(seconds=30)
_RETRIES = 6

_QUERY_KEYS: Mapping[str, frozenset[str]] = {
    "s3": frozenset({"endpoint", "region", "virtual_hosted_style_request"}),
    "gs": frozenset(),
    "az": frozenset({"endpoint", "account_name"}),
}
"""By scheme, what a URL may say beyond bucket and prefix. No secret is among them."""


@dataclass(frozen=True, slots=True)
class _Location:
    scheme: str
    bucket: str
    prefix: str
    options: Mapping[str, str]


def describe(url: str) -> str:
    """A store's URL without its parameters."""
    location = _parse(url)
    return f"{location.scheme}://{location.bucket}/{location.prefix}".rstrip("/")


def _parse(url: str) -> _Location:
    parts = urlsplit(url)
    known = _QUERY_KEYS.get(parts.scheme)
    if known is None or not parts.netloc or "@" in parts.netloc:
        raise ConfigError(
            f"a block store with scheme {parts.scheme!r} is not a bucket",
            "write s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, or a path",
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in options:
        if name not in known:
            raise ConfigError(
                f"the URL of a block store has a parameter {name!r}, expected {sorted(known) or 'none'}",
                "set credentials in the environment, where no process list shows them",
            )
    return _Location(parts.scheme, parts.netloc, parts.path.strip("/"), options)


def connect(url: str) -> Any:
    """Obstore's store of a bucket and prefix; nothing is sent yet.

    Raises:
        ConfigError: the URL, or what the environment says, cannot be understood.
        MissingDependencyError: obstore is not installed.
    """
    # Any: obstore's stores are a union that each of its functions narrows anew.
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "blocks in an object store need obstore", "pip install 'lynearm[cluster]'"
        ) from error
    location = _parse(url)
    client: dict[str, Any] = {"timeout": _REQUEST_TIMEOUT, "connect_timeout": timedelta(seconds=5)}
    if _names_http(location):
        client["allow_http"] = True
    backoff = {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=3),
        "base": 2,
    }
    # Any: which options a store takes depends on its scheme.
    arguments: dict[str, Any] = {
        "config": dict(location.options) or None,
        "client_options": client,
        "retry_config": {
            "max_retries": _RETRIES,
            "retry_timeout": _RETRY_TIMEOUT,
            "backoff": backoff,
        },
    }
    try:
        return from_url(f"{location.scheme}://{location.bucket}/{location.prefix}", **arguments)
    except (BaseError, ValueError) as error:
        raise ConfigError(
            f"block store {describe(url)}: {first_line(error)}",
            "see docs/operations.md for what the environment must say",
        ) from None


def _names_http(location: _Location) -> bool:
    """Whether an endpoint without TLS was asked for by name: in the URL, or in obstore's environment."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT") if location.scheme == "s3" else ()
    endpoints = [location.options.get("endpoint"), *map(os.environ.get, names)]
    return any(endpoint is not None and endpoint.startswith("http://") for endpoint in endpoints)
