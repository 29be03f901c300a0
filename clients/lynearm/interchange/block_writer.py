"""Encodes prompts into blocks and publishes them.

Invariants: all traces of a prompt travel in one block, which also says that the prompt is finished, so that a
prompt is in the stream whole or not at all, whenever the import dies.
"""

from __future__ import annotations

from collections.abc import Sequence

from lynearm.client import Publisher
from lynearm.interchange.sources import PromptTraces
from lynearm.wire.codec import encode_block
from lynearm.wire.errors import CodecError, InvalidInputError
from lynearm.wire.specs import StreamSpec, bound_position_bytes
from lynearm.wire.traces import Trace

BLOCK_BYTES = 256 << 10
"""A block goes out when about this much is encoded: smaller ones cost more per byte on the way."""

_MAX_PROMPTS = 1024
"""Their ids travel beside the block, and the two must fit into one message."""

_MAX_ENTRIES = 1 << 20
"""Positions times entries of a block, however well they compress: 8 MB of arrays."""


class BlockWriter:
    """Turns prompts into published blocks.

    Args:
        publisher: Where blocks go; the caller closes it.
        spec: Of the stream.
    """

    def __init__(self, publisher: Publisher, spec: StreamSpec) -> None:
        self._publisher = publisher
        self._spec = spec
        self._waiting: list[PromptTraces] = []
        self._waiting_bytes = 0.0
        self._waiting_entries = 0
        codec = spec.codec
        self._bytes_per_token = bound_position_bytes(codec.mode, codec.top_k, codec.tail_draws)
        self.prompts = self.traces = self.tokens = 0
        """Handed to the publisher, as are the blocks; tokens are those of completions."""
        self.blocks = 0
        self.size_bytes = 0

    def add(self, prompt: PromptTraces) -> None:
        """Take a prompt; publishes a block when there is enough for one.

        Raises:
            InvalidInputError: if traces cannot be encoded, naming where they are from. The prompts before
                them are published.
            LynearmError: what the service said to an earlier block.
        """
        for trace in prompt.traces:
            if trace.top_k.k > self._spec.codec.top_k:
                raise InvalidInputError(
                    f"{prompt.where}: positions of {trace.top_k.k} entries, and the stream keeps "
                    f"{self._spec.codec.top_k}",
                    f"give --top-k {trace.top_k.k}, and --stream of a new stream",
                )
        self._waiting.append(prompt)
        self._waiting_bytes += self._bytes_per_token * _tokens(prompt.traces) + sum(
            4 * trace.prompt_token_ids.size + len(trace.completion_text) for trace in prompt.traces
        )
        self._waiting_entries += _tokens(prompt.traces) * max(1, self._spec.codec.top_k)
        full = self._waiting_bytes >= BLOCK_BYTES or self._waiting_entries >= _MAX_ENTRIES
        if full or len(self._waiting) >= _MAX_PROMPTS:
            self.flush()

    def flush(self) -> None:
        """Publish what waits for more; returns when it is queued, not when it is durable."""
        waiting, self._waiting = self._waiting, []
        self._waiting_bytes, self._waiting_entries = 0.0, 0
        if waiting:
            self._publish(waiting)

    def _publish(self, prompts: Sequence[PromptTraces]) -> None:
        traces = [trace for prompt in prompts for trace in prompt.traces]
        try:
            block = self._encode(traces)
        except CodecError as error:
            if len(prompts) == 1:
                raise InvalidInputError(f"{prompts[0].where}: {error.message}", _remedy(error)) from error
            # Too many for a block, or one that cannot be encoded: halves tell.
            self._publish(prompts[: len(prompts) // 2])
            self._publish(prompts[len(prompts) // 2 :])
            return
        tokens = _tokens(traces)
        if tokens >= 256:
            self._bytes_per_token = len(block) / tokens
        self._publisher.publish(block, [prompt.prompt_id for prompt in prompts])
        self.prompts += len(prompts)
        self.traces += len(traces)
        self.tokens += tokens
        self.blocks += 1
        self.size_bytes += len(block)

    def _encode(self, traces: Sequence[Trace]) -> bytes:
        return encode_block(traces, codec=self._spec.codec, vocab_size=self._spec.teacher.vocab_size)


def _tokens(traces: Sequence[Trace]) -> int:
    return sum(trace.completion_token_ids.size for trace in traces)


def _remedy(error: CodecError) -> str:
    # The codec's advice is for those who choose what shares a block.
    if "fewer traces" in error.remedy:
        return "the traces of a prompt share a block: give --codec standard, or fewer of them"
    return error.remedy
