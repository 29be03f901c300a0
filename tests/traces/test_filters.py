"""Subscriptions that want some of a stream's blocks, or begin at a cursor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces.harness import Producer, Reader, code, details, error_name, make_block, publish

from lynearm.v1 import consumer_pb2 as pb
from lynearm.v1 import trace_pb2, trace_service_pb2
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.labels import (
    BlockLabels,
    TraceFilter,
    filter_from_proto,
    filter_to_proto,
    labels_from_bytes,
    labels_to_bytes,
    summarise_tags,
)


def summary(*tags: tuple[str, str], open_keys: Iterable[str] = ()) -> pb.TagSummary:
    return pb.TagSummary(
        tags=[trace_pb2.Tag(key=key, value=value) for key, value in tags], open_keys=list(open_keys)
    )


def wanted(
    tags: Mapping[str, Iterable[str]] | None = None, producers: Mapping[str, Iterable[str]] | None = None
) -> pb.BlockFilter:
    return filter_to_proto(
        TraceFilter(
            {key: frozenset(values) for key, values in (tags or {}).items()},
            {key: frozenset(values) for key, values in (producers or {}).items()},
        )
    )


def publish_tagged(stub: TraceServiceStub, tags: Iterable[pb.TagSummary | None], **opening: Any) -> None:
    producer = Producer(stub, **opening)
    for sequence, summary_of_block in enumerate(tags, 1):
        producer.send(sequence, make_block(sequence), tags=summary_of_block)
    producer.close()


def offsets(stub: TraceServiceStub, **opening: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Offsets of the blocks that come, and (offset, skipped) of every message."""
    reader = Reader(stub, follow=False, **opening)
    messages = list(iter(reader.next_or_end, None))
    blocks = [message.offset for message in messages if message.HasField("block")]
    return blocks, [(message.offset, message.skipped) for message in messages]


def test_blocks_that_cannot_match_are_passed_over_in_order(stub: TraceServiceStub) -> None:
    mixed = summary(("subject", "maths"), ("subject", "law"))
    law = summary(("subject", "law"))
    publish_tagged(stub, [law, mixed, law, law, None, summary(), mixed, law])
    blocks, messages = offsets(stub, filter=wanted({"subject": ["maths"]}))
    assert blocks == [1, 4, 6]
    assert messages == [(1, 1), (4, 2), (6, 1), (8, 1)]
    assert offsets(stub, filter=wanted({"subject": ["law"]}))[0] == [0, 1, 2, 3, 4, 6, 7]
    assert offsets(stub, filter=wanted({"subject": ["law", "maths"]}))[0] == [0, 1, 2, 3, 4, 6, 7]
    assert offsets(stub, filter=wanted())[0] == list(range(8))
    assert offsets(stub)[1] == [(number, 0) for number in range(8)]


def test_a_key_with_many_values_matches_any_of_them(stub: TraceServiceStub) -> None:
    publish_tagged(stub, [summary(open_keys=["serial"]), summary(("subject", "law"))])
    assert offsets(stub, filter=wanted({"serial": ["7"]}))[0] == [0]


def test_every_condition_must_hold(stub: TraceServiceStub) -> None:
    publish_tagged(stub, [summary(("a", "1"), ("b", "1")), summary(("a", "1"), ("b", "2"))])
    assert offsets(stub, filter=wanted({"a": ["1"], "b": ["2"]}))[0] == [1]


def test_a_filter_by_labels_of_the_producer(stub: TraceServiceStub) -> None:
    publish_tagged(stub, [None] * 2, producer_id="a", labels={"role": "teacher", "step": "1"})
    publish_tagged(stub, [None] * 3, producer_id="b", labels={"role": "rollout"})
    publish_tagged(stub, [None], producer_id="c")
    assert offsets(stub, filter=wanted(producers={"role": ["teacher"]}))[0] == [0, 1]
    assert offsets(stub, filter=wanted(producers={"role": ["teacher", "rollout"]}))[0] == [0, 1, 2, 3, 4]
    assert offsets(stub, filter=wanted(producers={"role": ["rollout"], "step": ["1"]}))[0] == []


def test_a_follower_hears_of_blocks_that_it_does_not_want(stub: TraceServiceStub) -> None:
    reader = Reader(stub, filter=wanted({"subject": ["maths"]}))
    publish_tagged(stub, [summary(("subject", "law"))], producer_id="a")
    passed = reader.next()
    assert not passed.HasField("block")
    assert (passed.offset, passed.skipped, passed.next_offset) == (1, 1, 1)
    publish_tagged(stub, [summary(("subject", "maths"))], producer_id="b")
    found = reader.next()
    assert (found.offset, found.skipped) == (1, 0)
    stub.SealStream(trace_service_pb2.SealStreamRequest(name="s"))
    assert reader.next_or_end() is None


