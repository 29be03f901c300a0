"""Reads a stream ahead of the trainer: receives and decodes blocks on a thread of its own.

Invariants: traces come in stream order from the start cursor on, each once, with the cursor that names
what comes after it. At most `prefetch_blocks` decoded blocks wait; then the thread stops reading, and the
subscription's credit holds the service back. A block that does not decode ends the pass, or is passed over
where that was asked for; then its offset is known before a trace behind it is given.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from lynearm.client import ReceivedBlock
from lynearm.wire.codec import decode_block
from lynearm.wire.dictionaries import DictionaryReader
from lynearm.wire.errors import CorruptBlockError, InvalidInputError
from lynearm.wire.traces import Cursor, Trace

logger = logging.getLogger(__name__)

_LOOK_AROUND_SECONDS = 0.1
"""How often a thread that waits for room looks whether it should end."""

_FAREWELL_SECONDS = 5.0
"""How long a thread that decodes, or whose subscription hangs up, is waited for."""


@dataclass(frozen=True, slots=True)
class PositionedTrace:
    """A trace and the place after it."""

    trace: Trace
    after: Cursor
    """Of the next trace; (offset + 1, 0) after a block's last."""


@dataclass(frozen=True, slots=True)
class _Decoded:
    traces: tuple[PositionedTrace, ...]


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class TraceReader:
    """One pass over a stream. Use it as a context manager.

    Args:
        blocks: A subscription that begins at `start.offset`, or any other blocks in offset order.
        start: First trace to give.
        prefetch_blocks: Decoded blocks that may wait.
        dictionaries: Finds the codec dictionaries that blocks need.
        skip_damaged: Pass over blocks that do not decode, instead of raising.
        on_close: Called by `close`; has to end an iteration over `blocks` that waits.
    """

    def __init__(
        self,
        blocks: Iterable[ReceivedBlock],
        *,
        start: Cursor,
        prefetch_blocks: int,
        dictionaries: DictionaryReader | None = None,
        skip_damaged: bool = False,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._blocks = blocks
        self._dictionaries = dictionaries
        self._skip_damaged = skip_damaged
        self._on_close = on_close
        self._start = start
        self._decoded: queue.Queue[_Decoded | _Failed | None] = queue.Queue(prefetch_blocks)
        self._waiting: deque[PositionedTrace] = deque()
        self._next_offset = start.offset
        self._received_all = False
        self._exhausted = False
        self._damaged_offsets: list[int] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read-traces", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """The reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    @property
    def next_offset(self) -> int:
        """Blocks that the stream is known to have; grows as blocks arrive."""
        return self._next_offset

    @property
    def received_all(self) -> bool:
        """Whether the stream's last block has arrived; its traces may still wait here."""
        return self._received_all

    @property
    def damaged_offsets(self) -> tuple[int, ...]:
        """Offsets of the blocks that were passed over, since they do not decode."""
        return tuple(self._damaged_offsets)

    @property
    def exhausted(self) -> bool:
        """Whether every trace has been given."""
        return self._exhausted and not self._waiting

    def poll(self, timeout_seconds: float) -> PositionedTrace | None:
        """The next trace; None when none came in time (0 does not wait), or all have been given.

        Raises:
            LynearmError: what the subscription or the codec said, once the traces before it are given.
        """
        while not self._waiting and not self._exhausted:
            try:
                item = self._decoded.get(block=timeout_seconds > 0, timeout=timeout_seconds)
            except queue.Empty:
                return None
            if item is None:
                self._exhausted = True
            elif isinstance(item, _Failed):
                self._exhausted = True
                raise item.error
            else:
                self._waiting.extend(item.traces)
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._on_close()
        self._thread.join(_FAREWELL_SECONDS)

    def _run(self) -> None:
        try:
            for received in self._blocks:
                self._next_offset = max(self._next_offset, received.next_offset, received.offset + 1)
                if not self._put(_Decoded(self._decode(received))):
                    return
            self._received_all = True
            self._put(None)
        except BaseException as error:
            # Whatever it is, the thread that polls has to hear of it, or it waits for ever.
            self._put(_Failed(error))

    def _decode(self, received: ReceivedBlock) -> tuple[PositionedTrace, ...]:
        try:
            traces = decode_block(received.block, dictionaries=self._dictionaries)
        except (CorruptBlockError, InvalidInputError) as error:  # the latter where it is no block at all
            if not self._skip_damaged:
                raise CorruptBlockError(f"block {received.offset}: {error.message}", error.remedy) from error
            logger.error("skipping block %d, which does not decode: %s", received.offset, error.message)
            self._damaged_offsets.append(received.offset)
            return ()
        last = len(traces) - 1
        skipped = self._start.trace_index if received.offset == self._start.offset else 0
        return tuple(
            PositionedTrace(
                trace,
                Cursor(received.offset, index + 1) if index < last else Cursor(received.offset + 1, 0),
            )
            for index, trace in enumerate(traces)
            if index >= skipped
        )

    def _put(self, item: _Decoded | _Failed | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._decoded.put(item, timeout=_LOOK_AROUND_SECONDS)
            except queue.Full:
                continue
            return True
        return False
