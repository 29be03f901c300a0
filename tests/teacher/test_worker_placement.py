"""How much of a node a worker takes, and how many workers a cluster has room for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from models.teaching import teach_config

from lynearm.teacher.placement import (
    CPU_OVERHEAD_BYTES,
    NodeView,
    WorkerShare,
    cpu_memory_bytes,
    fits_nowhere,
    room_on,
    waiting_reason,
    worker_share,
    workers_to_add,
)
from lynearm.wire.errors import ConfigError

GIB = float(1 << 30)
SHARE = WorkerShare(4, 1, 8 << 30)


def node(
    cpus: float = 16,
    gpus: float = 0,
    memory: float = 64,
    used: Mapping[str, float] | None = None,
    **more: Any,
) -> NodeView:
    total = {"CPU": cpus, "GPU": gpus, "memory": memory * GIB}
    free = {name: amount - (used or {}).get(name, 0.0) for name, amount in total.items()}
    return NodeView("n", "10.0.0.1", total, free, **more)


def config(**settings: Any) -> Any:
    return teach_config(Path("nowhere"), **({"threads": 0} | settings))


def test_on_gpus_a_worker_takes_those_of_its_tensor_parallel_group() -> None:
    share = worker_share(config(tensor_parallel=4), [node(gpus=8), node()])
    assert (share.cpus, share.gpus) == (1, 4)
    assert room_on(node(gpus=8), share) == 2


def test_on_cpus_a_worker_takes_the_threads_that_it_is_given() -> None:
    assert worker_share(config(threads=3), [node(cpus=16)]).cpus == 3
    assert room_on(node(cpus=16), worker_share(config(threads=3), [node()])) == 5


def test_all_threads_are_those_of_the_smallest_node_that_has_any() -> None:
    nodes = [node(cpus=0), node(cpus=8), node(cpus=16)]
    assert worker_share(config(), nodes).cpus == 8
    assert worker_share(config(workers=2), nodes).cpus == 8
    assert worker_share(config(workers=4), nodes).cpus == 4
    assert worker_share(config(workers=99), [node(cpus=2)]).cpus == 1


def test_memory_counts_weights_as_they_are_held(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    fixed = CPU_OVERHEAD_BYTES + (64 << 20)
    settings: dict[str, Any] = {"kv_cache_mib": 64}
    assert cpu_memory_bytes(teach_config(tmp_path, **settings)) == fixed + 2000
    assert cpu_memory_bytes(teach_config(tmp_path, dtype="bfloat16", **settings)) == fixed + 1000
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    assert cpu_memory_bytes(teach_config(tmp_path, **settings)) == fixed + 1000
    (tmp_path / "config.json").write_text("[]")
    assert cpu_memory_bytes(teach_config(tmp_path, **settings)) == fixed + 1000


@pytest.mark.parametrize(
    ("used", "room"),
    [({}, 4), ({"CPU": 6}, 2), ({"GPU": 3}, 1), ({"memory": 40 * GIB}, 3), ({"memory": 60 * GIB}, 0)],
)
def test_what_is_shortest_bounds_the_room_of_a_node(used: Mapping[str, float], room: int) -> None:
    assert room_on(node(gpus=4, used=used), SHARE) == room


def test_nothing_is_placed_on_a_node_that_is_to_go() -> None:
    assert room_on(node(gpus=4, is_draining=True), SHARE) == 0


def test_there_is_always_one_worker_and_never_more_than_find_work() -> None:
    nodes = [node(gpus=4), node(gpus=4)]
    assert workers_to_add(nodes, SHARE, wanted=0, present=0, useful=99) == 8
    assert workers_to_add(nodes, SHARE, wanted=0, present=0, useful=3) == 3
    assert workers_to_add(nodes, SHARE, wanted=0, present=3, useful=3) == 0
    assert workers_to_add([], SHARE, wanted=0, present=0, useful=3) == 1
    assert workers_to_add([], SHARE, wanted=0, present=1, useful=3) == 0


def test_as_many_as_are_asked_for_whether_there_is_room_or_not() -> None:
    assert workers_to_add([], SHARE, wanted=5, present=2, useful=1) == 3
    assert workers_to_add([node(gpus=8)], SHARE, wanted=1, present=2, useful=9) == 0


def test_a_worker_that_waits_says_what_for() -> None:
    busy = node(gpus=1, used={"GPU": 1})
    assert waiting_reason([busy], SHARE) == (
        "waiting for 4 CPUs, 1 GPUs and 8.0 GiB on one node, which others use now"
    )
    assert waiting_reason([node(memory=4, gpus=1), node(gpus=0)], SHARE) == (
        "waiting for a node with 4 CPUs, 1 GPUs and 8.0 GiB: "
        "the 2 nodes have at most 16 CPUs, 1 GPUs and 64.0 GiB"
    )


def test_a_worker_fits_somewhere_if_an_empty_node_would_take_it() -> None:
    assert not fits_nowhere([node(gpus=1, used={"GPU": 1})], SHARE)
    assert fits_nowhere([node(memory=4, gpus=1), node()], SHARE)
    assert fits_nowhere([], SHARE)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"workers": -1}, "workers -1 is negative"),
        ({"tensor_parallel": 0}, "tensor_parallel 0 is below 1"),
        ({"job": "No Name"}, "job 'No Name' is not allowed"),
        ({"producer_id": "p" * 101}, "has 101 characters"),
    ],
)
def test_settings_of_a_fleet_that_cannot_be_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config(**settings)
