"""`TraceDataset` in real DataLoaders, over a real service."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch.distributed
from models.trace_blocks import PACKINGS, encode_traces, make_block, make_spec, publish_traces
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lynearm.client import TraceClient
from lynearm.datasets import Shard, ShardPlan, StreamPosition, TraceBatch, TraceDataset
from lynearm.wire.errors import CheckpointError, CorruptBlockError, InvalidInputError
from lynearm.wire.sharding import shard_examples

# torchdata 0.11 calls what torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

TRACES = 50
PLAN = ShardPlan(8)
SHUFFLED = ShardPlan(8, seed=1, window_batches=3)
WORKERS = [0, 2]
PLANS = pytest.mark.parametrize("plan", [PLAN, SHUFFLED], ids=["in-order", "shuffled"])


def numbers(batch: TraceBatch) -> list[int]:
    return [int(trace.prompt_id[1:]) for trace in batch.traces]


def expected_batches(plan: ShardPlan = PLAN) -> list[list[int]]:
    return [list(batch.examples) for batch in shard_examples(range(TRACES), plan, Shard())]


def load(dataset: TraceDataset, workers: int, **options: Any) -> Iterator[TraceBatch]:
    return iter(DataLoader(dataset, batch_size=None, num_workers=workers, **options))


def stateful(
    client: TraceClient, workers: int, plan: ShardPlan = PLAN, **options: Any
) -> StatefulDataLoader[TraceBatch]:
    dataset = TraceDataset(client, "uneven", plan=plan)
    return StatefulDataLoader(dataset, batch_size=None, num_workers=workers, **options)


def joined(ranks: list[list[TraceBatch]]) -> list[list[int]]:
    """The batches of several ranks, put together."""
    return [[n for part in parts for n in numbers(part)] for parts in zip(*ranks, strict=True)]


@PLANS
@pytest.mark.parametrize("stream", PACKINGS)
@pytest.mark.parametrize("workers", WORKERS)
def test_batches_are_the_same_for_any_packing_and_workers(
    client: TraceClient, stream: str, workers: int, plan: ShardPlan
) -> None:
    dataset = TraceDataset(client, stream, plan=plan)
    for _ in range(2):  # each pass begins at the start
        batches = list(load(dataset, workers))
        assert [numbers(batch) for batch in batches] == expected_batches(plan)
        assert [batch.step for batch in batches] == list(range(7))


@PLANS
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("workers", WORKERS)
def test_ranks_share_each_batch(client: TraceClient, world_size: int, workers: int, plan: ShardPlan) -> None:
    shards = [Shard(rank, world_size) for rank in range(world_size)]
    datasets = [TraceDataset(client, "uneven", plan=plan, shard=shard) for shard in shards]
    ranks = [list(load(dataset, workers)) for dataset in datasets]
    assert joined(ranks) == expected_batches(plan)
    assert all(len({part.after for part in parts}) == 1 for parts in zip(*ranks, strict=True))
    assert [part.global_size for part in ranks[-1]] == [8] * 6 + [2]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_may_be_forked_or_spawned_while_the_parent_reads(client: TraceClient, method: str) -> None:
    with client.subscribe("even") as blocks:
        assert next(blocks).offset == 0
        dataset = TraceDataset(client, "uneven", plan=PLAN)
        batches = load(dataset, 2, multiprocessing_context=method)
        assert [numbers(batch) for batch in batches] == expected_batches()
        assert next(blocks).offset == 1


@PLANS
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 7])
def test_a_loader_goes_on_where_its_state_says(
    client: TraceClient, workers: int, done: int, plan: ShardPlan
) -> None:
    first = stateful(client, workers, plan)
    before = [numbers(batch) for batch in itertools.islice(first, done)]
    state = first.state_dict()
    second = stateful(client, workers, plan)
    second.load_state_dict(state)
    after = [numbers(batch) for batch in second]
    assert before + after == expected_batches(plan)
    assert [numbers(batch) for batch in second] == expected_batches(plan)  # and the next pass is whole


@pytest.mark.parametrize("workers", WORKERS)
def test_a_state_of_a_finished_pass_begins_the_next(client: TraceClient, workers: int) -> None:
    first = stateful(client, workers)
    assert len(list(first)) == 7
    second = stateful(client, workers)
    second.load_state_dict(first.state_dict())
    assert [numbers(batch) for batch in second] == expected_batches()


def test_a_loader_with_persistent_workers_goes_on_too(client: TraceClient) -> None:
    first = stateful(client, 2, persistent_workers=True)
    for _ in range(2):
        assert [numbers(batch) for batch in first] == expected_batches()
    before = [numbers(batch) for batch in itertools.islice(first, 3)]
    second = stateful(client, 2, persistent_workers=True)
    second.load_state_dict(first.state_dict())
    assert before + [numbers(batch) for batch in second] == expected_batches()


@PLANS
@pytest.mark.parametrize("done", [2, 3])
def test_other_ranks_go_on_from_the_position_of_a_batch(
    client: TraceClient, plan: ShardPlan, done: int
) -> None:
    batches = list(itertools.islice(TraceDataset(client, "uneven", plan=plan), done))
    ranks = [
        list(TraceDataset(client, "uneven", plan=plan, shard=Shard(rank, 2), start=batches[-1].after))
        for rank in range(2)
    ]
    assert [numbers(batch) for batch in batches] + joined(ranks) == expected_batches(plan)


@PLANS
def test_another_rank_goes_on_from_a_state(client: TraceClient, plan: ShardPlan) -> None:
    dataset = TraceDataset(client, "uneven", plan=plan)
    batches = iter(dataset)
    assert dataset.state_dict()["position"] == {"step": 0, "offset": 0, "trace_index": 0}
    for _ in range(2):
        next(batches)
    other = TraceDataset(client, "uneven", plan=plan, shard=Shard(1, 2))
    other.load_state_dict(json.loads(json.dumps(dataset.state_dict())))
    assert numbers(next(iter(other))) == expected_batches(plan)[2][4:]


@pytest.mark.parametrize(
    ("key", "value"), [("version", 2), ("stream", "even"), ("plan", asdict(SHUFFLED)), ("stream", None)]
)
def test_a_state_of_another_dataset_is_refused(client: TraceClient, key: str, value: object) -> None:
    dataset = TraceDataset(client, "uneven", plan=PLAN)
    with pytest.raises(CheckpointError, match=key):
        dataset.load_state_dict({**dataset.state_dict(), key: value})


def test_a_stream_is_followed_while_it_grows(client: TraceClient) -> None:
    publish_traces(client, "growing", [3])
    batches = iter(TraceDataset(client, "growing", plan=ShardPlan(2)))
    assert numbers(next(batches)) == [0, 1]

    def go_on() -> None:
        with client.publisher("growing", "other") as publisher:
            publisher.publish(encode_traces(range(3, 5)))
        client.seal_stream("growing")

    later = threading.Timer(0.2, go_on)
    later.start()
    assert [numbers(batch) for batch in batches] == [[2, 3], [4]]
    later.join()


def test_a_range_ends_before_a_stream_does(client: TraceClient) -> None:
    publish_traces(client, "unsealed", [3, 3, 3])
    for start, end, expected in (
        (StreamPosition(), 2, [[0, 1], [2, 3], [4, 5]]),
        (StreamPosition(7, 1, 2), 3, [[5, 6], [7, 8]]),
        (StreamPosition(0, 2), 2, []),
    ):
        dataset = TraceDataset(client, "unsealed", plan=ShardPlan(2), start=start, end_offset=end)
        assert [numbers(batch) for batch in dataset] == expected


def test_a_block_that_cannot_be_read_is_named(client: TraceClient) -> None:
    client.create_stream(make_spec("damaged"))
    with client.publisher("damaged", "teacher") as publisher:
        publisher.publish(encode_traces(range(2)))
        publisher.publish(make_block(1))
    batches = iter(TraceDataset(client, "damaged", plan=ShardPlan(1)))
    assert [numbers(next(batches)) for _ in range(2)] == [[0], [1]]
    with pytest.raises(CorruptBlockError, match="block 1: "):
        next(batches)


def test_the_process_group_says_which_rank_it_is(
    client: TraceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of-torchrun")
    with pytest.raises(InvalidInputError, match="init_process_group"):
        TraceDataset(client, "even", plan=PLAN)
    # torch's backend for tests: a group without its other processes.
    torch.distributed.init_process_group("fake", rank=1, world_size=4)
    try:
        dataset = TraceDataset(client, "even", plan=PLAN)
        assert numbers(next(iter(dataset))) == [2, 3]
    finally:
        torch.distributed.destroy_process_group()


def test_without_torch_the_import_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import lynearm.client\n"
        "try:\n    import lynearm.datasets\n"
        "except ImportError as error:\n    print(type(error).__name__, error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("MissingDependencyError lynearm.datasets needs torch: pip install torch")
