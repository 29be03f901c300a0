"""The catalog and the store against a model in memory: any order of what producers, readers and disks do."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from traces.harness import make_block, make_spec

from lynearm.traces import failpoints
from lynearm.traces.backend import Backend, open_backend
from lynearm.traces.catalog import BlockFacts, NewBlock, Producer
from lynearm.traces.config import ServeConfig
from lynearm.wire.errors import (
    InternalError,
    LynearmError,
    PreconditionError,
    ProducerFencedError,
    PromptFinishedError,
    SequenceConflictError,
    SequenceGapError,
    StorageError,
    StorageFullError,
    StreamNotFoundError,
    StreamSealedError,
)

Outcome = int | type[LynearmError]

PRODUCERS = ("a", "b", "c")
FAILURES: dict[str, type[LynearmError]] = {
    "store.before_write=enospc": StorageFullError,
    "store.before_sync=eio": StorageError,
    "store.after_write=eio": StorageError,
    "catalog.before_commit=eio": InternalError,
}


@dataclass(frozen=True, slots=True)
class Sent:
    """A block as a producer sends it."""

    number: int
    prompts: tuple[str, ...]

    @property
    def data(self) -> bytes:
        return make_block(self.number, 40 + 4 * (self.number % 50))


@dataclass(slots=True)
class Model:
    """What a service must be: a list of blocks, and what each producer's newest epoch has sent."""

    blocks: list[bytes] = field(default_factory=list[bytes])
    finished: list[str] = field(default_factory=list[str])
    epochs: dict[str, int] = field(default_factory=dict[str, int])
    sent: dict[str, list[tuple[Sent, int]]] = field(default_factory=dict[str, list[tuple[Sent, int]]])
    sealed: bool = False

    def publish(self, producer_id: str, epoch: int, sequence: int, block: Sent) -> Outcome:
        if epoch != self.epochs[producer_id]:
            return ProducerFencedError
        sent = self.sent[producer_id]
        if sequence <= len(sent):
            first, offset = sent[sequence - 1]
            return offset if first.data == block.data else SequenceConflictError
        if self.sealed:
            return StreamSealedError
        if sequence > len(sent) + 1:
            return SequenceGapError
        if set(block.prompts) & set(self.finished) or len(set(block.prompts)) < len(block.prompts):
            return PromptFinishedError
        offset = len(self.blocks)
        self.blocks.append(block.data)
        self.finished += block.prompts
        sent.append((block, offset))
        return offset


