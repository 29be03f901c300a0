"""Finds out who calls: the holder of a token, or, on a server without tokens, anybody at all.

A tokens file that changes is read again within a second or so. One that is broken or gone is logged once and
leaves the tokens as they were: to revoke a token, take its entry out of the file.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from lynearm.traces.current_call import Metadata
from lynearm.traces.limits import CallerLimits, CallerQuota
from lynearm.traces.tokens import Caller, Scope, TokenEntry, find_entry, parse_tokens
from lynearm.wire.errors import AuthenticationError, ConfigError

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""Between two looks at the tokens file, each of which costs a stat."""

MAX_TOKEN_CHARACTERS = 512

_MAX_FILE_BYTES = 4 << 20


class Callers(Protocol):
    """Whom a server knows."""

    def identify(self, metadata: Metadata, peer: str) -> Caller:
        """Who makes a call.

        Args:
            metadata: That came with it.
            peer: Where it comes from, as gRPC says it.

        Raises:
            AuthenticationError: if nobody is known who does.
        """
        ...


class AnonymousCallers:
    """Everybody may do everything; limits are shared by the calls from one address.

    Args:
        quota: Of each address.
    """

    def __init__(self, quota: CallerQuota) -> None:
        self._quota = quota
        self._by_host: dict[str, Caller] = {}

    def identify(self, metadata: Metadata, peer: str) -> Caller:
        """See `Callers.identify`."""
        host = peer_host(peer)
        if host not in self._by_host:
            # Those that are idle would start afresh anyway, but for less than a second's slack.
            self._by_host = {name: one for name, one in self._by_host.items() if not one.limits.is_idle}
            self._by_host[host] = Caller(host, (Scope("admin", "*"),), CallerLimits(self._quota))
        return self._by_host[host]


class TokenCallers:
    """The holders of the tokens in a file. `follow` must run for changes to be seen.

    Args:
        path: The file, as `tokens.parse_tokens` reads it.
        quota: Of a token whose entry names none.
        on_reload: Told whether a changed file was taken over.

    Raises:
        ConfigError: if it cannot be read or is wrong.
    """

    def __init__(
        self, path: Path, quota: CallerQuota, on_reload: Callable[[bool], None] = lambda ok: None
    ) -> None:
        self._path = path
        self._quota = quota
        self._on_reload = on_reload
        self._callers: dict[TokenEntry, Caller] = {}
        self._seen = self._fingerprint()
        self._take_over(parse_tokens(_read(path), str(path)))

    def identify(self, metadata: Metadata, peer: str) -> Caller:
        """See `Callers.identify`."""
        entry = find_entry(self._callers, bearer_token(metadata))
        caller = None if entry is None else self._callers[entry]
        if caller is None or not caller.is_valid:
            raise AuthenticationError(
                "the token is not known here, or has expired", "ask whoever runs the service for a new one"
            )
        return caller

    async def follow(self) -> None:
        """Take over changes of the file, and end what has expired, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            # In a thread, since the file may lie on a network.
            entries = await asyncio.to_thread(self._read_change)
            if entries is not None:
                self._take_over(entries)
            for caller in self._callers.values():
                if not caller.is_valid:
                    caller.revoke()

    def check_file(self) -> None:
        """Take over the file if it changed. Never raises for what it holds."""
        entries = self._read_change()
        if entries is not None:
            self._take_over(entries)

    def _read_change(self) -> tuple[TokenEntry, ...] | None:
        seen = self._fingerprint()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            entries = parse_tokens(_read(self._path), str(self._path))
        except ConfigError as error:
            self._on_reload(False)
            logger.error("the new tokens file is not used, the tokens in use stay: %s", error)
            return None
        self._on_reload(True)
        logger.info("%d tokens of %s are in use", len(entries), self._path)
        return entries

    def _take_over(self, entries: Sequence[TokenEntry]) -> None:
        # An unchanged entry keeps its caller, and so its running calls and limits.
        before, self._callers = self._callers, {}
        for entry in entries:
            self._callers[entry] = before.pop(entry) if entry in before else self._make(entry)
        for caller in before.values():
            caller.revoke()

    def _make(self, entry: TokenEntry) -> Caller:
        given, usual = entry.quota, self._quota
        quota = CallerQuota(
            given.max_calls or usual.max_calls,
            given.requests_per_second or usual.requests_per_second,
            given.publish_bytes_per_second or usual.publish_bytes_per_second,
        )
        return Caller(entry.name, entry.scopes, CallerLimits(quota), entry.expires_unix_seconds)

    def _fingerprint(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)  # reading it says what is wrong
        return (found.st_ino, found.st_size, found.st_mtime_ns)


def bearer_token(metadata: Metadata) -> str:
    """The token that came with a call.

    Raises:
        AuthenticationError: if there is none, or more than one.
    """
    values = [value for key, value in metadata if key == "authorization"]
    scheme, _, token = values[0].partition(" ") if values and isinstance(values[0], str) else ("", "", "")
    if len(values) != 1 or scheme.lower() != "bearer" or not 0 < len(token) <= MAX_TOKEN_CHARACTERS:
        raise AuthenticationError(
            "the call carries no token, and this service asks for one",
            "name the file that holds yours with --token-file or LYNEARM_TOKEN_FILE",
        )
    return token


def peer_host(peer: str) -> str:
    """The address in what gRPC calls a peer, without the port: ipv4:127.0.0.1:50000."""
    kind, _, address = peer.partition(":")
    return address.rpartition(":")[0] if kind in ("ipv4", "ipv6") else peer


def quota_of(max_calls: int, requests_per_second: float, publish_bytes_per_second: float) -> CallerQuota:
    """A quota as a configuration says it: a rate of 0 means none."""
    return CallerQuota(max_calls, requests_per_second or math.inf, publish_bytes_per_second or math.inf)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise ConfigError(f"{path} has more than {_MAX_FILE_BYTES} bytes", "remove what is no token")
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8", "write it anew") from error
    except OSError as error:
        raise ConfigError(
            f"cannot read the tokens file {path}: {error.strerror}", "name a readable file"
        ) from error
