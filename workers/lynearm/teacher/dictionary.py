"""What the codec learns about the teacher from the stream's own first blocks, and where it is kept.

A stream begins without a dictionary. Once enough positions have been encoded, one is trained on them, given
to the stream, and used from the next block on; a worker that takes over uses the dictionary of the stream's
last block. Without one nothing is lost but bits: whatever goes wrong here is said and passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lynearm.client import TraceClient
from lynearm.wire.blocks import split_block
from lynearm.wire.codec import train_dictionary
from lynearm.wire.dictionaries import Dictionary
from lynearm.wire.errors import DictionaryLimitError, LynearmError, ServiceUnavailableError
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import Trace

logger = logging.getLogger(__name__)

TRAINING_POSITIONS = 4096
"""Codes learnt from so many positions are within 1 % of those learnt from ten times as many."""


class DictionaryKeeper:
    """The dictionary of the blocks that are encoded next.

    Args:
        client: Of the service that keeps the stream.
        stream: Name of the stream.
        codec: How the stream is encoded.
        vocab_size: Width of the teacher's logits.
    """

    def __init__(self, client: TraceClient, stream: str, codec: CodecSpec, *, vocab_size: int) -> None:
        self._client = client
        self._stream = stream
        self._codec = codec
        self._vocab_size = vocab_size
        self._seen: list[Sequence[Trace]] = []
        self._positions = 0
        self._gave_up = False
        self.current: Dictionary | None = self._find_last()
        """None until there is one."""

    def learn(self, traces: Sequence[Trace]) -> None:
        """Take note of a block's traces; trains and keeps a dictionary when there have been enough."""
        if self.current is not None or self._gave_up:
            return
        self._seen.append(traces)
        self._positions += sum(trace.completion_token_ids.size for trace in traces)
        if self._positions < TRAINING_POSITIONS:
            return
        try:
            trained = train_dictionary(self._seen, codec=self._codec, vocab_size=self._vocab_size)
            self._client.put_dictionary(self._stream, trained.encoded)
        except ServiceUnavailableError:
            # The publisher waits for the service, and says so; the next block tries again.
            return
        except LynearmError as error:
            level = logging.INFO if isinstance(error, DictionaryLimitError) else logging.WARNING
            logger.log(level, "stream %s goes on without a dictionary: %s", self._stream, error)
            self._gave_up = True
        else:
            self.current = trained
        self._seen.clear()

    def _find_last(self) -> Dictionary | None:
        try:
            next_offset = self._client.get_stream(self._stream).next_offset
            if next_offset == 0:
                return None
            (received,) = self._client.fetch(self._stream, next_offset - 1, 1)
            digest = split_block(received.block)[0].dictionary_digest
            if not digest:
                return None
            return self._client.dictionaries(self._stream).get(digest)
        except LynearmError as error:
            logger.info("stream %s: no dictionary taken over: %s", self._stream, error)
            return None
