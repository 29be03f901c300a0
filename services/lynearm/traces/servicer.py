"""The methods of `lynearm.v1.TraceService`, each bound to what serves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from lynearm.traces.attachments import attachment_to_proto, check_attachment
from lynearm.traces.backend import Backend
from lynearm.traces.calls import CallGate, Context
from lynearm.traces.consumer_calls import ConsumerCalls, read_max_lag
from lynearm.traces.current_call import may_consume
from lynearm.traces.dictionaries import check_digest, name_dictionary
from lynearm.traces.publish import PublishCall
from lynearm.traces.queue_calls import QueueCalls
from lynearm.traces.subscribe import SubscribeCall, fetch_blocks
from lynearm.v1 import consumer_pb2, prompt_queue_pb2
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import InvalidInputError, StreamLimitError
from lynearm.wire.protobuf import retention_from_proto, spec_from_proto, stream_to_proto
from lynearm.wire.specs import check_name

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TraceService"].full_name

MAX_SPEC_BYTES = 16 << 10
"""Of an encoded stream spec. Hundreds of bytes are usual; ListStreams answers with all of them at once."""

PROMPT_IDS_PER_MESSAGE = 10_000
"""At 256 bytes each, well below the 4 MiB of a message."""


class TraceServicer:
    """Answers calls from a backend.

    Args:
        backend: What the calls work on.
        max_streams: Streams that the catalog may hold.
    """

    def __init__(self, backend: Backend, *, max_streams: int) -> None:
        self._backend = backend
        self._max_streams = max_streams
        self.queue = QueueCalls(backend)
        self.consumers = ConsumerCalls(backend)

    async def create_stream(self, request: pb.CreateStreamRequest, _: Context) -> pb.CreateStreamResponse:
        """CreateStream."""
        if request.spec.ByteSize() > MAX_SPEC_BYTES:
            raise InvalidInputError(
                f"stream spec of {request.spec.ByteSize()} bytes, expected at most {MAX_SPEC_BYTES}",
                "put less into the labels",
            )
        spec = spec_from_proto(request.spec)
        await self._check_room(spec.name)
        record = await self._backend.catalog.create_stream(
            spec, allow_existing=request.allow_existing, max_lag=read_max_lag(request.max_lag)
        )
        return pb.CreateStreamResponse(stream=stream_to_proto(record.info))

    async def _check_room(self, name: str) -> None:
        # Streams that are made at the same moment may exceed the bound by their number: it guards memory.
        count = await self._backend.catalog.count_streams(besides=name)
        if count >= self._max_streams:
            raise StreamLimitError(
                f"the trace service holds {count} streams, and may hold {self._max_streams}",
                "delete some, or raise its max_streams",
            )

    async def get_stream(self, request: pb.GetStreamRequest, _: Context) -> pb.GetStreamResponse:
        """GetStream."""
        record = await self._backend.catalog.get_stream(request.name)
        return pb.GetStreamResponse(stream=stream_to_proto(record.info))

    async def list_streams(self, _: pb.ListStreamsRequest, __: Context) -> pb.ListStreamsResponse:
        """ListStreams."""
        records = await self._backend.catalog.list_streams()
        streams = [stream_to_proto(record.info) for record in records if may_consume(record.name)]
        return pb.ListStreamsResponse(streams=streams)

    async def delete_stream(self, request: pb.DeleteStreamRequest, _: Context) -> pb.DeleteStreamResponse:
        """DeleteStream."""
        await self._backend.delete_stream(request.name)
        return pb.DeleteStreamResponse()

    async def seal_stream(self, request: pb.SealStreamRequest, _: Context) -> pb.SealStreamResponse:
        """SealStream."""
        record = await self._backend.seal_stream(request.name)
        return pb.SealStreamResponse(stream=stream_to_proto(record.info))

    async def update_retention(
        self, request: pb.UpdateRetentionRequest, _: Context
    ) -> pb.UpdateRetentionResponse:
        """UpdateRetention."""
        retention = retention_from_proto(request.retention)
        record = await self._backend.catalog.set_retention(request.name, retention)
        return pb.UpdateRetentionResponse(stream=stream_to_proto(record.info))

    async def collect_garbage(self, _: pb.CollectGarbageRequest, __: Context) -> pb.CollectGarbageResponse:
        """CollectGarbage."""
        collected = await self._backend.collector.collect()
        return pb.CollectGarbageResponse(
            expired_blocks=collected.expired_blocks,
            expired_bytes=collected.expired_bytes,
            orphan_objects=collected.orphan_objects,
        )

    async def publish(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Publish; requests are bytes."""
        await PublishCall(self._backend, context).run()

    async def subscribe(self, _: AsyncIterator[pb.SubscribeRequest], context: Context) -> None:
        """Subscribe; responses are bytes."""
        await SubscribeCall(self._backend, context).run()

    async def fetch_blocks(self, request: pb.FetchBlocksRequest, context: Context) -> None:
        """FetchBlocks; responses are bytes."""
        await fetch_blocks(self._backend, request, context)

    async def list_finished_prompts(self, request: pb.ListFinishedPromptsRequest, context: Context) -> None:
        """ListFinishedPrompts."""
        catalog = self._backend.catalog
        stream_id = (await catalog.get_stream(request.stream)).stream_id
        position = 0
        while page := await catalog.list_finished_prompts(stream_id, position, PROMPT_IDS_PER_MESSAGE):
            prompt_ids = [prompt.prompt_id for prompt in page]
            await context.write(pb.ListFinishedPromptsResponse(prompt_ids=prompt_ids))
            position = page[-1].position

    async def put_dictionary(self, request: pb.PutDictionaryRequest, _: Context) -> pb.PutDictionaryResponse:
        """PutDictionary."""
        self._backend.space.check(len(request.dictionary))
        digest = await asyncio.to_thread(name_dictionary, request.dictionary)
        await self._backend.catalog.put_dictionary(request.stream, digest, request.dictionary)
        return pb.PutDictionaryResponse(digest=digest)

    async def get_dictionary(self, request: pb.GetDictionaryRequest, _: Context) -> pb.GetDictionaryResponse:
        """GetDictionary."""
        digest = check_digest(request.digest)
        content = await self._backend.catalog.get_dictionary(request.stream, digest)
        return pb.GetDictionaryResponse(dictionary=content)

    async def put_attachment(self, request: pb.PutAttachmentRequest, _: Context) -> pb.PutAttachmentResponse:
        """PutAttachment."""
        check_attachment(request.name, request.content)
        self._backend.space.check(len(request.content))
        await self._backend.catalog.put_attachment(request.stream, request.name, request.content)
        return pb.PutAttachmentResponse()

    async def get_attachment(self, request: pb.GetAttachmentRequest, _: Context) -> pb.GetAttachmentResponse:
        """GetAttachment."""
        name = check_name(request.name, what="attachment")
        return pb.GetAttachmentResponse(
            content=await self._backend.catalog.get_attachment(request.stream, name)
        )

    async def list_attachments(
        self, request: pb.ListAttachmentsRequest, _: Context
    ) -> pb.ListAttachmentsResponse:
        """ListAttachments."""
        found = await self._backend.catalog.list_attachments(request.stream)
        return pb.ListAttachmentsResponse(attachments=map(attachment_to_proto, found))


