"""A stream as a torch dataset.

Invariants: the global batches are the same, in the same order, for every number of ranks and of DataLoader
workers; each rank gets its slice of each, and as many batches as every other rank. What a state or a position
says was given is not given again, and nothing after it is left out. Each worker receives the whole stream but
decodes only the blocks of its own traces: decoding is what costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from lynearm.client import ReceivedBlock, TraceClient
from lynearm.datasets.batch_sequence import Example, PlannedBatch, StreamPosition, batch_sequence
from lynearm.wire.codec import decode_block
from lynearm.wire.dictionaries import DictionaryReader
from lynearm.wire.errors import CheckpointError, CorruptBlockError, InvalidInputError
from lynearm.wire.sharding import Shard, ShardPlan
from lynearm.wire.specs import check_name
from lynearm.wire.traces import Trace

_STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class TraceBatch:
    """One rank's part of a global batch."""

    step: int
    """Number of the global batch, from 0 at the beginning of the sequence."""
    traces: tuple[Trace, ...]
    """In the last batch of a stream a rank may get fewer than in others, or none."""
    global_size: int
    """Traces of the batch over all ranks: what a mean over it divides by."""
    after: StreamPosition
    """Where the next global batch is: the same for all ranks, and what a checkpoint should hold."""


class TraceDataset(IterableDataset[TraceBatch]):
    """The batches of a stream, for `DataLoader(dataset, batch_size=None)` and torchdata's StatefulDataLoader.

    An iteration begins at `start`; the first one after `load_state_dict` goes on from there. `state_dict` is
    that of the iteration begun last. A state fits any rank and number of ranks; that of a StatefulDataLoader
    with workers is one for each worker, and needs as many of them again.

    Args:
        client: Of the service that keeps the stream. Each worker connects for itself.
        stream: Name of the stream.
        plan: Size of a global batch, and the shuffle. A worker holds as many traces as its window has.
        shard: Which rank's part to give; None: torch.distributed's, if it is initialised, or all.
        start: `TraceBatch.after` of the batch before, to go on with any number of ranks.
        end_offset: The block before which reading ends; None: the stream's end, which is waited for until
            it is sealed.

    Raises:
        InvalidInputError: if torchrun started this process, and neither `shard` nor torch.distributed says
            which rank it is.
    """

    def __init__(
        self,
        client: TraceClient,
        stream: str,
        *,
        plan: ShardPlan,
        shard: Shard | None = None,
        start: StreamPosition | None = None,
        end_offset: int | None = None,
    ) -> None:
        super().__init__()
        self._client = client
        self._stream = check_name(stream)
        self._plan = plan
        # Resolved here: a DataLoader's workers do not belong to the process group.
        self._shard = _current_shard() if shard is None else shard
        self._start = StreamPosition() if start is None else start
        self._end_offset = end_offset
        self._position = self._start
        self._loaded: StreamPosition | None = None

    def __repr__(self) -> str:
        return (
            f"TraceDataset({self._stream!r}, {self._plan.global_batch_size} traces a batch, "
            f"rank {self._shard.rank} of {self._shard.world_size})"
        )

    def __iter__(self) -> Iterator[TraceBatch]:
        """The batches that are this worker's turn.

        Raises:
            LynearmError: while iterating, as for `Subscription` and `decode_block`.
        """
        # Done now, not at the first `next`: a loader may begin again before it takes anything.
        loaded, self._loaded = self._loaded, None
        self._position = self._start if loaded is None else loaded
        return self._batches(self._position)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: numbers and strings."""
        return {
            "version": _STATE_VERSION,
            "stream": self._stream,
            "plan": asdict(self._plan),
            "position": asdict(self._position),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration go on where another was.

        Raises:
            CheckpointError: if the state is of another stream, plan or version.
        """
        own = self.state_dict()
        for key in ("version", "stream", "plan"):
            if state_dict.get(key) != own[key]:
                raise CheckpointError(
                    f"the dataset's state has {key} {state_dict.get(key)!r}, expected {own[key]!r}",
                    "load it into a dataset made as the one that was saved",
                )
        self._position = self._loaded = StreamPosition(**state_dict["position"])

    def _batches(self, start: StreamPosition) -> Iterator[TraceBatch]:
        worker = get_worker_info()
        turn, turns = (0, 1) if worker is None else (worker.id, worker.num_workers)
        decoder = _Decoder(self._client.dictionaries(self._stream, wait=True))
        for batch in batch_sequence(self._blocks(start.offset), self._plan, self._shard, start):
            # A DataLoader takes from its workers in turn: this way, it gets the batches in order.
            if batch.step % turns == turn:
                traces = decoder.traces(batch)
                self._position = batch.after
                yield TraceBatch(batch.step, traces, batch.global_size, batch.after)

    def _blocks(self, start: int) -> Iterator[ReceivedBlock]:
        if self._end_offset is not None and start >= self._end_offset:
            return
        with self._client.subscribe(self._stream, start=start) as blocks:
            for received in blocks:
                yield received
                if received.offset + 1 == self._end_offset:
                    return


class _Decoder:
    """Decodes each block once, as long as traces of the same window may need it."""

    def __init__(self, dictionaries: DictionaryReader) -> None:
        self._dictionaries = dictionaries
        self._decoded: dict[int, tuple[Trace, ...]] = {}

    def traces(self, batch: PlannedBatch) -> tuple[Trace, ...]:
        traces = tuple(self._block(example)[example.index] for example in batch.examples)
        self._decoded = {
            offset: block for offset, block in self._decoded.items() if offset >= batch.after.offset
        }
        return traces

    def _block(self, example: Example) -> tuple[Trace, ...]:
        traces = self._decoded.get(example.offset)
        if traces is None:
            try:
                traces = decode_block(example.block, dictionaries=self._dictionaries)
            except CorruptBlockError as error:
                raise CorruptBlockError(f"block {example.offset}: {error.message}", error.remedy) from error
            self._decoded[example.offset] = traces
        return traces


def _current_shard() -> Shard:
    if torch.distributed.is_available():
        if torch.distributed.is_initialized():
            return Shard(torch.distributed.get_rank(), torch.distributed.get_world_size())
        if torch.distributed.is_torchelastic_launched():
            raise InvalidInputError(
                "torchrun started this process, and torch.distributed does not know its rank yet",
                "call torch.distributed.init_process_group before, or give shard=Shard(rank, world_size)",
            )
    return Shard()
