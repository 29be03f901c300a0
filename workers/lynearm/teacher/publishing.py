"""Encodes finished prompts into blocks and publishes them, on a thread of its own beside the engine.

Invariants: the traces of a prompt that one worker made travel in one block, and the samples that they answer
are done in the transaction that commits it: a sample is in the stream and done, or neither. Samples that get
no trace are given up after the block that they came with. The engine hands prompts over through a bounded
queue: it is held up only when the service takes nothing for so long that queue and publisher's window are
full.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from lynearm.client import Publisher
from lynearm.client.leases import Lease
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.dictionary import DictionaryKeeper
from lynearm.teacher.selection import TraceSelection
from lynearm.wire.codec import encode_block
from lynearm.wire.errors import DeadlineError
from lynearm.wire.labels import summarise_tags
from lynearm.wire.specs import CodecSpec
from lynearm.wire.traces import Trace
from lynearm.wire.work import FailedSamples, FinishedWork

_POLL_SECONDS = 0.1

GiveUp: TypeAlias = Callable[[Lease, Sequence[FailedSamples]], None]
"""Tells the service of samples of a lease that get no trace; waits for a service that is away."""


@dataclass(frozen=True, slots=True)
class FinishedPrompt:
    """What became of the samples of one prompt that a lease covers."""

    lease: Lease
    traces: tuple[Trace, ...]
    """Of one prompt; those that are published."""
    failed: tuple[FailedSamples, ...] = ()
    """Samples that get no trace."""
    left_out: tuple[int, ...] = ()
    """Samples that are done, and whose traces are not published."""


class BlockWriter:
    """Turns finished prompts into published blocks.

    Args:
        publisher: Where blocks go; the caller closes it.
        config: Says when blocks go out.
        codec: How they are encoded.
        dictionaries: Keeps what the codec learns about the teacher; None learns nothing.
        vocab_size: Width of the teacher's logits.
        give_up: Called, on the writer's thread, for samples without a trace.
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
        give_up: GiveUp,
        selection: TraceSelection | None = None,
    ) -> None:
        self._selection = selection
        self._publisher = publisher
        self._config = config
        self._codec = codec
        self._dictionaries = dictionaries
        self._vocab_size = vocab_size
        self._give_up = give_up
        self._bytes_per_token = config.bytes_per_token()
        # An event asks for all before it to be made durable; None ends the thread.
        self._queue: queue.Queue[FinishedPrompt | threading.Event | None] = queue.Queue(
            max(16, 2 * config.max_batch)
        )
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
        self._put(finished)
        self._raise_error()

    def flush(self, timeout_seconds: float = float("inf")) -> None:
        """Publish what was handed over, and wait until all of it is durable.

        Raises:
            DeadlineError: if that took longer.
            LynearmError: what stopped the publishing.
        """
        done = threading.Event()
        self._put(done)
        deadline = time.monotonic() + timeout_seconds
        while not done.wait(_POLL_SECONDS):
            self._raise_error()
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"traces were not durable within {timeout_seconds:g} s", self._publisher.waiting_reason
                )

    def close(self) -> None:
        """Publish what is left, wait until all is durable, and end.

        Raises:
            LynearmError: what stopped the publishing.
        """
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End without waiting for anything."""
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            break

    def check(self) -> None:
        """Raise what stopped the publishing, if anything did."""
        self._raise_error()

    def _put(self, item: FinishedPrompt | threading.Event) -> None:
        while True:
            self._raise_error()
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            goes_on = True
            while goes_on:
                goes_on = self._work()
        # Whatever it is, the engine's thread raises it at its next call.
        except BaseException as error:
            self._error = error

    def _work(self) -> bool:
        """One block, or one order; whether there may be more."""
        batch, order = self._collect()
        self._publish([finished for finished in batch if not finished.lease.is_lost])
        if isinstance(order, threading.Event):
            self._publisher.flush()
            order.set()
            return True
        return bool(batch) and order is not _END

    def _collect(self) -> tuple[list[FinishedPrompt], threading.Event | object | None]:
        """Prompts for one block: until it is large enough, or old enough, or an order follows them."""
        batch: list[FinishedPrompt] = []
        deadline = float("inf")
        while self._estimate(batch) < self._config.block_bytes:
            try:
                wait_seconds = None if not batch else max(0.0, deadline - time.monotonic())
                following = self._queue.get(timeout=wait_seconds)
            except queue.Empty:
                break
            if following is None:
                return batch, _END
            if isinstance(following, threading.Event):
                return batch, following
            batch.append(self._selected(following))
            if len(batch) == 1:
                deadline = time.monotonic() + self._config.flush_seconds
        return batch, None

    def _selected(self, finished: FinishedPrompt) -> FinishedPrompt:
        """What of a prompt is published: at least one trace, if it has any."""
        if self._selection is None or not finished.traces:
            return finished
        published = self._selection(finished.traces)
        kept = {trace.sample_index for trace in published}
        left_out = (trace.sample_index for trace in finished.traces if trace.sample_index not in kept)
        return replace(finished, traces=published, left_out=tuple(left_out))

    def _estimate(self, batch: Sequence[FinishedPrompt]) -> float:
        states = (trace.hidden for finished in batch for trace in finished.traces)
        hidden_bytes = sum(one.size_bytes for one in states if one is not None)
        return self._bytes_per_token * _completion_tokens(batch) + hidden_bytes

    def _publish(self, batch: Sequence[FinishedPrompt]) -> None:
        traces = [trace for finished in batch for trace in finished.traces]
        if traces:
            block = self._encode(traces)
            tags = summarise_tags(trace.tags for trace in traces)
            self._publisher.publish(block, finished_work=_finished_work(batch), tags=tags)
        for lease, failed in _by_lease([(one.lease, one.failed) for one in batch]):
            self._give_up(lease, failed)

    def _encode(self, traces: Sequence[Trace]) -> bytes:
        started = time.monotonic()
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
        tokens = sum(trace.completion_token_ids.size for trace in traces)
        if tokens >= 256:
            self._bytes_per_token = len(block) / tokens
        return block


_END = object()
"""The order to end."""


def _finished_work(batch: Sequence[FinishedPrompt]) -> list[FinishedWork]:
    samples: dict[Lease, list[tuple[str, int]]] = {}
    for finished in batch:
        named = [(trace.prompt_id, trace.sample_index) for trace in finished.traces]
        named += [(finished.traces[0].prompt_id, sample_index) for sample_index in finished.left_out]
        samples.setdefault(finished.lease, []).extend(named)
    return [lease.finish(named) for lease, named in samples.items() if named]


def _by_lease(
    pairs: Sequence[tuple[Lease, Sequence[FailedSamples]]],
) -> list[tuple[Lease, list[FailedSamples]]]:
    found: dict[Lease, list[FailedSamples]] = {}
    for lease, failed in pairs:
        if failed:
            found.setdefault(lease, []).extend(failed)
    return list(found.items())


def _completion_tokens(batch: Sequence[FinishedPrompt]) -> int:
    return sum(trace.completion_token_ids.size for finished in batch for trace in finished.traces)
