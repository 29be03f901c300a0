"""What a trace server can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from lynearm.wire.addresses import is_loopback
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
    """Listen beyond loopback without TLS or without tokens."""

    tls_cert: Path | None = None
    """PEM file of the server's certificate chain; it turns TLS on. Read anew when it changes."""

    tls_key: Path | None = None
    """PEM file of the certificate's private key, without a pass phrase."""

    tls_client_ca: Path | None = None
    """PEM file of the authorities that vouch for clients: none without a certificate of theirs gets in."""

    tokens: Path | None = None
    """TOML file of tokens (`lynearm tokens new`), one of which each call must carry; None: calls need none.
    Read anew when it changes."""

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

    min_free_bytes: int = 256 * MIB
    """What blocks and dictionaries must leave free on the disk of data_dir; beyond it, publishers wait for
    room and readers go on. A few groups and the catalog's log, which must not meet a full disk."""

    max_calls: int = 1024
    """Calls at the same time; more are refused at once, as unavailable, rather than queued. A call costs
    little memory beyond the blocks on their way to a reader, at most about 8 MiB."""

    lease_silence_seconds: float = 60.0
    """How long a worker that holds prompts may be silent before they are given to others. Workers renew three
    times as often; a minute bridges a restart of this server, and is all that a crashed worker costs."""

    drain_seconds: float = 10.0
    """Time that running calls get to end when the server is asked to stop."""

    max_connections: int = 4096
    """Connections at the same time, of whoever; further ones are dropped. Each takes a file descriptor."""

    max_calls_per_caller: int = 512
    """The same for each token, or without tokens for each address: half, so that one cannot shut out all."""

    requests_per_second: float = 0.0
    """Calls that each token, or without tokens each address, may begin; 0: as many as it likes."""

    publish_bytes_per_second: float = 0.0
    """Bytes that each token, or without tokens each address, may publish; 0: as many as it likes."""

    max_streams: int = 10_000
    """Streams in the catalog; further ones are refused. ListStreams answers with all of them at once."""

    reflection: bool = False
    """Tell tools such as grpcurl which services and messages there are; asks for a token with admin scope."""

    metrics_port: int | None = None
    """TCP port of Prometheus metrics over HTTP; 0 takes any free one, None has none."""

    metrics_host: str = "127.0.0.1"
    """Address of that port, on which there is neither TLS nor a token: keep it to a network of your own. The
    metrics name streams."""

    log_format: Literal["text", "json"] = "text"
    """json: one object a line, for programs, with every long or refused call."""

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
            f"min_free_bytes is {self.min_free_bytes}, expected 0 or more": self.min_free_bytes >= 0,
            f"max_calls is {self.max_calls}, expected at least 1": self.max_calls >= 1,
            f"lease_silence_seconds is {self.lease_silence_seconds}, expected 0.1 to 86400": (
                0.1 <= self.lease_silence_seconds <= 86_400
            ),
            f"drain_seconds is {self.drain_seconds}, expected 0 or more": self.drain_seconds >= 0,
        }
        _check(checks)
        _check_scheme("catalog", self.catalog, CATALOG_SCHEMES)
        _check_scheme("blocks", self.blocks, BLOCK_SCHEMES)
        self._check_limits()
        self._check_security()

    def _check_limits(self) -> None:
        least = {
            "max_connections": 1,
            "max_calls_per_caller": 1,
            "requests_per_second": 0,
            "publish_bytes_per_second": 0,
            "max_streams": 1,
        }
        values = {name: getattr(self, name) for name in least}
        _check(
            {
                f"{name} is {value}, expected at least {least[name]}": value >= least[name]
                for name, value in values.items()
            }
        )
        port = self.metrics_port
        _check({f"metrics_port is {port}, expected 0 to 65535": port is None or 0 <= port <= 65535})

    def _check_security(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("one of tls_cert and tls_key is given", "give both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("tls_client_ca is given without tls_cert", "give tls_cert and tls_key too")
        missing = [
            name
            for name, value in (("TLS (tls_cert, tls_key)", self.tls_cert), ("tokens", self.tokens))
            if value is None
        ]
        if missing and not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host!r} is not a loopback address, and there is no {' and no '.join(missing)}",
                "add it, listen on 127.0.0.1 and use a tunnel, or accept the risk with --insecure",
            )


def _check(checks: Mapping[str, bool]) -> None:
    for problem, holds in checks.items():
        if not holds:
            raise ConfigError(problem)


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
