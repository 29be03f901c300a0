"""gRPC alone: blocks from one process to another, with nothing of ours in between but the blocks themselves.

What is left of raw TCP's efficiency here is the most that a fetch or a live tail can have: grpc.aio at the
server, grpc's sync client at the reader, messages that are bytes already. Both keep freed memory, as ours do.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import grpc
import grpc.aio
from transport_roles import Load

from lynearm.wire.allocation import keep_freed_memory

_METHOD = "/benchmark.Blocks/Send"
_REQUEST = struct.Struct("<QQQd")


@dataclass(frozen=True, slots=True)
class Pace:
    """How blocks come: so many at once, then a pause."""

    burst: int
    pause_seconds: float


AT_ONCE = Pace(1, 0)


def serve_blocks(on_ready: Callable[[str], None]) -> None:
    """Answer `read_blocks` until the process ends."""
    asyncio.run(_serve(on_ready))


# Any, below: grpc types channels, handlers and contexts by serialisers, of which there are none.
def read_blocks(address: str, load: Load, pace: Pace) -> None:
    """Read a load from `serve_blocks`."""
    keep_freed_memory()
    request = _REQUEST.pack(load.block_bytes, load.count, pace.burst, pace.pause_seconds)
    received = sum(1 for _ in _channel(address).unary_stream(_METHOD)(request))
    if received != load.count:
        raise ValueError(f"{received} of {load.count} blocks came")


async def _serve(on_ready: Callable[[str], None]) -> None:
    keep_freed_memory()
    server = grpc.aio.server()
    service, method = _METHOD.strip("/").split("/")
    handlers: dict[str, Any] = {method: grpc.unary_stream_rpc_method_handler(_send)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    on_ready(f"127.0.0.1:{port}")
    await server.wait_for_termination()


async def _send(request: bytes, context: Any) -> None:
    block_bytes, count, burst, pause_seconds = _REQUEST.unpack(request)
    blocks = Load(block_bytes, count).blocks()
    while sent := [await context.write(block) for block in islice(blocks, burst)]:
        if pause_seconds and len(sent) == burst:
            await asyncio.sleep(pause_seconds)


@cache
def _channel(address: str) -> Any:
    return grpc.insecure_channel(address)
