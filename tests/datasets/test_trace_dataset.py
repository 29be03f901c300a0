"""`TraceDataset` in real DataLoaders, over a real service."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed
from models.trace_blocks import PACKINGS, encode_traces, make_block, make_spec, publish_traces
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lynearm.client import TraceClient
from lynearm.datasets import Shard, StreamRange, TraceBatch, TraceDataset
from lynearm.wire.errors import CheckpointError, CorruptBlockError, InvalidInputError
from lynearm.wire.traces import Cursor

# torchdata 0.11 calls what torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

BATCH_SIZE = 8
TRACES = 50
WORKERS = [0, 2]


def numbers(batch: TraceBatch) -> list[int]:
    return [int(trace.prompt_id[1:]) for trace in batch.traces]


def expected_batches(first: int = 0) -> list[list[int]]:
    return [list(range(at, min(at + BATCH_SIZE, TRACES))) for at in range(first, TRACES, BATCH_SIZE)]


def load(dataset: TraceDataset, workers: int, **options: Any) -> Iterator[TraceBatch]:
    return iter(DataLoader(dataset, batch_size=None, num_workers=workers, **options))


def stateful(client: TraceClient, workers: int, **options: Any) -> StatefulDataLoader[TraceBatch]:
    dataset = TraceDataset(client, "uneven", batch_size=BATCH_SIZE)
    return StatefulDataLoader(dataset, batch_size=None, num_workers=workers, **options)


@pytest.mark.parametrize("stream", PACKINGS)
@pytest.mark.parametrize("workers", WORKERS)
def test_batches_are_the_same_for_any_packing_and_workers(
    client: TraceClient, stream: str, workers: int
) -> None:
    dataset = TraceDataset(client, stream, batch_size=BATCH_SIZE)
    for _ in range(2):  # each pass begins at the start
        batches = list(load(dataset, workers))
        assert [numbers(batch) for batch in batches] == expected_batches()
        assert [batch.index for batch in batches] == list(range(7))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("workers", WORKERS)
def test_ranks_share_each_batch(client: TraceClient, world_size: int, workers: int) -> None:
    ranks = [
        list(
            load(
                TraceDataset(client, "uneven", batch_size=BATCH_SIZE, shard=Shard(rank, world_size)), workers
            )
        )
        for rank in range(world_size)
    ]
    together = [[n for part in parts for n in numbers(part)] for parts in zip(*ranks, strict=True)]
    assert together == expected_batches()
    assert all(len({part.after for part in parts}) == 1 for parts in zip(*ranks, strict=True))
    assert {len(part.traces) for parts in ranks for part in parts[:-1]} == {BATCH_SIZE // world_size}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_may_be_forked_or_spawned_while_the_parent_reads(client: TraceClient, method: str) -> None:
    with client.subscribe("even") as blocks:
        assert next(blocks).offset == 0
        dataset = TraceDataset(client, "uneven", batch_size=BATCH_SIZE)
        batches = load(dataset, 2, multiprocessing_context=method)
        assert [numbers(batch) for batch in batches] == expected_batches()
        assert next(blocks).offset == 1


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("done", [0, 1, 2, 3, 6, 7])
def test_a_loader_goes_on_where_its_state_says(client: TraceClient, workers: int, done: int) -> None:
    first = stateful(client, workers)
    before = [numbers(batch) for batch in itertools.islice(first, done)]
    state = first.state_dict()
    second = stateful(client, workers)
    second.load_state_dict(state)
    after = [numbers(batch) for batch in second]
    assert before + after == expected_batches()
    assert [numbers(batch) for batch in second] == expected_batches()  # and the next pass is whole


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


def test_other_ranks_go_on_from_the_cursor_of_a_batch(client: TraceClient) -> None:
    done = list(itertools.islice(TraceDataset(client, "uneven", batch_size=BATCH_SIZE), 3))
    within = StreamRange(start=done[-1].after)
    ranks = [
        list(TraceDataset(client, "uneven", batch_size=BATCH_SIZE, shard=Shard(rank, 2), within=within))
        for rank in range(2)
    ]
    together = [[n for part in parts for n in numbers(part)] for parts in zip(*ranks, strict=True)]
    assert [numbers(batch) for batch in done] + together == expected_batches()


def test_other_ranks_go_on_from_a_state(client: TraceClient) -> None:
    dataset = TraceDataset(client, "uneven", batch_size=BATCH_SIZE)
    batches = iter(dataset)
    assert dataset.state_dict()["batch_index"] == 0
    for _ in range(2):
        next(batches)
    other = TraceDataset(client, "uneven", batch_size=BATCH_SIZE, shard=Shard(1, 2))
    other.load_state_dict(dataset.state_dict())
    assert numbers(next(iter(other))) == expected_batches()[2][BATCH_SIZE // 2 :]


@pytest.mark.parametrize(
    ("key", "value"), [("version", 2), ("stream", "even"), ("batch_size", 4), ("stream", None)]
)
def test_a_state_of_another_dataset_is_refused(client: TraceClient, key: str, value: object) -> None:
    dataset = TraceDataset(client, "uneven", batch_size=BATCH_SIZE)
    with pytest.raises(CheckpointError, match=key):
        dataset.load_state_dict({**dataset.state_dict(), key: value})


def test_a_stream_is_followed_while_it_grows(client: TraceClient) -> None:
    publish_traces(client, "growing", [3])
    batches = iter(TraceDataset(client, "growing", batch_size=2))
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
        (Cursor(), 2, [[0, 1], [2, 3], [4, 5]]),
        (Cursor(1, 2), 3, [[5, 6], [7, 8]]),
        (Cursor(2), 2, []),
    ):
        within = StreamRange(start=start, end_offset=end)
        dataset = TraceDataset(client, "unsealed", batch_size=2, within=within)
        assert [numbers(batch) for batch in dataset] == expected


def test_a_block_that_cannot_be_read_is_named(client: TraceClient) -> None:
    client.create_stream(make_spec("damaged"))
    with client.publisher("damaged", "teacher") as publisher:
        publisher.publish(encode_traces(range(2)))
        publisher.publish(make_block(1))
    batches = iter(TraceDataset(client, "damaged", batch_size=1))
    assert [numbers(next(batches)) for _ in range(2)] == [[0], [1]]
    with pytest.raises(CorruptBlockError, match="block 1: "):
        next(batches)


def test_the_process_group_says_which_rank_it_is(
    client: TraceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of-torchrun")
    with pytest.raises(InvalidInputError, match="init_process_group"):
        TraceDataset(client, "even", batch_size=BATCH_SIZE)
    # torch's backend for tests: a group without its other processes.
    torch.distributed.init_process_group("fake", rank=1, world_size=4)
    try:
        dataset = TraceDataset(client, "even", batch_size=BATCH_SIZE)
        assert numbers(next(iter(dataset))) == [2, 3]
        with pytest.raises(InvalidInputError, match="multiple of 4 ranks"):
            TraceDataset(client, "even", batch_size=6)
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
