"""What the codec learns about the teacher from the stream's own first blocks, and where it is kept.

A stream begins without a dictionary. Once enough positions have been encoded, one is trained on them, given
to the stream, and used from the next block on; once there are many more, a better one. A worker that takes
over uses the dictionary of the stream's last block. Without one nothing is lost but bits: whatever goes wrong
here is said and passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lynearm.client import TraceClient
from lynearm.wire.blocks import split_block
from lynearm.wire.dictionaries import Dictionary
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.errors import DictionaryLimitError, LynearmError, ServiceUnavailableError
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import Trace

logger = logging.getLogger(__name__)

TRAINING_POSITIONS = (4096, 32_768)
"""Positions after which a dictionary is trained, each time on all so far.

On SmolLM2 at k = 64, in blocks of 256, one that is learnt from 1,000 positions leaves 816 bits a token, from
2,000 806, from 4,100 786, from 6,400 778; none leaves 820.
"""

MAX_TRAINING_ENTRIES = 1 << 22
"""What is kept for the training at most: 32 MiB of ids and logprobs."""


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
        self._entries = 0
        self.current: Dictionary | None = self._find_last()
        """None until there is one."""
        self._still_to_train = [] if self.current is not None else list(TRAINING_POSITIONS)

    def learn(self, traces: Sequence[Trace]) -> None:
        """Take note of a block's traces; trains and keeps a dictionary when there have been enough."""
        if not self._still_to_train:
            return
        positions = sum(trace.completion_token_ids.size for trace in traces)
        self._positions += positions
        self._entries += positions * max(trace.top_k.k for trace in traces)
        if self._entries <= MAX_TRAINING_ENTRIES or not self._seen:
            self._seen.append(traces)
        if self._positions < self._still_to_train[0]:
            return
        try:
            trained = train_dictionary(self._seen, codec=self._codec, vocab_size=self._vocab_size)
            self._client.put_dictionary(self._stream, trained.encoded)
        except ServiceUnavailableError:
            # The publisher waits for the service, and says so; the next block tries again.
            return
        except LynearmError as error:
            level = logging.INFO if isinstance(error, DictionaryLimitError) else logging.WARNING
            logger.log(level, "stream %s gets no new dictionary: %s", self._stream, error)
            self._still_to_train.clear()
        else:
            self.current = trained
            del self._still_to_train[0]
        if not self._still_to_train:
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
