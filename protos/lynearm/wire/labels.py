"""What is said about a block without opening it, and filters over that.

Blocks are opaque to the service. A publisher may therefore say with each block which tags its traces have,
and once what all its blocks are. A filter passes over the blocks in which no trace can match; whoever opens
the rest drops the traces that do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from lynearm.v1 import consumer_pb2 as pb
from lynearm.v1 import trace_pb2
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.specs import check_name

MAX_TAGS = 256
"""Pairs in a summary."""

MAX_OPEN_KEYS = 64
MAX_PRODUCER_LABELS = 64
MAX_CONDITIONS = 64

MAX_LABELS_BYTES = 16 << 10
"""Of all that the index keeps of one block's labels."""

_MAX_VALUES = 16
"""Of one key in a summary that `summarise_tags` makes; such as the subject, not such as a serial number."""

_MAX_VALUE_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class TagSummary:
    """Which tags the traces of a block have."""

    tags: frozenset[tuple[str, str]] = frozenset()
    """Every (key, value) that some trace has, but for the open keys."""
    open_keys: frozenset[str] = frozenset()
    """Keys that some trace has with values that are not listed."""


@dataclass(frozen=True, slots=True)
class BlockLabels:
    """What is known of a block for filters."""

    producer: Mapping[str, str] = field(default_factory=dict[str, str])
    """Labels of who published it."""
    tags: TagSummary | None = None
    """None: not known."""


@dataclass(frozen=True, slots=True)
class TraceFilter:
    """Which traces are wanted: those that meet every condition. Without conditions, all.

    Raises:
        InvalidInputError: if a condition allows no value, or there are too many.
    """

    tags: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """By tag: the values allowed."""
    producer_labels: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """By label of the producer: the values allowed."""

    def __post_init__(self) -> None:
        """Check every condition."""
        conditions = [*self.tags.items(), *self.producer_labels.items()]
        if len(conditions) > MAX_CONDITIONS:
            raise InvalidInputError(
                f"filter of {len(conditions)} conditions, at most {MAX_CONDITIONS} may be"
            )
        for key, values in conditions:
            if not values:
                raise InvalidInputError(f"filter on {key!r} allows no value", "name at least one")

    def may_match(self, labels: BlockLabels) -> bool:
        """Whether some trace of a block can match; False only where none can."""
        if any(labels.producer.get(key) not in values for key, values in self.producer_labels.items()):
            return False
        summary = labels.tags
        if summary is None:
            return True
        return all(
            key in summary.open_keys or any((key, value) in summary.tags for value in values)
            for key, values in self.tags.items()
        )

    def matches(self, tags: Mapping[str, str]) -> bool:
        """Whether a trace with these tags is wanted, given that its producer is."""
        return all(tags.get(key) in values for key, values in self.tags.items())


def summarise_tags(traces: Iterable[Mapping[str, str]]) -> TagSummary | None:
    """The summary of a block whose traces have these tags; None when there are too many keys for one."""
    values: defaultdict[str, set[str]] = defaultdict(set)
    for tags in traces:
        for key, value in tags.items():
            values[key].add(value)
    open_keys = {
        key
        for key, found in values.items()
        if len(found) > _MAX_VALUES or max(map(len, found)) > _MAX_VALUE_CHARACTERS
    }
    listed = {key: found for key, found in values.items() if key not in open_keys}
    while sum(map(len, listed.values())) > MAX_TAGS:
        most = max(listed, key=lambda key: (len(listed[key]), key))
        open_keys.add(most)
        del listed[most]
    if len(open_keys) > MAX_OPEN_KEYS:
        return None
    pairs = frozenset((key, value) for key, found in listed.items() for value in found)
    summary = TagSummary(pairs, frozenset(open_keys))
    return summary if summary_to_proto(summary).ByteSize() <= MAX_LABELS_BYTES // 2 else None


def check_producer_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """The labels, unchanged.

    Raises:
        InvalidInputError: if there are too many, or a key is not a name.
    """
    if len(labels) > MAX_PRODUCER_LABELS:
        raise InvalidInputError(f"{len(labels)} producer labels, at most {MAX_PRODUCER_LABELS} may be")
    for key in labels:
        check_name(key, what="producer label")
    return labels


def summary_to_proto(summary: TagSummary) -> pb.TagSummary:
    """The message of a summary; the same for equal summaries."""
    tags = [trace_pb2.Tag(key=key, value=value) for key, value in sorted(summary.tags)]
    return pb.TagSummary(tags=tags, open_keys=sorted(summary.open_keys))


def summary_from_proto(message: pb.TagSummary) -> TagSummary:
    """The summary in a message.

    Raises:
        InvalidInputError: if it holds too much.
    """
    if len(message.tags) > MAX_TAGS or len(message.open_keys) > MAX_OPEN_KEYS:
        raise InvalidInputError(
            f"summary of {len(message.tags)} tags and {len(message.open_keys)} open keys, "
            f"at most {MAX_TAGS} and {MAX_OPEN_KEYS} may be",
            "leave out the values of a key that has many, and name it as open",
        )
    return TagSummary(frozenset((tag.key, tag.value) for tag in message.tags), frozenset(message.open_keys))


def parse_summary(data: bytes) -> TagSummary:
    """The summary in a serialised message.

    Raises:
        InvalidInputError: if it is no such message, or holds too much.
    """
    try:
        return summary_from_proto(pb.TagSummary.FromString(data))
    except DecodeError as error:
        raise InvalidInputError("PublishBlock.tags is not a TagSummary") from error


def labels_to_bytes(labels: BlockLabels) -> bytes:
    """What the index keeps; empty where nothing is known.

    Raises:
        InvalidInputError: if it is too long.
    """
    message = pb.BlockLabels(producer_labels=dict(labels.producer))
    if labels.tags is not None:
        message.tags.CopyFrom(summary_to_proto(labels.tags))
    data = message.SerializeToString(deterministic=True)
    if len(data) > MAX_LABELS_BYTES:
        raise InvalidInputError(
            f"labels of a block take {len(data)} bytes, at most {MAX_LABELS_BYTES} may be",
            "name keys with long values as open",
        )
    return data


def labels_from_bytes(data: bytes) -> BlockLabels:
    """The labels that the index kept."""
    message = pb.BlockLabels.FromString(data)
    tags = summary_from_proto(message.tags) if message.HasField("tags") else None
    return BlockLabels(dict(message.producer_labels), tags)


def filter_to_proto(wanted: TraceFilter) -> pb.BlockFilter:
    """The message of a filter."""
    return pb.BlockFilter(tags=_conditions(wanted.tags), producer_labels=_conditions(wanted.producer_labels))


def filter_from_proto(message: pb.BlockFilter) -> TraceFilter:
    """The filter in a message.

    Raises:
        InvalidInputError: as for `TraceFilter`, or if a key comes twice.
    """
    found: list[dict[str, frozenset[str]]] = []
    for conditions in (message.tags, message.producer_labels):
        by_key = {condition.key: frozenset(condition.values) for condition in conditions}
        if len(by_key) < len(conditions):
            raise InvalidInputError("a filter has two conditions on one key", "name all values in one")
        found.append(by_key)
    return TraceFilter(*found)


def _conditions(wanted: Mapping[str, frozenset[str]]) -> list[pb.LabelCondition]:
    return [pb.LabelCondition(key=key, values=sorted(values)) for key, values in sorted(wanted.items())]
