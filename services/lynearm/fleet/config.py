"""What a fleet of trace servers can be told, besides what each server is."""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.traces.config import ServeConfig, local_path
from lynearm.wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """Configuration of trace servers on Ray.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    servers: int = 1
    """Each on a node of its own. More than one needs a catalog and blocks that all reach."""

    cpus: float = 1.0
    """CPUs that each server reserves of its node, so that teachers do not starve it. A server that is busy
    uses about one."""

    ray_address: str = "auto"
    """auto: RAY_ADDRESS, which `ray job submit` sets, or the Ray of this machine; else host:port."""

    start_seconds: float = 120.0
    """Patience with servers that start: Ray starts a Python process for each, and a node may be busy."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks = {
            f"servers is {self.servers}, expected 1 to 1000": 1 <= self.servers <= 1000,
            f"cpus is {self.cpus}, expected above 0": self.cpus > 0,
            f"start_seconds is {self.start_seconds}, expected above 0": self.start_seconds > 0,
        }
        for problem, holds in checks.items():
            if not holds:
                raise ConfigError(problem)
        if self.ray_address.startswith("ray://"):
            raise ConfigError(
                f"ray_address {self.ray_address} is that of a Ray client, which is on no node",
                "run it on the cluster: `ray job submit -- lynearm up --ray …`",
            )
        if self.ray_address == "local":
            raise ConfigError(
                "ray_address is local: that Ray would end with this command",
                "`ray start --head` starts one that stays; `lynearm serve` serves on one machine without Ray",
            )


def is_on_one_machine(serve: ServeConfig) -> bool:
    """Whether catalog or blocks are on a disk, so that only servers beside it find them."""
    return not _is_remote(serve.catalog) or not _is_remote(serve.blocks)


def check_storage(serve: ServeConfig, servers: int) -> None:
    """Refuse several servers on storage that one would keep to itself.

    Raises:
        ConfigError: naming what is on a disk.
    """
    if servers == 1 or serve.shared or not is_on_one_machine(serve):
        return
    parts = {"catalog": serve.catalog, "blocks": serve.blocks}
    private = " and ".join(name for name, place in parts.items() if not _is_remote(place))
    raise ConfigError(
        f"{servers} servers cannot share {private} on the disk of one ({serve.places})",
        "give --catalog postgresql://… and --blocks s3://bucket/prefix, or --shared where all nodes are on "
        "this machine",
    )


def _is_remote(place: str) -> bool:
    return bool(place) and local_path(place) is None
