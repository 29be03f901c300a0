"""What is known about streams, blocks, producers, finished prompts and dictionaries, and where it changes.

Invariants of every catalog:

- `commit` is the only commit point: in one transaction it adds a group's index rows, producers' sequence
  numbers, finished prompts and units of work, and hands out the offsets. Durable on return.
- Offsets of a stream are 0, 1, 2, … without gaps, and never change.
- A row never points at an object that was not durable when the row was committed.
- A stream holds each dictionary that it was given, unchanged, until the stream is deleted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from lynearm.traces.consumer_records import NO_BOUND, ConsumerCatalog, MaxLag
from lynearm.traces.job_records import QueueCatalog
from lynearm.traces.store import Span, StoredObject
from lynearm.wire.errors import LynearmError, StreamNotFoundError
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.retention import Retention
from lynearm.wire.specs import CodecMode, StreamSpec
from lynearm.wire.work import FinishedWork


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """A stream as the catalog knows it."""

    stream_id: int
    """Never used again, unlike the name of a deleted stream."""
    info: StreamInfo

    @property
    def name(self) -> str:
        """The stream's name."""
        return self.info.spec.name


@dataclass(frozen=True, slots=True)
class Producer:
    """One epoch of a producer of a stream, as it was opened."""

    key: int
    stream_id: int
    stream_name: str
    producer_id: str
    epoch: int
    next_sequence: int
    codec_mode: CodecMode
    """Of the stream."""


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """What the index says about a block."""

    size_bytes: int
    """Of the encoded block, header included."""
    checksum: int
    """XXH3-64 of the encoded block, header included: the block's own checksum leaves the header out."""
    trace_count: int
    prompt_token_count: int
    completion_token_count: int


@dataclass(frozen=True, slots=True)
class NewBlock:
    """A block that asks for an offset."""

    producer: Producer
    sequence: int
    """From 1, without gaps in one epoch."""
    facts: BlockFacts
    finished_prompt_ids: tuple[str, ...] = ()
    finished_work: tuple[FinishedWork, ...] = ()
    """Leased units that it finishes; of different leases."""
    labels: bytes = b""
    """What the index keeps for filters; see `lynearm.wire.labels`."""


@dataclass(frozen=True, slots=True)
class WrittenGroup:
    """Blocks in the object that holds them."""

    stored: StoredObject
    """Durable; its spans are those of `blocks`."""
    blocks: Sequence[NewBlock]
    """Of any number of streams and producers."""


def blocks_of(groups: Sequence[WrittenGroup]) -> list[NewBlock]:
    """The blocks of groups, in their order."""
    return [block for group in groups for block in group.blocks]


@dataclass(frozen=True, slots=True)
class CommittedBlock:
    """A block that has its offset."""

    offset: int
    is_new: bool
    """False when an earlier publish of the same block had committed it."""


CommitOutcome: TypeAlias = CommittedBlock | LynearmError


@dataclass(frozen=True, slots=True)
class BlockLocation:
    """Where a committed block lies."""

    offset: int
    object_key: str
    span: Span
    checksum: int


@dataclass(frozen=True, slots=True)
class DeletedStream:
    """What a deletion leaves to be done."""

    stream_id: int
    object_keys: tuple[str, ...]
    """Objects that no block refers to any more."""


@dataclass(frozen=True, slots=True)
class ExpiredBlocks:
    """What an expiry took."""

    first_offset: int
    """First offset that the stream still keeps."""
    block_count: int
    size_bytes: int
    object_keys: tuple[str, ...]
    """Objects that no block refers to any more."""


@dataclass(frozen=True, slots=True)
class StreamChange:
    """How far a stream is, as one server tells another."""

    stream_id: int
    stream_name: str
    next_offset: int
    state: Literal["open", "sealed", "deleted"]


@dataclass(frozen=True, slots=True)
class FinishedPrompt:
    """A finished prompt; positions ascend in the order of the commits."""

    position: int
    prompt_id: str


@dataclass(frozen=True, slots=True)
class LabelledOffset:
    """What filters look at."""

    offset: int
    labels: bytes


@dataclass(frozen=True, slots=True)
class AttachmentRecord:
    """An attachment, without its content."""

    name: str
    size_bytes: int
    updated_unix_nano: int


