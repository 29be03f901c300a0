"""The SDK: create, publish to, follow and read streams of teacher traces."""

from lynearm.client.async_publisher import AsyncPublisher
from lynearm.client.async_subscription import AsyncSubscription
from lynearm.client.async_trace_client import AsyncTraceClient
from lynearm.client.consumer_calls import ConsumerInfo
from lynearm.client.consumers import ConsumerClient
from lynearm.client.credentials import Credentials, TlsConfig
from lynearm.client.dictionaries import DictionaryCache
from lynearm.client.interrupts import stop_on_interrupt
from lynearm.client.job_calls import JobInfo
from lynearm.client.jobs import JobClient
from lynearm.client.leases import Lease, PromptWorker
from lynearm.client.publisher import Publisher
from lynearm.client.reading_position import ReceivedBlock
from lynearm.client.subscription import Subscription
from lynearm.client.trace_client import TraceClient
from lynearm.client.trace_lookup import FoundTrace, TraceId, fetch_trace, fetch_traces
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.retention import Collected, Retention
from lynearm.wire.work import FailedSamples, JobPrompt, LeasedPrompt

__all__ = [
    "AsyncPublisher",
    "AsyncSubscription",
    "AsyncTraceClient",
    "Collected",
    "ConsumerClient",
    "ConsumerInfo",
    "Credentials",
    "DictionaryCache",
    "FailedSamples",
    "FoundTrace",
    "JobClient",
    "JobInfo",
    "JobPrompt",
    "Lease",
    "LeasedPrompt",
    "PromptWorker",
    "Publisher",
    "ReceivedBlock",
    "Retention",
    "StreamInfo",
    "Subscription",
    "TlsConfig",
    "TraceClient",
    "TraceId",
    "fetch_trace",
    "fetch_traces",
    "stop_on_interrupt",
]
