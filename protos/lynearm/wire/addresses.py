"""Network addresses, as far as their safety depends on them."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. Names other than localhost are not resolved."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(target: str) -> str:
    """The host of host:port, without the brackets of IPv6."""
    return target.rpartition(":")[0].strip("[]")


def join_address(host: str, port: int) -> str:
    """host:port, with brackets where the host is an IPv6 address."""
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"