class Service(RuleBasedStateMachine):
    """The real catalog, store and group commit of one data directory."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="lynearm-model-"))
        self.runner = asyncio.Runner()
        self.model = Model()
        self.handles: list[Producer] = []
        self.lost_handles: list[Producer] = []
        self.number = 0

    @initialize()
    def begin(self) -> None:
        self.open_backend()
        self.runner.run(self.backend.catalog.create_stream(make_spec(), allow_existing=False))

    def open_backend(self) -> None:
        self.stack = AsyncExitStack()
        config = ServeConfig(data_dir=self.directory, cache_bytes=500, group_milliseconds=0.0)
        self.backend: Backend = self.runner.run(self.stack.enter_async_context(open_backend(config)))

    def teardown(self) -> None:
        failpoints.arm("")
        self.runner.run(self.stack.aclose())
        self.runner.close()
        shutil.rmtree(self.directory)

    @rule()
    def restart(self) -> None:
        self.runner.run(self.stack.aclose())
        self.open_backend()
        keys = self.runner.run(self.list_keys())
        assert self.runner.run(self.backend.catalog.find_unreferenced(keys)) == []

    @rule(producer_id=st.sampled_from(PRODUCERS))
    def start_producer(self, producer_id: str) -> None:
        if self.model.sealed:
            assert self.failure_of_opening(producer_id, 0) is StreamSealedError
            return
        producer = self.open_producer(producer_id, 0)
        self.model.epochs[producer_id] = self.model.epochs.get(producer_id, 0) + 1
        self.model.sent[producer_id] = []
        assert (producer.epoch, producer.next_sequence) == (self.model.epochs[producer_id], 1)
        self.handles.append(producer)

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def reconnect_producer(self, data: st.DataObject) -> None:
        handle = self.draw_handle(data)
        newest = self.model.epochs[handle.producer_id]
        if handle.epoch < newest:
            assert self.failure_of_opening(handle.producer_id, handle.epoch) is ProducerFencedError
        else:
            producer = self.open_producer(handle.producer_id, newest)
            assert producer.next_sequence == len(self.model.sent[handle.producer_id]) + 1
        assert self.failure_of_opening(handle.producer_id, newest + 1) is PreconditionError

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), count=st.integers(1, 5))
    def publish(self, data: st.DataObject, count: int) -> None:
        """A group of several producers: new blocks, and now and then one again, changed or too early."""
        group: list[tuple[Producer, int, Sent]] = []
        ahead: dict[int, int] = {}
        for _ in range(count):
            handle = self.draw_handle(data)
            sent = self.model.sent[handle.producer_id]
            fresh = len(sent) + 1 + ahead.get(handle.key, 0)
            kind = data.draw(st.sampled_from(["new", "new", "new", "again", "changed", "early"]))
            if kind == "again" and sent:
                sequence = data.draw(st.integers(1, len(sent)))
                group.append((handle, sequence, sent[sequence - 1][0]))
                continue
            sequence = {"changed": max(1, fresh - 1), "early": fresh + 1}.get(kind, fresh)
            ahead[handle.key] = ahead.get(handle.key, 0) + (kind == "new")
            group.append((handle, sequence, self.draw_block(data)))
        expected = [self.model.publish(one.producer_id, one.epoch, *rest) for one, *rest in group]
        assert self.submit(group) == expected

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), failure=st.sampled_from(sorted(FAILURES)))
    def publish_on_a_failing_disk(self, data: st.DataObject, failure: str) -> None:
        handle = self.draw_handle(data)
        sequence = len(self.model.sent[handle.producer_id]) + 1
        block = self.draw_block(data)
        trial = Model(
            list(self.model.blocks),
            list(self.model.finished),
            dict(self.model.epochs),
            {key: list(value) for key, value in self.model.sent.items()},
            self.model.sealed,
        )
        would_be = trial.publish(handle.producer_id, handle.epoch, sequence, block)
        failpoints.arm(failure)
        outcome = self.submit([(handle, sequence, block)])
        failpoints.arm("")
        # What is refused anyway never gets as far as the commit.
        reaches_commit = isinstance(would_be, int)
        fails = reaches_commit or not failure.startswith("catalog")
        assert outcome == [FAILURES[failure] if fails else would_be]

    @precondition(lambda self: self.lost_handles)
    @rule(data=st.data())
    def publish_to_a_deleted_stream(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.lost_handles))
        assert self.submit([(handle, 1, self.draw_block(data))]) == [StreamNotFoundError]

    @rule(data=st.data(), max_bytes=st.integers(1, 2000))
    def read(self, data: st.DataObject, max_bytes: int) -> None:
        """From any offset to the end, in pieces."""
        end = len(self.model.blocks)
        offset = first = data.draw(st.integers(0, end))
        found: list[bytes] = []
        record = self.runner.run(self.backend.catalog.get_stream("s"))
        while offset < end:
            reading = self.backend.reader.read(record, offset, end=end, max_bytes=max_bytes)
            piece = [bytes(block) for block in self.runner.run(reading)]
            assert piece
            found += piece
            offset += len(piece)
        assert found == self.model.blocks[first:]

    @precondition(lambda self: len(self.model.blocks) > 8)
    @rule()
    def seal(self) -> None:
        self.runner.run(self.backend.seal_stream("s"))
        self.model.sealed = True

    @precondition(lambda self: self.model.sealed)
    @rule()
    def delete_and_create_again(self) -> None:
        self.runner.run(self.backend.delete_stream("s"))
        self.runner.run(self.backend.catalog.create_stream(make_spec(), allow_existing=False))
        self.model = Model()
        self.lost_handles += self.handles
        self.handles = []

    @invariant()
    def catalog_agrees(self) -> None:
        if not hasattr(self, "backend"):
            return
        record = self.runner.run(self.backend.catalog.get_stream("s"))
        assert record.info.next_offset == len(self.model.blocks)
        assert record.info.size_bytes == sum(map(len, self.model.blocks))
        assert record.info.sealed == self.model.sealed
        prompts = self.runner.run(self.backend.catalog.list_finished_prompts(record.stream_id, 0, 10_000))
        assert [prompt.prompt_id for prompt in prompts] == self.model.finished
        assert record.info.finished_prompt_count == len(prompts)

    def draw_handle(self, data: st.DataObject) -> Producer:
        # The newest first: it shrinks to it, and is drawn most where there are few.
        return data.draw(st.sampled_from(self.handles[::-1][:6]))

    def draw_block(self, data: st.DataObject) -> Sent:
        self.number += 1
        prompts = data.draw(st.lists(st.integers(0, 60), max_size=2))
        return Sent(self.number, tuple(f"prompt-{prompt}" for prompt in prompts))

    def open_producer(self, producer_id: str, epoch: int) -> Producer:
        return self.runner.run(self.backend.catalog.open_producer("s", producer_id, epoch))

    def failure_of_opening(self, producer_id: str, epoch: int) -> type[LynearmError] | None:
        try:
            self.open_producer(producer_id, epoch)
        except LynearmError as error:
            return type(error)
        return None

    def submit(self, group: list[tuple[Producer, int, Sent]]) -> list[Outcome]:
        async def run() -> list[Any]:
            pending = [
                await self.backend.committer.submit(_new_block(producer, sequence, block), block.data)
                for producer, sequence, block in group
            ]
            return list(await asyncio.gather(*pending))

        outcomes = self.runner.run(run())
        return [one if isinstance(one, int) else type(one) for one in outcomes]

    async def list_keys(self) -> list[str]:
        return [key async for keys in self.backend.store.list_keys() for key in keys]


def _new_block(producer: Producer, sequence: int, block: Sent) -> NewBlock:
    facts = BlockFacts(len(block.data), xxhash.xxh3_64_intdigest(block.data), 2, 3, 5)
    return NewBlock(producer, sequence, facts, block.prompts)


Service.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
test_any_history_gives_what_the_model_gives = Service.TestCase
