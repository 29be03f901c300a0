"""Bearer tokens: who holds one, and what it is good for.

Invariants:

- What is not granted is denied.
- The service knows hashes, never tokens. A token has 256 random bits, so that a plain SHA-256 hides it.
- A presented token is compared with every known hash, in constant time.
- A revoked or expired token's running calls end too.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import re
import secrets
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias, cast, get_args

from lynearm.traces.limits import CallerLimits, CallerQuota
from lynearm.wire.errors import ConfigError, LynearmError
from lynearm.wire.specs import check_name

Permission: TypeAlias = Literal["publish", "consume", "admin"]
"""publish: make, fill and seal streams. consume: read them. admin: both, and delete them."""

PERMISSIONS: tuple[Permission, ...] = get_args(Permission)

MAX_TOKENS = 1000
"""Each call looks at all: a thousand take less than a millisecond."""

_PREFIX = "lyn_"
"""Begins every token, so that scanners for leaked secrets find them."""

_TOKEN = re.compile(_PREFIX + r"[A-Za-z0-9_-]{16,}")
_STREAMS = re.compile(r"[a-z0-9._-]{0,128}\*?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = (
    "name",
    "sha256",
    "scopes",
    "expires",
    "requests_per_second",
    "publish_bytes_per_second",
    "max_calls",
)


@dataclass(frozen=True, slots=True)
class Scope:
    """Something that a token is good for."""

    permission: Permission
    streams: str
    """Name of a stream, or the beginning of names followed by `*`."""

    @classmethod
    def parse(cls, text: str) -> Scope:
        """A scope as people write it: publish:math, consume:team-a.*, admin:*.

        Raises:
            ConfigError: if it is none.
        """
        permission, _, streams = text.partition(":")
        if permission not in PERMISSIONS or not streams or _STREAMS.fullmatch(streams) is None:
            raise ConfigError(
                f"scope {text[:140]!r} is not known",
                f"write {', '.join(PERMISSIONS)}, a colon, and the name of a stream, the beginning of names "
                "followed by *, or *; for example publish:math-*",
            )
        return cls(permission, streams)

    def covers(self, permission: Permission, stream: str | None) -> bool:
        """Whether it grants the permission on a stream; None asks about any stream at all."""
        if self.permission not in (permission, "admin"):
            return False
        if stream is None:
            return True
        if self.streams.endswith("*"):
            return stream.startswith(self.streams[:-1])
        return stream == self.streams

    def __str__(self) -> str:
        return f"{self.permission}:{self.streams}"


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A line of the tokens file."""

    name: str
    """Whose token it is; appears in logs and metrics."""
    sha256: bytes
    scopes: tuple[Scope, ...]
    expires_unix_seconds: float | None
    quota: CallerQuota
    """0: the server's default."""


class Caller:
    """Whoever holds one token; all its calls share the limits.

    Args:
        name: Of the token.
        scopes: What it is good for.
        limits: What its calls share.
        expires_unix_seconds: When it ends; None: never.
    """

    def __init__(
        self,
        name: str,
        scopes: Sequence[Scope],
        limits: CallerLimits,
        expires_unix_seconds: float | None = None,
    ) -> None:
        self.name = name
        self.limits = limits
        self._scopes = tuple(scopes)
        self._expires_unix_seconds = expires_unix_seconds
        self._revoked = asyncio.Event()

    def may(self, permission: Permission, stream: str | None = None) -> bool:
        """Whether a scope grants the permission on a stream; None asks about any stream at all."""
        return any(scope.covers(permission, stream) for scope in self._scopes)

    @property
    def is_valid(self) -> bool:
        """Whether the token still is one."""
        expires = self._expires_unix_seconds
        return not self._revoked.is_set() and (expires is None or time.time() < expires)

    def revoke(self) -> None:
        """End the token, and the calls that wait for its end."""
        self._revoked.set()

    async def wait_revoked(self) -> None:
        """Wait until `revoke` is called."""
        await self._revoked.wait()


def new_token() -> str:
    """A token that nobody can guess."""
    return _PREFIX + secrets.token_urlsafe(32)


