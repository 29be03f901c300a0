"""Catalogs that earlier versions of lynearm left: opened, brought up to date, and used."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from traces.harness import Producer, Reader, RunningServer, StartServer, create, fetch, make_block
from traces.jobs import add, announce, finish, lease, units_of
from traces.storages import on_local_disk

from lynearm.traces.schema import SCHEMA_VERSION
from lynearm.v1 import consumer_pb2, prompt_queue_pb2
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import ConfigError

pytestmark = on_local_disk  # where catalogs of the earlier versions are

OLD_CATALOGS = tuple(Path(__file__).parent / "data" / f"catalog_v{version}.sql" for version in (1, 2, 3, 4))
"""Stream "old" with two blocks of producer "teacher", each of which finishes a prompt; stream "sealed". From
version 2 on, "old" has a dictionary; from version 3 on, consumer "trainer" has read its first block."""

ALTERED = ("blocks", "streams", "objects", "jobs")
"""Tables that some step has added columns to."""

OLD_OBJECT = "da4e69c21cb5dd56e03b545a9f730a9d"
OLD_BLOCKS = (
    bytes.fromhex("0a1508011001180220032805301039ba92265d172e036012100100000001000000" + "01000000" * 2),
    bytes.fromhex("0a15080110011802200328053010391f8cd548bfb7f5fe12100200000002000000" + "02000000" * 2),
)


@pytest.fixture(params=OLD_CATALOGS, ids=lambda path: path.stem)
def old_data_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What a server of an earlier schema version left."""
    data_dir = tmp_path / "old"
    object_file = data_dir / "blocks" / OLD_OBJECT[:2] / OLD_OBJECT
    object_file.parent.mkdir(parents=True)
    object_file.write_bytes(b"".join(OLD_BLOCKS))
    with closing(sqlite3.connect(data_dir / "catalog.sqlite3")) as catalog:
        catalog.executescript(request.param.read_text())
    return data_dir


@pytest.fixture
def migrated(old_data_dir: Path, start_server: StartServer) -> RunningServer:
    """A server on that data, stopped and started again once it had opened it."""
    start_server(data_dir=old_data_dir).stop()
    return start_server(data_dir=old_data_dir)


def structure(data_dir: Path) -> dict[str, object]:
    """Every table and index as it was made, but those that were altered: of them, their columns."""
    with closing(sqlite3.connect(data_dir / "catalog.sqlite3")) as catalog:
        made: dict[str, object] = dict(catalog.execute("SELECT name, trim(sql) FROM sqlite_master"))
        columns = {name: catalog.execute(f"PRAGMA table_info({name})").fetchall() for name in ALTERED}
        return made | columns


def test_an_old_catalog_keeps_its_streams_and_blocks(migrated: RunningServer) -> None:
    streams = migrated.stub.ListStreams(pb.ListStreamsRequest()).streams
    assert [(stream.spec.name, stream.state) for stream in streams] == [
        ("old", pb.STREAM_STATE_OPEN),
        ("sealed", pb.STREAM_STATE_SEALED),
    ]
    assert (streams[0].next_offset, streams[0].size_bytes, streams[0].finished_prompt_count) == (2, 82, 2)
    assert (streams[0].first_offset, streams[0].retained_bytes) == (0, 82)
    assert list(fetch(migrated.stub, 0, 9, "old")) == list(enumerate(OLD_BLOCKS))


def test_an_old_stream_takes_dictionaries_and_more_blocks(migrated: RunningServer) -> None:
    stub = migrated.stub
    before = stub.GetStream(pb.GetStreamRequest(name="old")).stream
    digest = stub.PutDictionary(pb.PutDictionaryRequest(stream="old", dictionary=b"learned")).digest
    producer = Producer(stub, "old", "teacher", epoch=1)
    assert producer.next_sequence == 3
    producer.send(3, make_block(3), ["p2"])
    assert producer.close() == {3: 2}
    stream = stub.GetStream(pb.GetStreamRequest(name="old")).stream
    assert stream.next_offset == 3
    assert stream.dictionary_count == before.dictionary_count + 1
    assert stream.dictionary_bytes == before.dictionary_bytes + 7
    found = stub.GetDictionary(pb.GetDictionaryRequest(stream="old", digest=digest)).dictionary
    assert found == b"learned"


# From version 4 on, their age is known.
@pytest.mark.parametrize("old_data_dir", OLD_CATALOGS[:3], indirect=True, ids=lambda path: path.stem)
def test_blocks_of_unknown_age_are_kept_as_if_they_were_new(migrated: RunningServer) -> None:
    stub = migrated.stub
    retention = pb.Retention(max_age_seconds=3600)
    stub.UpdateRetention(pb.UpdateRetentionRequest(name="old", retention=retention))
    assert stub.CollectGarbage(pb.CollectGarbageRequest()).expired_blocks == 0
    assert list(fetch(stub, 0, 9, "old")) == list(enumerate(OLD_BLOCKS))


def test_an_old_stream_takes_jobs_and_consumers(migrated: RunningServer) -> None:
    stub = migrated.stub
    prompts = [prompt_queue_pb2.JobPrompt(prompt_id=f"p{number}") for number in range(4)]
    announce(stub, prompts, stream="old")
    add(stub, prompts, stream="old")
    leased = lease(stub, 9, stream="old").lease
    assert units_of(leased) == [("p2", 0), ("p3", 0)]  # the old blocks have finished the others
    producer = Producer(stub, "old", "teacher")
    producer.send(1, make_block(3), finished_work=[finish(leased.key, units_of(leased))])
    assert producer.close() == {1: 2}
    request = consumer_pb2.CommitCursorRequest(
        stream="old", consumer="c", cursor=consumer_pb2.Cursor(offset=1)
    )
    assert stub.CommitCursor(request).consumer.lag_blocks == 2
    condition = consumer_pb2.LabelCondition(key="subject", values=["law"])
    reader = Reader(
        stub, "old", follow=False, consumer="c", filter=consumer_pb2.BlockFilter(tags=[condition])
    )
    assert len(reader.rest()) == 2  # of old blocks nothing is known: they pass


def test_a_catalog_brought_up_to_date_is_built_like_a_new_one(
    migrated: RunningServer, start_server: StartServer
) -> None:
    fresh = start_server()
    create(fresh.stub)
    for server in (migrated, fresh):
        server.stop()
    assert structure(migrated.config.data_dir) == structure(fresh.config.data_dir)


def test_a_catalog_of_a_later_version_is_refused_and_left_alone(
    server: RunningServer, start_server: StartServer
) -> None:
    server.stop()
    path = server.config.data_dir / "catalog.sqlite3"
    with closing(sqlite3.connect(path)) as catalog, catalog:
        catalog.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(ConfigError, match=f"schema version 99, expected {SCHEMA_VERSION}"):
        start_server()
    with closing(sqlite3.connect(path)) as catalog:
        assert catalog.execute("SELECT version FROM schema_version").fetchall() == [(99,)]
