"""Blocks in S3: what is refused, what is said when something is wrong, and what is never said."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import pytest
from traces.clusters import SECRET_KEY, Cluster
from traces.harness import (
    LoopThread,
    Producer,
    StartServer,
    code,
    create,
    error_name,
    fetch,
    make_block,
    publish,
)
from traces.storages import on_cluster

from lynearm.traces.config import ServeConfig
from lynearm.traces.object_store import MERGE_BYTES, ObjectBlockStore, merge_spans
from lynearm.traces.store import Span
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import (
    ConfigError,
    LynearmError,
    StorageError,
    StorageFullError,
    StoreUnavailableError,
)


class FaultyStore(BaseHTTPRequestHandler):
    """Passes requests on to the S3 server, unless told otherwise."""

    endpoint: ClassVar[str]
    forgetful: ClassVar[bool] = False
    """Drops the condition that a request has, as some stores do."""
    down: ClassVar[bool] = False
    lost_answers: ClassVar[int] = 0
    """Writes that are done, and whose answer never comes."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.down:
            self.send_error(503)
            return
        dropped = ("if-none-match",) if self.forgetful else ()
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        # Else urllib says that it is a form, and the server takes it apart as one.
        headers.setdefault("Content-Type", "application/octet-stream")
        request = Request(self.endpoint + self.path, body or None, headers, method=self.command)
        try:
            response = urlopen(request)
        except HTTPError as error:
            response = error
        with response:
            content = response.read()
            if self.command == "PUT" and self.lost_answers:
                type(self).lost_answers -= 1
                self.send_error(503)
                return
            self.send_response(response.status)
            for name, value in response.headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_PUT = do_DELETE = do_POST = answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Generator[str]:
    """The address of a server of its own."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def faulty(cluster: Cluster) -> Iterator[tuple[type[FaultyStore], str]]:
    """A store that can be told to fail, and its address."""

    class Store(FaultyStore):
        endpoint = cluster.endpoint

    with serving(Store) as address:
        yield Store, address


@pytest.fixture
def forgetful(faulty: tuple[type[FaultyStore], str]) -> str:
    """The address of a store that ignores If-None-Match."""
    faulty[0].forgetful = True
    return faulty[1]


@on_cluster
def test_a_store_that_ignores_create_only_writes_is_refused_for_several_servers(
    storage: dict[str, str], forgetful: str, start_server: StartServer
) -> None:
    with pytest.raises(ConfigError, match=r"ignores create-only writes.*one server with a catalog in SQLite"):
        start_server(blocks=f"{storage['blocks']}?endpoint={forgetful}")


@on_cluster
def test_a_store_that_ignores_create_only_writes_does_for_one_server(
    storage: dict[str, str], forgetful: str, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    stub = start_server(catalog="", blocks=f"{storage['blocks']}?endpoint={forgetful}").stub
    assert "keep to one server" in caplog.text
    create(stub)
    publish(stub, range(3))
    assert list(fetch(stub, 0, 9)) == [(number, make_block(number)) for number in range(3)]


@on_cluster
def test_a_store_that_goes_away_and_comes_back_costs_nothing_that_was_acknowledged(
    storage: dict[str, str],
    faulty: tuple[type[FaultyStore], str],
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lynearm.traces.object_location._RETRIES", 1)
    store, address = faulty
    stub = start_server(blocks=f"{storage['blocks']}?endpoint={address}", cache_bytes=0).stub
    create(stub)
    producer = Producer(stub)
    producer.send(1, make_block(1))
    assert producer.acks(1) == {1: 0}
    store.down = True
    producer.send(2, make_block(2))
    with pytest.raises(grpc.RpcError) as caught:
        list(fetch(stub, 0, 1))
    for error in (producer.error(), caught.value):
        assert (code(error), error_name(error)) == ("UNAVAILABLE", "StoreUnavailableError")
    store.down = False
    again = Producer(stub, epoch=producer.epoch)
    assert again.next_sequence == 2
    again.send(2, make_block(2))
    assert again.close() == {2: 1}
    assert list(fetch(stub, 0, 9)) == [(0, make_block(1)), (1, make_block(2))]


@on_cluster
def test_a_write_whose_answer_is_lost_is_done_again_under_another_key(
    storage: dict[str, str], faulty: tuple[type[FaultyStore], str], start_server: StartServer
) -> None:
    store, address = faulty
    blocks = f"{storage['blocks']}?endpoint={address}"
    server = start_server(blocks=blocks, orphan_seconds=0, collect_seconds=0)
    create(server.stub)
    store.lost_answers = 1
    assert publish(server.stub, [1]) == {1: 0}
    assert store.lost_answers == 0
    collected = server.stub.CollectGarbage(pb.CollectGarbageRequest())
    assert collected.orphan_objects == 1
    assert list(fetch(server.stub, 0, 9)) == [(0, make_block(1))]


@on_cluster
def test_the_probe_leaves_nothing_behind(storage: dict[str, str], loop: LoopThread) -> None:
    async def run() -> list[str]:
        store = await ObjectBlockStore.open(storage["blocks"], several_writers=True)
        # Any: obstore's own store, to see what is no object too.
        return [one["path"] async for batch in store._store.list() for one in batch]  # pyright: ignore

    assert loop.run(run()) == []


def test_a_bucket_that_is_missing_is_named(cluster: Cluster, loop: LoopThread) -> None:
    with pytest.raises(StorageError, match=r"s3://nowhere/blocks.*create the bucket"):
        loop.run(ObjectBlockStore.open("s3://nowhere/blocks", several_writers=False))


def test_a_store_that_does_not_answer_is_named(
    cluster: Cluster, loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lynearm.traces.object_location._RETRIES", 1)
    url = "s3://blocks/x?endpoint=http://127.0.0.1:9"
    with pytest.raises(StoreUnavailableError, match="block store s3://blocks/x: "):
        loop.run(ObjectBlockStore.open(url, several_writers=False))


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (507, "", StorageFullError),
        (400, "<Error><Code>XMinioStorageFull</Code></Error>", StorageFullError),
        (403, "<Error><Code>AccessDenied</Code></Error>", StorageError),
        (400, "<Error><Code>Nonsense507</Code></Error>", StoreUnavailableError),
    ],
)
def test_what_a_store_answers_is_told_apart(
    cluster: Cluster,
    loop: LoopThread,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: str,
    expected: type,
) -> None:
    class Refusal(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    monkeypatch.setattr("lynearm.traces.object_location._RETRIES", 0)
    with (
        serving(Refusal) as endpoint,
        pytest.raises(LynearmError, match="block store s3://blocks/507: ") as caught,
    ):
        loop.run(ObjectBlockStore.open(f"s3://blocks/507?endpoint={endpoint}", several_writers=False))
    assert type(caught.value) is expected


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:staple-correct-horse@blocks/x",
        "s3://blocks/x?secret_access_key=staple-correct-horse",
        "s3:///x",
    ],
)
def test_a_url_that_is_wrong_or_holds_a_secret_is_refused_without_repeating_it(
    url: str, loop: LoopThread
) -> None:
    with pytest.raises(ConfigError) as caught:
        loop.run(ObjectBlockStore.open(url, several_writers=False))
    assert SECRET_KEY not in str(caught.value)


@on_cluster
def test_no_secret_is_logged_or_shown(
    storage: dict[str, str], start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server = start_server()
    create(server.stub)
    publish(server.stub, range(3))
    server.stop()
    shown = caplog.text + repr(server.config)
    assert SECRET_KEY not in shown
    assert "correct-horse-battery" not in shown


@pytest.mark.parametrize("blocks", ["ftp://host/x", "http://host/x"])
def test_a_scheme_that_is_no_store_is_named(blocks: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected s3://"):
        ServeConfig(tmp_path, blocks=blocks)


def test_spans_that_are_close_are_read_at_once() -> None:
    far = 10 + MERGE_BYTES + 1
    spans = [Span(0, 4), Span(4, 2), Span(8, 2), Span(far, 5)]
    assert list(merge_spans(spans)) == [Span(0, 10), Span(far, 5)]
    assert list(merge_spans([])) == []


@on_cluster
def test_spans_come_back_as_they_were_asked_for(storage: dict[str, str], loop: LoopThread) -> None:
    async def run() -> None:
        store = await ObjectBlockStore.open(storage["blocks"], several_writers=True)
        blocks = [bytes([number]) * (MERGE_BYTES if number % 2 else 10) for number in range(6)]
        stored = await store.write(blocks)
        assert await store.read(stored.key, stored.spans) == blocks
        assert await store.read(stored.key, stored.spans[::5]) == blocks[::5]
        last = stored.spans[-1]
        end = last.position + last.length
        beyond = [Span(end - 3, 8), Span(end + 5, 4)]
        assert await store.read(stored.key, beyond) == [blocks[-1][-3:], b""]
        await store.delete(stored.key)
        await store.delete(stored.key)
        with pytest.raises(LynearmError, match="restore the object from a copy"):
            await store.read(stored.key, stored.spans)

    loop.run(run())
