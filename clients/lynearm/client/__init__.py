"""The SDK: create, publish to, follow and read streams of teacher traces."""

from lynearm.client.consumer_calls import ConsumerInfo
from lynearm.client.consumers import ConsumerClient
from lynearm.client.dictionaries import DictionaryCache
from lynearm.client.interrupts import stop_on_interrupt
from lynearm.client.job_calls import JobInfo, JobPrompt, LeasedPrompt
from lynearm.client.jobs import JobClient
from lynearm.client.leases import Lease, PromptWorker
from lynearm.client.publisher import Publisher
from lynearm.client.subscription import ReceivedBlock, Subscription
from lynearm.client.trace_client import TraceClient
from lynearm.client.trace_lookup import FoundTrace, TraceId, fetch_trace, fetch_traces
from lynearm.wire.protobuf import StreamInfo

__all__ = [
    "ConsumerClient",
    "ConsumerInfo",
    "DictionaryCache",
    "FoundTrace",
    "JobClient",
    "JobInfo",
    "JobPrompt",
    "Lease",
    "LeasedPrompt",
    "PromptWorker",
    "Publisher",
    "ReceivedBlock",
    "StreamInfo",
    "Subscription",
    "TraceClient",
    "TraceId",
    "fetch_trace",
    "fetch_traces",
    "stop_on_interrupt",
]