def test_blocks_that_are_passed_over_cost_no_credit(stub: TraceServiceStub) -> None:
    publish_tagged(stub, [*[summary(("a", "0"))] * 1500, summary(("a", "1")), summary(("a", "1"))])
    reader = Reader(stub, filter=wanted({"a": ["1"]}), credit_bytes=1)
    skipped = 0
    while not (message := reader.next()).HasField("block"):
        skipped += message.skipped
        assert message.offset == skipped
    assert (skipped + message.skipped, message.offset) == (1500, 1500)
    assert reader.is_quiet()
    reader.grant(2 * len(make_block(0)))
    assert reader.next().offset == 1501
    reader.cancel()


def test_a_cursor_in_a_block_says_what_is_used(stub: TraceServiceStub) -> None:
    publish(stub, range(4))
    messages = Reader(stub, follow=False, cursor=pb.Cursor(offset=1, trace_index=1))
    assert [(one.offset, one.used_traces) for one in iter(messages.next_or_end, None)] == [
        (1, 1),
        (2, 0),
        (3, 0),
    ]
    assert offsets(stub, cursor=pb.Cursor(offset=4))[0] == []


def test_a_consumers_cursor_is_where_it_goes_on(stub: TraceServiceStub) -> None:
    publish(stub, range(4))
    with_nothing = Reader(stub, consumer="c").error()
    assert (code(with_nothing), error_name(with_nothing)) == ("NOT_FOUND", "ConsumerNotFoundError")
    cursor = pb.Cursor(offset=2, trace_index=1)
    stub.CommitCursor(pb.CommitCursorRequest(stream="s", consumer="c", cursor=cursor))
    reader = Reader(stub, follow=False, consumer="c")
    assert [(one.offset, one.used_traces) for one in iter(reader.next_or_end, None)] == [(2, 1), (3, 0)]


@pytest.mark.parametrize("cursor", [(4, 1), (5, 0), (2**64 - 1, 0)])
def test_a_cursor_beyond_the_stream_is_refused(stub: TraceServiceStub, cursor: tuple[int, int]) -> None:
    publish(stub, range(4))
    error = Reader(stub, cursor=pb.Cursor(offset=cursor[0], trace_index=cursor[1])).error()
    assert (code(error), error_name(error)) == ("OUT_OF_RANGE", "OffsetNotFoundError")


def test_a_filter_that_cannot_be_is_refused(stub: TraceServiceStub) -> None:
    nothing = pb.BlockFilter(tags=[pb.LabelCondition(key="a")])
    twice = pb.BlockFilter(tags=[pb.LabelCondition(key="a", values=["1"])] * 2)
    many = pb.BlockFilter(tags=[pb.LabelCondition(key=f"k{n}", values=["1"]) for n in range(65)])
    for blocks, problem in ((nothing, "allows no value"), (twice, "two conditions"), (many, "65 conditions")):
        error = Reader(stub, filter=blocks).error()
        assert code(error) == "INVALID_ARGUMENT"
        assert problem in details(error)


@pytest.mark.parametrize(
    ("opening", "tags", "problem"),
    [
        ({"labels": {f"k{n}": "v" for n in range(65)}}, None, "65 producer labels"),
        ({"labels": {"Not a name": "v"}}, None, "producer label"),
        ({}, summary(*(("k", str(n)) for n in range(257))), "257 tags"),
        ({}, summary(open_keys=[str(n) for n in range(65)]), "65 open keys"),
        ({"labels": {"k": "v" * 20_000}}, None, "labels of a block take"),
    ],
)
def test_labels_that_are_too_many_are_refused(
    stub: TraceServiceStub, opening: dict[str, Any], tags: pb.TagSummary | None, problem: str
) -> None:
    def publish_one() -> None:
        producer = Producer(stub, **opening)
        producer.send(1, make_block(1), tags=tags)
        producer.close()

    with pytest.raises(grpc.RpcError) as caught:
        publish_one()
    assert code(caught.value) == "INVALID_ARGUMENT"
    assert problem in details(caught.value)


_names = st.sampled_from(["a", "b", "c", "d"])
_values = st.sampled_from([str(number) for number in range(40)] + ["x" * 100, "y" * 100])
_tags = st.dictionaries(_names, _values)
_filters = st.builds(
    TraceFilter,
    tags=st.dictionaries(_names, st.frozensets(_values, min_size=1, max_size=4)),
    producer_labels=st.dictionaries(_names, st.frozensets(_values, min_size=1, max_size=4)),
)


@settings(deadline=None)
@given(st.lists(_tags, max_size=60), _tags, _filters)
def test_no_block_that_holds_a_wanted_trace_is_passed_over(
    traces: list[dict[str, str]], producer: dict[str, str], trace_filter: TraceFilter
) -> None:
    kept = labels_from_bytes(labels_to_bytes(BlockLabels(producer, summarise_tags(traces))))
    sent = filter_from_proto(filter_to_proto(trace_filter))
    producer_matches = all(producer.get(key) in found for key, found in trace_filter.producer_labels.items())
    if producer_matches and any(trace_filter.matches(tags) for tags in traces):
        assert sent.may_match(kept)
    if not producer_matches:
        assert not sent.may_match(kept)