class Catalog(QueueCatalog, ConsumerCatalog, Protocol):
    """Streams, block index, producers, finished prompts and dictionaries, in a transactional database.

    Every method raises StorageFullError or StorageError where the database fails, CatalogUnavailableError
    where it cannot be reached.
    """

    @property
    def is_shared(self) -> bool:
        """Whether several servers may use the catalog at the same time."""
        ...

    async def create_stream(
        self, spec: StreamSpec, *, allow_existing: bool, max_lag: MaxLag = NO_BOUND
    ) -> StreamRecord:
        """Add a stream; of one that exists, the bound on its lag stays.

        Raises:
            StreamExistsError: the name is taken, and not (with `allow_existing`) by an equal spec.
        """
        ...

    async def get_stream(self, name: str) -> StreamRecord:
        """Describe a stream.

        Raises:
            StreamNotFoundError: there is none.
        """
        ...

    async def list_streams(self) -> list[StreamRecord]:
        """Every stream, ascending by name."""
        ...

    async def count_streams(self, *, besides: str) -> int:
        """How many streams there are, one of that name not counted."""
        ...

    async def seal_stream(self, name: str) -> StreamRecord:
        """Let a stream take no more blocks; idempotent.

        Raises:
            StreamNotFoundError: there is none.
        """
        ...

    async def delete_stream(self, name: str) -> DeletedStream:
        """Remove a stream with all its rows.

        Raises:
            StreamNotFoundError: there is none.
        """
        ...

    async def open_producer(self, stream_name: str, producer_id: str, epoch: int) -> Producer:
        """Let a producer start (`epoch` 0: the next epoch; earlier ones are fenced) or come back.

        Raises:
            StreamNotFoundError: there is no such stream.
            StreamSealedError: the stream takes no more blocks, and the producer starts.
            ProducerFencedError: a newer epoch has taken over.
            PreconditionError: the epoch was never handed out.
        """
        ...

    async def commit(self, groups: Sequence[WrittenGroup]) -> list[CommitOutcome]:
        """Commit groups in one transaction, in order. A block that must be refused does not fail the others.

        Args:
            groups: Each in an object of its own.

        Returns:
            One outcome per block, over all groups. An error is StreamNotFoundError, StreamSealedError,
            ProducerFencedError, SequenceGapError, SequenceConflictError, PromptFinishedError,
            LeaseSupersededError or InvalidInputError (units that its lease does not cover). When no block of
            a group is new, its object is not referred to.

        Raises:
            StorageFullError: nothing was committed.
            StorageError, CatalogUnavailableError: it is not known whether anything was committed; the
                object must stay.
            ServiceUnavailableError: an object was condemned before; nothing was committed.
        """
        ...

    async def find_blocks(self, stream_id: int, offset: int, count: int) -> list[BlockLocation]:
        """Locations of up to `count` blocks from `offset` on; fewer at the end."""
        ...

    async def find_labels(self, stream_id: int, offset: int, count: int) -> list[LabelledOffset]:
        """Labels of up to `count` blocks from `offset` on; fewer at the end."""
        ...

    async def list_finished_prompts(self, stream_id: int, after: int, count: int) -> list[FinishedPrompt]:
        """Up to `count` prompts with positions above `after`, ascending."""
        ...

    async def put_dictionary(self, stream_name: str, digest: bytes, content: bytes) -> None:
        """Give a stream a dictionary; durable on return. Success when it is there already.

        Args:
            stream_name: The stream.
            digest: Names the content.
            content: The dictionary.

        Raises:
            StreamNotFoundError: there is no such stream.
            StreamSealedError: the stream is sealed and does not hold the dictionary.
            DictionaryConflictError: the stream holds another one of that digest.
            DictionaryLimitError: the stream holds as many others as it may.
        """
        ...

    async def get_dictionary(self, stream_name: str, digest: bytes) -> bytes:
        """A dictionary of a stream.

        Raises:
            StreamNotFoundError: there is no such stream.
            DictionaryNotFoundError: the stream does not hold it.
        """
        ...

    async def put_attachment(self, stream_name: str, name: str, content: bytes) -> None:
        """Keep something about a stream under a name, in place of what was there; durable on return.

        Raises:
            StreamNotFoundError: there is no such stream.
            StreamSealedError: the stream is sealed.
            LimitError: the stream holds as many others as it may.
        """
        ...

    async def get_attachment(self, stream_name: str, name: str) -> bytes:
        """An attachment of a stream.

        Raises:
            StreamNotFoundError: there is no such stream.
            AttachmentNotFoundError: the stream has none of that name.
        """
        ...

    async def list_attachments(self, stream_name: str) -> list[AttachmentRecord]:
        """The attachments of a stream, ascending by name.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        ...

    async def has_dictionary(self, stream_id: int, digest: bytes) -> bool:
        """Whether the stream holds a dictionary; False when it was deleted."""
        ...

    async def find_unreferenced(self, object_keys: Sequence[str]) -> list[str]:
        """Those of the given objects that no block refers to."""
        ...

    async def set_retention(self, name: str, retention: Retention) -> StreamRecord:
        """Say how long a stream keeps its blocks.

        Raises:
            StreamNotFoundError: there is none.
        """
        ...

    async def expire_blocks(self, stream_id: int, now_unix_nano: int, limit: int) -> ExpiredBlocks:
        """Remove up to `limit` of the oldest blocks, as far as the stream's retention gives them up."""
        ...

    async def condemn_objects(self, object_keys: Sequence[str]) -> list[str]:
        """Those of the given objects that no block refers to, and from now on never will."""
        ...

    async def adopt_store(self, identity: str, *, is_empty: bool) -> str | None:
        """The identity of the store that holds the catalog's blocks: this one, if none was adopted before.

        Args:
            identity: Of the store at hand.
            is_empty: Whether it is known to hold no object.

        Returns:
            None where the catalog is new and the store may not be: its objects would be those of another
            catalog, and garbage for this one.
        """
        ...

    async def find_progress(self, stream_ids: Sequence[int]) -> dict[int, StreamChange]:
        """How far streams are, by id; those that were deleted are left out."""
        ...

    def listen(self) -> AsyncIterator[StreamChange | None]:
        """Changes that servers commit, for ever; None where some may have been missed.

        The first item is None, and whatever is committed after it is told or followed by a None. Ends at
        once where no other server can write. Its own changes may be among them.
        """
        ...

    async def close(self) -> None:
        """Wait for operations under way, then release threads and connections."""
        ...


def stream_not_found(name: str) -> StreamNotFoundError:
    """The error of every catalog for a name that it does not know."""
    return StreamNotFoundError(
        f"there is no stream {name[:140]!r}", "create it, or choose one from `lynearm streams list`"
    )