def token_sha256(token: str) -> bytes:
    """What the service knows of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def redact(text: str) -> str:
    """The text without what may be a token in it."""
    return _TOKEN.sub(_PREFIX + "…", text)


def find_entry(entries: Iterable[TokenEntry], token: str) -> TokenEntry | None:
    """The entry of a token. Takes the same time whatever the token, and wherever its entry stands."""
    presented, found = token_sha256(token), None
    for entry in entries:
        if hmac.compare_digest(entry.sha256, presented):
            found = entry
    return found


def format_entry(name: str, token: str, scopes: Sequence[Scope]) -> str:
    """The lines of the tokens file for a new token; they do not reveal it."""
    quoted = ", ".join(f'"{scope}"' for scope in scopes)
    return f'[[tokens]]\nname = "{name}"\nsha256 = "{token_sha256(token).hex()}"\nscopes = [{quoted}]\n'


def parse_tokens(text: str, where: str) -> tuple[TokenEntry, ...]:
    """The entries of a tokens file.

    Args:
        text: TOML: an array of tables `tokens`.
        where: Names the file in errors.

    Raises:
        ConfigError: naming the entry that is wrong, and never what may be a token.
    """
    try:
        return _parse_document(text, where)
    except ConfigError as error:
        # People put tokens where names or hashes belong. Not chained: a traceback would show the original.
        raise ConfigError(redact(error.message), error.remedy) from None


def _parse_document(text: str, where: str) -> tuple[TokenEntry, ...]:
    try:
        document: dict[str, object] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{where} is not TOML: {error}", "see docs/security.md for an example") from error
    tables = document.pop("tokens", [])
    if document or not isinstance(tables, list):
        raise ConfigError(f"{where} holds something besides [[tokens]]", "remove it")
    entries = tuple(
        _parse_entry(table, f"{where}, token {number}")
        for number, table in enumerate(cast("list[object]", tables), 1)
    )
    if len(entries) > MAX_TOKENS:
        raise ConfigError(f"{where} holds {len(entries)} tokens, at most {MAX_TOKENS} may be", "remove some")
    for what, values in (
        ("name", {entry.name for entry in entries}),
        ("sha256", {e.sha256 for e in entries}),
    ):
        if len(values) < len(entries):
            raise ConfigError(f"{where} holds two tokens of the same {what}", "remove one")
    return entries


def _parse_entry(value: object, where: str) -> TokenEntry:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is not a table", "begin each entry with [[tokens]]")
    table = cast("Mapping[str, object]", value)
    unknown = sorted(set(table) - set(_KEYS))
    if unknown:
        raise ConfigError(f"{where}: there is no key {unknown[0]!r}", f"use {', '.join(_KEYS)}")
    name, digest = table.get("name"), table.get("sha256")
    if not isinstance(name, str):
        raise ConfigError(f"{where} has no name", "say whose it is")
    if not isinstance(digest, str) or _SHA256.fullmatch(digest) is None:
        # Not shown: somebody may have put the token itself there.
        raise ConfigError(f"{where}: sha256 is not 64 hexadecimal digits", "use `lynearm tokens new`")
    quota = CallerQuota(
        math.ceil(_positive(table, "max_calls", where)),
        _positive(table, "requests_per_second", where),
        _positive(table, "publish_bytes_per_second", where),
    )
    try:
        return TokenEntry(
            check_name(name, what="token name"),
            bytes.fromhex(digest),
            _parse_scopes(table.get("scopes")),
            _parse_expiry(table.get("expires")),
            quota,
        )
    except LynearmError as error:
        raise ConfigError(f"{where}: {error.message}", error.remedy) from error


def _parse_scopes(value: object) -> tuple[Scope, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError("scopes is not a list of scopes", 'for example ["publish:math-*"]')
    return tuple(Scope.parse(str(one)) for one in cast("list[object]", value))


def _parse_expiry(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ConfigError("expires is not a time with its zone", "for example 2030-01-31T00:00:00Z")
    return value.timestamp()


def _positive(table: Mapping[str, object], key: str, where: str) -> float:
    value = table.get(key)
    if value is None:
        return 0.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ConfigError(f"{where}: {key} is {value!r}, expected a number above 0", "leave it out for none")
    return float(value)
