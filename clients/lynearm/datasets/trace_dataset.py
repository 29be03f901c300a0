"""A stream as a torch dataset.

Invariants: the global batches are the same, in the same order, for every number of ranks and of DataLoader
workers; each rank gets its slice of each, and as many batches as every other rank. What a state or a cursor
says was given is not given again, and nothing after it is left out. Each worker receives the whole stream but
decodes only the blocks of its own traces: decoding is what costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from lynearm.client import ReceivedBlock, TraceClient
from lynearm.datasets.global_batches import BatchCutter, GlobalBatch, Piece
from lynearm.datasets.shards import Shard
from lynearm.wire.codec import decode_block
from lynearm.wire.dictionaries import DictionaryReader
from lynearm.wire.errors import CheckpointError, CorruptBlockError, InvalidInputError
from lynearm.wire.specs import check_name
from lynearm.wire.traces import Cursor, Trace

_STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class StreamRange:
    """The part of a stream that is read."""

    start: Cursor = field(default_factory=Cursor)
    """The first trace: `TraceBatch.after` of the batch before, to go on with any number of ranks."""
    end_offset: int | None = None
    """The block before which reading ends; None: the stream's end, which is waited for until it is sealed."""


@dataclass(frozen=True, slots=True)
class TraceBatch:
    """One rank's part of a global batch."""

    index: int
    """Of the global batch, counted from the dataset's start."""
    traces: tuple[Trace, ...]
    """Fewer than a whole share only in the last batch, where a rank may even get none."""
    after: Cursor
    """Where the next global batch begins: the same for all ranks, and what a checkpoint should hold."""


@dataclass(frozen=True, slots=True)
class _Position:
    """The batches before `index` that were this worker's are given; the next begins at `cursor`."""

    cursor: Cursor
    index: int = 0


class TraceDataset(IterableDataset[TraceBatch]):
    """The batches of a stream, for `DataLoader(dataset, batch_size=None)` and torchdata's StatefulDataLoader.

    An iteration begins at the start of the range; the first one after `load_state_dict` goes on from there.
    `state_dict` is that of the iteration begun last. A state fits any rank and number of ranks; that of a
    StatefulDataLoader with workers is one for each worker, and needs as many of them again.

    Args:
        client: Of the service that keeps the stream. Each worker connects for itself.
        stream: Name of the stream.
        batch_size: Traces of a global batch, over all ranks.
        shard: Which rank's part to give; None: torch.distributed's, if it is initialised, or all.
        within: What to read.

    Raises:
        InvalidInputError: if ranks cannot share such a batch, or torchrun started this process and neither
            `shard` nor torch.distributed says which rank it is.
    """

    def __init__(
        self,
        client: TraceClient,
        stream: str,
        *,
        batch_size: int,
        shard: Shard | None = None,
        within: StreamRange | None = None,
    ) -> None:
        super().__init__()
        # Resolved here: a DataLoader's workers do not belong to the process group.
        self._shard = _current_shard() if shard is None else shard
        self._shard.check_batch_size(batch_size)
        self._client = client
        self._stream = check_name(stream)
        self._batch_size = batch_size
        self._range = StreamRange() if within is None else within
        self._position = _Position(self._range.start)
        self._loaded: _Position | None = None

    def __repr__(self) -> str:
        return (
            f"TraceDataset({self._stream!r}, batch_size={self._batch_size}, "
            f"rank {self._shard.rank} of {self._shard.world_size})"
        )

    def __iter__(self) -> Iterator[TraceBatch]:
        """The batches that are this worker's turn.

        Raises:
            LynearmError: while iterating, as for `Subscription` and `decode_block`.
        """
        # Done now, not at the first `next`: a loader may begin again before it takes anything.
        loaded, self._loaded = self._loaded, None
        self._position = _Position(self._range.start) if loaded is None else loaded
        return self._batches(self._position)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: plain numbers and strings."""
        return {
            "version": _STATE_VERSION,
            "stream": self._stream,
            "batch_size": self._batch_size,
            "offset": self._position.cursor.offset,
            "trace_index": self._position.cursor.trace_index,
            "batch_index": self._position.index,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration go on where another was.

        Raises:
            CheckpointError: if the state is of another stream, batch size or version.
        """
        own = self.state_dict()
        for key in ("version", "stream", "batch_size"):
            if state_dict.get(key) != own[key]:
                raise CheckpointError(
                    f"the dataset's state has {key} {state_dict.get(key)!r}, expected {own[key]!r}",
                    "load it into a dataset made as the one that was saved",
                )
        cursor = Cursor(int(state_dict["offset"]), int(state_dict["trace_index"]))
        self._position = self._loaded = _Position(cursor, int(state_dict["batch_index"]))

    def _batches(self, position: _Position) -> Iterator[TraceBatch]:
        worker = get_worker_info()
        turn, turns = (0, 1) if worker is None else (worker.id, worker.num_workers)
        decoder = _Decoder(self._client.dictionaries(self._stream, wait=True))
        for batch in self._global_batches(position):
            if batch.index % turns == turn:
                traces = decoder.traces(batch.part(self._shard.slice_of(batch.size)))
                self._position = _Position(batch.after, batch.index + 1)
                yield TraceBatch(batch.index, traces, batch.after)

    def _global_batches(self, position: _Position) -> Iterator[GlobalBatch]:
        cutter = BatchCutter(self._batch_size, start=position.cursor, index=position.index)
        for received in self._blocks(position.cursor.offset):
            yield from cutter.add(received)
        rest = cutter.rest()
        if rest is not None:
            yield rest

    def _blocks(self, start: int) -> Iterator[ReceivedBlock]:
        end = self._range.end_offset
        if end is not None and start >= end:
            return
        with self._client.subscribe(self._stream, start=start) as blocks:
            for received in blocks:
                yield received
                if received.offset + 1 == end:
                    return


class _Decoder:
    """Decodes each block once, though its traces may be in several batches."""

    def __init__(self, dictionaries: DictionaryReader) -> None:
        self._dictionaries = dictionaries
        self._offset = -1
        self._traces: tuple[Trace, ...] = ()

    def traces(self, pieces: tuple[Piece, ...]) -> tuple[Trace, ...]:
        return tuple(trace for piece in pieces for trace in self._block(piece)[piece.start : piece.end])

    def _block(self, piece: Piece) -> tuple[Trace, ...]:
        if piece.offset != self._offset:
            try:
                self._traces = decode_block(piece.block, dictionaries=self._dictionaries)
            except CorruptBlockError as error:
                raise CorruptBlockError(f"block {piece.offset}: {error.message}", error.remedy) from error
            self._offset = piece.offset
        return self._traces


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
