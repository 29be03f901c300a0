"""The SDK: create, publish to, follow and read streams of teacher traces."""

from lynearm.client.dictionaries import DictionaryCache
from lynearm.client.interrupts import stop_on_interrupt
from lynearm.client.publisher import Publisher
from lynearm.client.subscription import ReceivedBlock, Subscription
from lynearm.client.trace_client import TraceClient
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.retention import Collected, Retention

__all__ = [
    "Collected",
    "DictionaryCache",
    "Publisher",
    "ReceivedBlock",
    "Retention",
    "StreamInfo",
    "Subscription",
    "TraceClient",
    "stop_on_interrupt",
]