def service_handler(servicer: TraceServicer, gate: CallGate) -> grpc.GenericRpcHandler:
    """What a server registers. Blocks pass through as bytes; everything else is parsed by generated code."""

    def unary(handler: Callable[..., Awaitable[Message]], request: type[Message]) -> Any:
        # Any, here and below: gRPC types a method handler by serialisers, which these lack or erase.
        return grpc.unary_unary_rpc_method_handler(gate.guard(handler), request.FromString, _serialize)

    handlers: dict[str, Any] = {
        "CreateStream": unary(servicer.create_stream, pb.CreateStreamRequest),
        "GetStream": unary(servicer.get_stream, pb.GetStreamRequest),
        "ListStreams": unary(servicer.list_streams, pb.ListStreamsRequest),
        "DeleteStream": unary(servicer.delete_stream, pb.DeleteStreamRequest),
        "SealStream": unary(servicer.seal_stream, pb.SealStreamRequest),
        "UpdateRetention": unary(servicer.update_retention, pb.UpdateRetentionRequest),
        "CollectGarbage": unary(servicer.collect_garbage, pb.CollectGarbageRequest),
        "Publish": grpc.stream_stream_rpc_method_handler(gate.guard(servicer.publish), None, _serialize),
        "Subscribe": grpc.stream_stream_rpc_method_handler(
            gate.guard(servicer.subscribe), pb.SubscribeRequest.FromString, None
        ),
        "FetchBlocks": grpc.unary_stream_rpc_method_handler(
            gate.guard(servicer.fetch_blocks), pb.FetchBlocksRequest.FromString, None
        ),
        "ListFinishedPrompts": grpc.unary_stream_rpc_method_handler(
            gate.guard(servicer.list_finished_prompts),
            pb.ListFinishedPromptsRequest.FromString,
            _serialize,
        ),
        "PutDictionary": unary(servicer.put_dictionary, pb.PutDictionaryRequest),
        "GetDictionary": unary(servicer.get_dictionary, pb.GetDictionaryRequest),
        "PutAttachment": unary(servicer.put_attachment, pb.PutAttachmentRequest),
        "GetAttachment": unary(servicer.get_attachment, pb.GetAttachmentRequest),
        "ListAttachments": unary(servicer.list_attachments, pb.ListAttachmentsRequest),
        "ConfigureStream": unary(servicer.consumers.configure_stream, pb.ConfigureStreamRequest),
        "CreateJob": unary(servicer.queue.create_job, prompt_queue_pb2.CreateJobRequest),
        "AddPrompts": unary(servicer.queue.add_prompts, prompt_queue_pb2.AddPromptsRequest),
        "GetJob": unary(servicer.queue.get_job, prompt_queue_pb2.GetJobRequest),
        "ListJobs": unary(servicer.queue.list_jobs, prompt_queue_pb2.ListJobsRequest),
        "CancelJob": unary(servicer.queue.cancel_job, prompt_queue_pb2.CancelJobRequest),
        "LeasePrompts": unary(servicer.queue.lease_prompts, prompt_queue_pb2.LeasePromptsRequest),
        "RenewLeases": unary(servicer.queue.renew_leases, prompt_queue_pb2.RenewLeasesRequest),
        "ReleaseLeases": unary(servicer.queue.release_leases, prompt_queue_pb2.ReleaseLeasesRequest),
        "FailPrompts": unary(servicer.queue.fail_prompts, prompt_queue_pb2.FailPromptsRequest),
        "ListFailedPrompts": grpc.unary_stream_rpc_method_handler(
            gate.guard(servicer.queue.list_failed_prompts),
            prompt_queue_pb2.ListFailedPromptsRequest.FromString,
            _serialize,
        ),
        "LocatePrompts": unary(servicer.queue.locate_prompts, prompt_queue_pb2.LocatePromptsRequest),
        "CommitCursor": unary(servicer.consumers.commit_cursor, consumer_pb2.CommitCursorRequest),
        "GetConsumer": unary(servicer.consumers.get_consumer, consumer_pb2.GetConsumerRequest),
        "ListConsumers": unary(servicer.consumers.list_consumers, consumer_pb2.ListConsumersRequest),
        "DeleteConsumer": unary(servicer.consumers.delete_consumer, consumer_pb2.DeleteConsumerRequest),
    }
    return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
