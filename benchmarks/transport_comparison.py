"""Runs each way in which teacher logprobs are moved once, and says what it cost."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import transport_others as others
import transport_roles as roles
from transport_others import Material
from transport_processes import ServerProcess, Worker
from transport_roles import Source

from lynearm.traces.config import ServeConfig
from lynearm.wire.specs import CodecMode

_BLOCK_TOKENS = 4096
"""Of our blocks: some 400 KB."""

_SETTLE_SECONDS = 0.2
"""For a receiver to be ready."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one way took."""

    tokens: int
    cpu_seconds: float
    wall_seconds: float
    size_bytes: int
    """Of what travelled, without the transport's own framing."""


def compare_ways(material: Material, *, with_ray: bool) -> dict[str, float]:
    """Tokens per CPU-second and bytes per token of each way, by name; prints a table."""
    short = replace(material, passes=max(1, material.passes // 5))  # JSON takes its time
    with Worker() as sender, Worker() as receiver:
        for worker in (sender, receiver):
            for each in {material, short}:
                worker.run(others.describe, each)
        costs = {
            "lynearm": _carry_ourselves(sender, receiver, material, "standard"),
            "lynearm_exact": _carry_ourselves(sender, receiver, material, "exact"),
            "json_http": _carry_by_http(sender, receiver, short),
            "pickle_zeromq": _carry_by_zeromq(sender, receiver, material),
        }
    if with_ray:
        costs["ray_queue"] = _carry_by_ray(material)
    print(f"{'':34}{'tokens per CPU-s':>18}{'tokens/s':>12}{'bytes/token':>13}")
    figures: dict[str, float] = {}
    for name, cost in costs.items():
        figures[f"{name}_tokens_per_cpu_second"] = round(cost.tokens / cost.cpu_seconds)
        figures[f"{name}_bytes_per_token"] = cost.size_bytes / cost.tokens
        print(
            f"{name:34}{cost.tokens / cost.cpu_seconds:18,.0f}{cost.tokens / cost.wall_seconds:12,.0f}"
            f"{cost.size_bytes / cost.tokens:13.0f}"
        )
    return figures


def _carry_ourselves(sender: Worker, receiver: Worker, material: Material, mode: CodecMode) -> Cost:
    for worker in (sender, receiver):
        worker.run(others.warm_up_codec, material, mode, _BLOCK_TOKENS)
    with (
        tempfile.TemporaryDirectory(prefix="lynearm-transport-") as directory,
        ServerProcess(ServeConfig(data_dir=Path(directory), port=0)) as server,
    ):
        source = Source(server.address, "traces")
        sender.run(roles.make_stream, source, mode)
        completions, tokens = sender.run(others.describe, material).result
        receiver.begin(others.follow_traces, source, completions)
        time.sleep(_SETTLE_SECONDS)
        before = server.cpu_seconds()
        sent = sender.run(others.publish_traces, source, material, mode, _BLOCK_TOKENS)
        received = receiver.wait()
        server_seconds = server.cpu_seconds() - before
    _check(tokens, received.result)
    cpu_seconds = sent.cpu_seconds + received.cpu_seconds + server_seconds
    return Cost(tokens, cpu_seconds, received.wall_seconds - _SETTLE_SECONDS, sent.result)


def _carry_by_http(sender: Worker, receiver: Worker, material: Material) -> Cost:
    _, tokens = sender.run(others.describe, material).result
    port = sender.run(others.start_http).result
    sender.begin(others.serve_http, material)
    received = receiver.run(others.receive_http, port, material)
    sent = sender.wait()
    _check(tokens, received.result)
    return Cost(tokens, sent.cpu_seconds + received.cpu_seconds, received.wall_seconds, sent.result)


def _carry_by_zeromq(sender: Worker, receiver: Worker, material: Material) -> Cost:
    _, tokens = sender.run(others.describe, material).result
    port = receiver.run(others.bind_zeromq).result
    receiver.begin(others.receive_zeromq, material)
    sent = sender.run(others.send_zeromq, port, material)
    received = receiver.wait()
    _check(tokens, received.result)
    return Cost(tokens, sent.cpu_seconds + received.cpu_seconds, received.wall_seconds, sent.result)


def _carry_by_ray(material: Material) -> Cost:
    import transport_ray

    with Worker() as driver:
        _, tokens = driver.run(others.describe, material).result
        driver.run(transport_ray.start_ray, material)
        carried = driver.run(transport_ray.carry_by_ray, material)
        size_bytes = driver.run(transport_ray.measure_size, material).result
        driver.run(transport_ray.stop_ray)
    received, cpu_seconds = carried.result
    _check(tokens, received)
    return Cost(tokens, cpu_seconds, carried.wall_seconds, size_bytes)


def _check(sent_tokens: int, received_tokens: int) -> None:
    if sent_tokens != received_tokens:
        raise ValueError(f"{received_tokens} of {sent_tokens} tokens came")
