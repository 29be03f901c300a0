"""The SDK: create, publish to, follow and read streams of teacher traces."""

from lynearm.client.async_publisher import AsyncPublisher
from lynearm.client.async_subscription import AsyncSubscription
from lynearm.client.async_trace_client import AsyncTraceClient
from lynearm.client.credentials import Credentials, TlsConfig
from lynearm.client.dictionaries import DictionaryCache
from lynearm.client.interrupts import stop_on_interrupt
from lynearm.client.publisher import Publisher
from lynearm.client.reading_position import ReceivedBlock
from lynearm.client.subscription import Subscription
from lynearm.client.trace_client import TraceClient
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.retention import Collected, Retention

__all__ = [
    "AsyncPublisher",
    "AsyncSubscription",
    "AsyncTraceClient",
    "Collected",
    "Credentials",
    "DictionaryCache",
    "Publisher",
    "ReceivedBlock",
    "Retention",
    "StreamInfo",
    "Subscription",
    "TlsConfig",
    "TraceClient",
    "stop_on_interrupt",
]
