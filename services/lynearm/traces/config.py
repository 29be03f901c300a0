"""What a trace server can be told."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lynearm.wire.errors import ConfigError

MIB = 1 << 20

CATALOG_SCHEMES = ("postgresql", "sqlite")

BLOCK_SCHEMES = ("s3", "gs", "az", "file")

_LOCAL_SCHEMES = frozenset({"sqlite", "file"})


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Configuration of one trace server.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    data_dir: Path = Path("lynearm-data")
    """Directory of blocks and catalog, as far as these are not elsewhere; created when missing, used by one
    server at a time."""

    catalog: str = field(default="", repr=False)
    """postgresql://user@host:port/database, for any number of servers, or the path of a SQLite file, which
    sqlite:///path names too; else catalog.sqlite3 in the data directory. Kept out of `repr`, since a URL may
    hold a password."""

    blocks: str = ""
    """s3://bucket/prefix, gs://bucket/prefix or az://container/prefix, or the path of a directory, which
    file:///path names too; else blocks in the data directory. Never holds a secret."""

    shared: bool = False
    """Other servers of this machine use the same SQLite file, each with this set. They take turns at writing
    and look for each other's commits five times a second; PostgreSQL tells them at once."""

    collect_seconds: float = 60.0
    """Time between two passes of the collector, which lets go of what streams need not keep; 0: never by
    itself. A pass without work is one query."""

    orphan_seconds: float = 3600.0
    """Age at which an object without rows is taken for garbage, and the time between two searches for such.
    Many times what any commit takes: one that is slower still is refused, and its blocks sent again."""

    host: str = "127.0.0.1"
    """Address to listen on. Loopback, since nothing else is safe without TLS and tokens."""

    port: int = 7411
    """TCP port; 0 takes any free one."""

    insecure: bool = False
    """Listen beyond loopback although traffic is neither encrypted nor authenticated."""

    group_milliseconds: float = 5.0
    """Longest wait for more blocks before a group is written. About the cost of one sync on an SSD:
    waiting longer delays acknowledgements without making groups pay better."""

    group_bytes: int = 8 * MIB
    """Size at which a group is written without waiting. 32 blocks of 256 KB: one sync costs little per block,
    and an object stays small enough to delete soon."""

    queue_bytes: int = 64 * MIB
    """Blocks received but not yet committed, over all publishers; beyond it, publishers are not read."""

    cache_bytes: int = 256 * MIB
    """Recent blocks kept in memory for readers. 256 to 1,024 blocks: seconds of a busy fleet's output."""

    max_calls: int = 1024
    """Calls at the same time; more are refused at once, as unavailable, rather than queued. A call costs
    little memory beyond the blocks on their way to a reader, at most about 8 MiB."""

    drain_seconds: float = 10.0
    """Time that running calls get to end when the server is asked to stop."""

    @property
    def places(self) -> str:
        """Where catalog and blocks are, for people; holds no secret."""
        if not (self.catalog or self.blocks):
            return str(self.data_dir)
        catalog = _without_secrets(self.catalog) if self.catalog else self.data_dir
        blocks = _without_secrets(self.blocks) if self.blocks else self.data_dir
        return f"{catalog} and {blocks}"

    def __post_init__(self) -> None:
        """Check every field."""
        checks = {
            f"port is {self.port}, expected 0 to 65535": 0 <= self.port <= 65535,
            f"group_milliseconds is {self.group_milliseconds}, expected 0 to 10000": (
                0 <= self.group_milliseconds <= 10_000
            ),
            f"group_bytes is {self.group_bytes}, expected 1 to {256 * MIB}": (
                1 <= self.group_bytes <= 256 * MIB
            ),
            f"queue_bytes is {self.queue_bytes}, expected at least {4 * MIB}": self.queue_bytes >= 4 * MIB,
            f"collect_seconds is {self.collect_seconds}, expected 0 or more": self.collect_seconds >= 0,
            f"orphan_seconds is {self.orphan_seconds}, expected 0 or more": self.orphan_seconds >= 0,
            f"cache_bytes is {self.cache_bytes}, expected 0 or more": self.cache_bytes >= 0,
            f"max_calls is {self.max_calls}, expected at least 1": self.max_calls >= 1,
            f"drain_seconds is {self.drain_seconds}, expected 0 or more": self.drain_seconds >= 0,
        }
        for problem, holds in checks.items():
            if not holds:
                raise ConfigError(problem)
        _check_scheme("catalog", self.catalog, CATALOG_SCHEMES)
        _check_scheme("blocks", self.blocks, BLOCK_SCHEMES)
        if not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host!r} is not a loopback address, and this server has neither TLS nor tokens",
                "listen on 127.0.0.1 and use a tunnel, or accept the risk with --insecure",
            )


def local_path(place: str) -> Path | None:
    """The path of a catalog or block store on this machine; None where it is elsewhere."""
    scheme, separator, path = place.partition("://")
    if not separator:
        return Path(place).expanduser()
    return Path(unquote(path)) if scheme in _LOCAL_SCHEMES else None


def _without_secrets(place: str) -> str:
    if local_path(place) is not None:
        return place
    parts = urlsplit(place)
    user, separator, host = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{user.partition(':')[0]}{separator}{host}{parts.path}"


def _check_scheme(name: str, place: str, schemes: Sequence[str]) -> None:
    """Refuse other schemes. Nothing of a URL but its scheme is shown."""
    scheme, separator, path = place.partition("://")
    if separator and scheme in _LOCAL_SCHEMES and scheme in schemes and not path.startswith("/"):
        raise ConfigError(f"{name} is {place}, expected {scheme}:///path", "three slashes, or a path alone")
    if separator and scheme not in schemes:
        known = " or ".join(f"{one}://…" for one in schemes)
        raise ConfigError(f"{name} is {scheme}://…, expected {known} or a path", "a path has no scheme")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. Names other than localhost are not resolved."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
