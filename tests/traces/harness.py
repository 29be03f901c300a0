"""Blocks, specs, a server, and calls as generated code makes them, for the tests of the trace service."""

from __future__ import annotations

import asyncio
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc

from lynearm.traces.config import ServeConfig
from lynearm.traces.server import TraceServer
from lynearm.v1 import trace_pb2, trace_service_pb2_grpc
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.blocks import BlockHeader, checksum, join_block
from lynearm.wire.errors import ERROR_NAME_METADATA_KEY, REMEDY_METADATA_KEY
from lynearm.wire.protobuf import spec_to_proto
from lynearm.wire.specs import CodecMode, CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec

T = TypeVar("T")


def make_spec(
    name: str = "s", license: str = "Apache-2.0", labels: dict[str, str] | None = None
) -> StreamSpec:
    return StreamSpec(
        name=name,
        teacher=TeacherSpec("teacher", "sha256:00", "test", "float32", 128, 512),
        tokenizer=TokenizerSpec("tok", bytes(32), b"", 128, (2,)),
        codec=CodecSpec("exact", 4),
        license=license,
        labels=labels or {},
    )


def make_block(number: int, size_bytes: int = 2000, codec_mode: CodecMode = "exact") -> bytes:
    payload = number.to_bytes(4, "little") * (size_bytes // 4)
    header = BlockHeader(2, codec_mode, 2, 3, 5, size_bytes, checksum(payload))
    return join_block(header, payload)


class LoopThread:
    """The one event loop of these tests: gRPC's aio does not survive a second one in the same process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class RunningServer:
    """A `TraceServer` of this process. Its context lives in one task, as it must."""

    def __init__(self, loop: LoopThread, config: ServeConfig) -> None:
        self._loop = loop
        self.config = config
        self._stop: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._channel: grpc.Channel | None = None
        self.server = self._start()

    @property
    def stub(self) -> trace_service_pb2_grpc.TraceServiceStub:
        return trace_service_pb2_grpc.TraceServiceStub(self.channel)

    @property
    def channel(self) -> grpc.Channel:
        if self._channel is None:
            self._channel = grpc.insecure_channel(self.server.address)
        return self._channel

    def _start(self) -> TraceServer:
        async def serve(ready: asyncio.Future[TraceServer], stop: asyncio.Event) -> None:
            try:
                async with TraceServer(self.config) as server:
                    ready.set_result(server)
                    await stop.wait()
            except BaseException as error:
                if ready.done():
                    raise
                ready.set_exception(error)

        async def begin() -> TraceServer:
            ready: asyncio.Future[TraceServer] = asyncio.get_running_loop().create_future()
            self._stop = asyncio.Event()
            self._task = asyncio.create_task(serve(ready, self._stop))
            return await ready

        return self._loop.run(begin())

    def stop(self) -> None:
        task, stop = self._task, self._stop
        self._task = None
        if task is None or stop is None:
            return

        async def end() -> None:
            stop.set()
            await task

        self._loop.run(end())

    def close(self) -> None:
        self.stop()
        if self._channel is not None:
            self._channel.close()


StartServer = Callable[..., RunningServer]
"""Starts a server that is stopped after the test; takes what `ServeConfig` takes."""


class ServerProcess:
    """A server in a process of its own, to be killed or starved."""

    def __init__(self, data_dir: Path, *, file_size_limit: int = 0, **config: Any) -> None:
        code = (
            "import json, resource, sys\n"
            "from pathlib import Path\n"
            "from lynearm.traces.config import ServeConfig\n"
            "from lynearm.traces.server import run_server\n"
            "limit = int(sys.argv[2])\n"
            "if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
            "config = ServeConfig(data_dir=Path(sys.argv[1]), **json.loads(sys.argv[3]))\n"
            "run_server(config, lambda address: print(address, flush=True))\n"
        )
        settings = json.dumps({"port": 0, **config})
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(data_dir), str(file_size_limit), settings],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        self.channel = grpc.insecure_channel(self.address)
        self.stub = trace_service_pb2_grpc.TraceServiceStub(self.channel)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


def to_publish(
    sequence: int, block: bytes, finished_prompt_ids: Sequence[str] = (), **more: Any
) -> pb.PublishBlock:
    """A block as a producer sends it."""
    parsed = trace_pb2.Block.FromString(block)
    return pb.PublishBlock(sequence=sequence, block=parsed, finished_prompt_ids=finished_prompt_ids, **more)


class Producer:
    """A Publish call, one message at a time."""

    def __init__(
        self,
        stub: trace_service_pb2_grpc.TraceServiceStub,
        stream: str = "s",
        producer_id: str = "p",
        epoch: int = 0,
        **more: Any,
    ) -> None:
        self._requests: queue.SimpleQueue[pb.PublishRequest | None] = queue.SimpleQueue()
        self._call = stub.Publish(iter(self._requests.get, None))
        opening = pb.PublishOpen(stream=stream, producer_id=producer_id, epoch=epoch, **more)
        self._requests.put(pb.PublishRequest(open=opening))
        opened = next(self._call).opened
        self.epoch, self.next_sequence = opened.epoch, opened.next_sequence

    def send(self, sequence: int, block: bytes, finished_prompt_ids: Sequence[str] = (), **more: Any) -> None:
        self.send_together([to_publish(sequence, block, finished_prompt_ids, **more)])

    def send_together(self, blocks: Sequence[pb.PublishBlock]) -> None:
        """In one message."""
        self._requests.put(pb.PublishRequest(blocks=blocks))

    def acks(self, count: int) -> dict[int, int]:
        """The next acknowledgements, `count` or more of them: offset by sequence number."""
        found: dict[int, int] = {}
        while len(found) < count:
            ack = next(self._call).ack
            found.update(enumerate(ack.offsets, ack.first_sequence))
        return found

    def next(self) -> pb.PublishResponse:
        """The next message, whatever it is."""
        return next(self._call)

    def error(self) -> grpc.RpcError:
        """What the call ends with, after any acknowledgements."""
        return self.fail()[1]

    def fail(self) -> tuple[dict[int, int], grpc.RpcError]:
        """The acknowledgements that were left, and what the call ends with."""
        found: dict[int, int] = {}
        try:
            for response in self._call:
                found.update(enumerate(response.ack.offsets, response.ack.first_sequence))
        except grpc.RpcError as error:
            return found, error
        raise AssertionError("the call ended well")

    def close(self) -> dict[int, int]:
        """End the call; the acknowledgements that were left."""
        self._requests.put(None)
        found: dict[int, int] = {}
        for response in self._call:
            found.update(enumerate(response.ack.offsets, response.ack.first_sequence))
        return found

    def cancel(self) -> None:
        self._requests.put(None)
        self._call.cancel()


class Reader:
    """A Subscribe call."""

    def __init__(
        self, stub: trace_service_pb2_grpc.TraceServiceStub, stream: str = "s", **opening: Any
    ) -> None:
        opening = {"credit_bytes": 1 << 30, "follow": True, **opening}
        self._requests: queue.SimpleQueue[pb.SubscribeRequest | None] = queue.SimpleQueue()
        self._requests.put(pb.SubscribeRequest(open=pb.SubscribeOpen(stream=stream, **opening)))
        self._call = stub.Subscribe(iter(self._requests.get, None))
        self.received: queue.SimpleQueue[pb.SubscribeResponse | grpc.RpcError | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def grant(self, credit_bytes: int) -> None:
        self._requests.put(pb.SubscribeRequest(credit_bytes=credit_bytes))

    def half_close(self) -> None:
        self._requests.put(None)

    def next(self, timeout_seconds: float = 30) -> pb.SubscribeResponse:
        item = self.received.get(timeout=timeout_seconds)
        assert isinstance(item, pb.SubscribeResponse), item
        return item

    def is_quiet(self, seconds: float = 0.3) -> bool:
        """Whether nothing comes."""
        try:
            item = self.received.get(timeout=seconds)
        except queue.Empty:
            return True
        self.received.put(item)
        return False

    def rest(self) -> list[bytes]:
        """All blocks until the call ends well."""
        return [item.block.SerializeToString() for item in iter(self.next_or_end, None)]

    def next_or_end(self) -> pb.SubscribeResponse | None:
        item = self.received.get(timeout=30)
        if isinstance(item, grpc.RpcError):
            raise item
        return item

    def error(self) -> grpc.RpcError:
        while not isinstance(item := self.received.get(timeout=30), grpc.RpcError):
            assert item is not None, "the call ended well"
        return item

    def cancel(self) -> None:
        self._requests.put(None)
        self._call.cancel()
        self._thread.join(10)

    def _receive(self) -> None:
        try:
            for response in self._call:
                self.received.put(response)
        except grpc.RpcError as error:
            self.received.put(error)
        else:
            self.received.put(None)


def create(stub: trace_service_pb2_grpc.TraceServiceStub, name: str = "s") -> None:
    stub.CreateStream(pb.CreateStreamRequest(spec=spec_to_proto(make_spec(name))))


def publish(
    stub: trace_service_pb2_grpc.TraceServiceStub,
    numbers: Sequence[int],
    *,
    stream: str = "s",
    producer_id: str = "p",
    size_bytes: int = 2000,
) -> dict[int, int]:
    """Publish `make_block` of each number as a new epoch; offset by sequence number."""
    producer = Producer(stub, stream, producer_id)
    for sequence, number in enumerate(numbers, 1):
        producer.send(sequence, make_block(number, size_bytes))
    return producer.close()


def error_name(error: grpc.RpcError) -> str:
    """The class that the server raised, as it says."""
    return str(_trailing_metadata(error)[ERROR_NAME_METADATA_KEY])


def remedy(error: grpc.RpcError) -> str:
    value = _trailing_metadata(error)[REMEDY_METADATA_KEY]
    assert isinstance(value, bytes)
    return value.decode()


def code(error: grpc.RpcError) -> str:
    return cast("grpc.Call", error).code().name


def details(error: grpc.RpcError) -> str:
    return cast("grpc.Call", error).details() or ""


def _trailing_metadata(error: grpc.RpcError) -> dict[str, str | bytes]:
    metadata: Any = cast("grpc.Call", error).trailing_metadata()
    return dict(metadata or ())


def fetch(
    stub: trace_service_pb2_grpc.TraceServiceStub, offset: int, count: int, stream: str = "s"
) -> Iterator[tuple[int, bytes]]:
    for response in stub.FetchBlocks(pb.FetchBlocksRequest(stream=stream, offset=offset, count=count)):
        yield response.offset, response.block.SerializeToString()
