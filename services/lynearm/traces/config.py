"""What a trace server can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lynearm.wire.addresses import is_loopback
from lynearm.wire.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Configuration of one trace server.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    data_dir: Path = Path("lynearm-data")
    """Directory of blocks and catalog; created when missing, used by one server at a time."""

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

    lease_silence_seconds: float = 60.0
    """How long a worker that holds prompts may be silent before they are given to others. Workers renew three
    times as often; a minute bridges a restart of this server, and is all that a crashed worker costs."""

    drain_seconds: float = 10.0
    """Time that running calls get to end when the server is asked to stop."""

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
            f"cache_bytes is {self.cache_bytes}, expected 0 or more": self.cache_bytes >= 0,
            f"max_calls is {self.max_calls}, expected at least 1": self.max_calls >= 1,
            f"lease_silence_seconds is {self.lease_silence_seconds}, expected 0.1 to 86400": (
                0.1 <= self.lease_silence_seconds <= 86_400
            ),
            f"drain_seconds is {self.drain_seconds}, expected 0 or more": self.drain_seconds >= 0,
        }
        for problem, holds in checks.items():
            if not holds:
                raise ConfigError(problem)
        if not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host!r} is not a loopback address, and this server has neither TLS nor tokens",
                "listen on 127.0.0.1 and use a tunnel, or accept the risk with --insecure",
            )
