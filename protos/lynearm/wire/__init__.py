"""The contract in memory: block format, codec, traces, stream specs and the error tree."""

from lynearm.wire.blocks import BlockHeader, split_block, verify_block
from lynearm.wire.errors import LynearmError
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.specs import CodecSpec, StreamSpec, TeacherSpec, TokenizerSpec
from lynearm.wire.traces import Cursor, SamplingParams, TokenSpan, TopK, Trace

__all__ = [
    "BlockHeader",
    "CodecSpec",
    "Cursor",
    "LynearmError",
    "SamplingParams",
    "StreamInfo",
    "StreamSpec",
    "TeacherSpec",
    "TokenSpan",
    "TokenizerSpec",
    "TopK",
    "Trace",
    "split_block",
    "verify_block",
]
