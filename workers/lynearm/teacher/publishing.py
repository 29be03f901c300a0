"""Encodes finished prompts into blocks and publishes them, on a thread of its own beside the engine.

Invariants: all completions of a prompt travel in one block, which also says that the prompt is finished, so
that a prompt is in the stream whole or not at all. The engine hands prompts over through a bounded queue: it
is held up only when the service takes nothing for so long that the queue and the publisher's window are full.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lynearm.client import Publisher
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.dictionary import DictionaryKeeper
from lynearm.teacher.selection import TraceSelection
from lynearm.wire.codec import encode_block
from lynearm.wire.labels import summarise_tags
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import Trace

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class FinishedPrompt:
    """Every trace of one prompt."""

    prompt_id: str
    traces: tuple[Trace, ...]


class BlockWriter:
    """Turns finished prompts into published blocks.

    Args:
        publisher: Where blocks go; the caller closes it.
        config: Says when blocks go out.
        codec: How they are encoded.
        dictionaries: Keeps what the codec learns about the teacher; None learns nothing.
        vocab_size: Width of the teacher's logits.
        selection: Says what of a finished prompt is published; None: everything.
    """

    def __init__(
        self,
        publisher: Publisher,
        config: TeachConfig,
        *,
        codec: CodecSpec,
        dictionaries: DictionaryKeeper | None,
        vocab_size: int,
        selection: TraceSelection | None = None,
    ) -> None:
        self._selection = selection
        self._publisher = publisher
        self._config = config
        self._codec = codec
        self._dictionaries = dictionaries
        self._vocab_size = vocab_size
        self._bytes_per_token = config.bytes_per_token()
        self._queue: queue.Queue[FinishedPrompt | None] = queue.Queue(max(16, 2 * config.max_batch))
        self._error: BaseException | None = None
        self.encode_seconds = 0.0
        """CPU and waiting time spent on encoding, in all."""
        self._thread = threading.Thread(target=self._run, name="encode-blocks", daemon=True)
        self._thread.start()

    def put(self, finished: FinishedPrompt) -> None:
        """Hand over a prompt; waits while the queue is full.

        Raises:
            LynearmError: what stopped the publishing of an earlier one.
        """
        while True:
            self._raise_error()
            try:
                self._queue.put(finished, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return

    def close(self) -> None:
        """Publish what is left and wait until all is durable.

        Raises:
            LynearmError: what stopped the publishing.
        """
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        self._thread.join()
        self._raise_error()
        self._publisher.flush()

    def check(self) -> None:
        """Raise what stopped the publishing, if anything did."""
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while batch := self._collect():
                self._publish(batch)
        # Whatever it is, the engine's thread raises it at its next call.
        except BaseException as error:
            self._error = error

    def _collect(self) -> list[FinishedPrompt]:
        """Prompts for one block: until it is large enough, or old enough, or there are no more."""
        first = self._queue.get()
        if first is None:
            return []
        batch = [self._selected(first)]
        deadline = time.monotonic() + self._config.flush_seconds
        while self._estimate(batch) < self._config.block_bytes:
            try:
                following = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if following is None:
                self._queue.put(None)
                break
            batch.append(self._selected(following))
        return batch

    def _selected(self, finished: FinishedPrompt) -> FinishedPrompt:
        """What of a prompt is published: at least one trace."""
        if self._selection is None:
            return finished
        return replace(finished, traces=self._selection(finished.traces))

    def _estimate(self, batch: Sequence[FinishedPrompt]) -> float:
        return self._bytes_per_token * _completion_tokens(batch)

    def _publish(self, batch: Sequence[FinishedPrompt]) -> None:
        started = time.monotonic()
        traces = [trace for finished in batch for trace in finished.traces]
        dictionaries = self._dictionaries
        block = encode_block(
            traces,
            codec=self._codec,
            vocab_size=self._vocab_size,
            dictionary=None if dictionaries is None else dictionaries.current,
        )
        if dictionaries is not None:
            dictionaries.learn(traces)
        self.encode_seconds += time.monotonic() - started
        tokens = _completion_tokens(batch)
        if tokens >= 256:
            self._bytes_per_token = len(block) / tokens
        tags = summarise_tags(trace.tags for trace in traces)
        self._publisher.publish(block, [finished.prompt_id for finished in batch], tags=tags)


def _completion_tokens(batch: Sequence[FinishedPrompt]) -> int:
    return sum(trace.completion_token_ids.size for finished in batch for trace in finished.traces)
