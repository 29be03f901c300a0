"""What a saved Core ML package computes: whole sequences, cached steps, and a greedy continuation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from lynearm.export.mil_interpreter import MilInterpreter
from lynearm.export.mil_llama import ATTENTION_MASK, INPUT_IDS, LOGITS
from lynearm.export.parity import DECODE_STEPS, FloatArray, HeldOutSequence, PackageLogits

BLOCKED = -65504.0
"""What swift-transformers adds to the score of a token that may not be seen: the lowest float16."""


def run_coreml(package: Path, sequences: Sequence[HeldOutSequence]) -> PackageLogits:
    """Logits of a package, row for row those of `TorchReference.run`.

    Args:
        package: The `.mlpackage`.
        sequences: At least one; none longer than the package's context.

    Raises:
        ParityError: if the package is not one that the interpreter can run.
    """
    longest = max(len(one.token_ids) for one in sequences)
    conversation = _Conversation(package, longest + DECODE_STEPS)
    full = tuple(conversation.start(one.token_ids[:-1])[one.completion_start - 1 :] for one in sequences)
    first = sequences[0]
    prompt, given = first.token_ids[: first.completion_start], first.token_ids[first.completion_start :]
    last_row = conversation.start(prompt)[-1:]
    after_prompt = conversation.save()
    decode = [last_row]
    for token in given[: min(DECODE_STEPS, len(full[0])) - 1]:
        decode.append(conversation.feed([token]))
    conversation.restore(after_prompt)
    greedy = [int(last_row.argmax())]
    while len(greedy) < DECODE_STEPS and conversation.has_room:
        greedy.append(int(conversation.feed(greedy[-1:]).argmax()))
    return PackageLogits(full, np.concatenate(decode), tuple(greedy))


class _Conversation:
    """Drives a package as swift-transformers does: whole prompt first, then token by token.

    Args:
        package: The `.mlpackage`.
        most_tokens: Bound on the tokens of a conversation. Caches are given no more room than that, nor than
            the package declares: the interpreter copies them at each update.
    """

    def __init__(self, package: Path, most_tokens: int) -> None:
        self._interpreter = MilInterpreter(package)
        declared = next(iter(self._interpreter.state_shapes.values()))[-2]
        self._room = min(most_tokens, declared)
        self._used = 0

    @property
    def has_room(self) -> bool:
        """Whether the cache takes another token."""
        return self._used < self._room

    def start(self, token_ids: Sequence[int]) -> FloatArray:
        """Logits of a new conversation's tokens, [q, V]."""
        self._interpreter.states = {
            name: torch.zeros((*shape[:-2], self._room, shape[-1]))
            for name, shape in self._interpreter.state_shapes.items()
        }
        self._used = 0
        return self.feed(token_ids)

    def feed(self, token_ids: Sequence[int]) -> FloatArray:
        """Logits of the next tokens, [q, V]."""
        begin, end = self._used, self._used + len(token_ids)
        mask_QE = torch.triu(torch.full((len(token_ids), end), BLOCKED), diagonal=begin + 1)
        inputs = {
            INPUT_IDS: torch.tensor([list(token_ids)], dtype=torch.int32),
            ATTENTION_MASK: mask_QE[None, None],
        }
        logits = self._interpreter.run(inputs)[LOGITS]
        self._used = end
        return cast(FloatArray, logits[0].numpy())

    def save(self) -> tuple[int, dict[str, torch.Tensor]]:
        """The conversation so far; cheap, since states are replaced and never changed in place."""
        return self._used, dict(self._interpreter.states)

    def restore(self, saved: tuple[int, dict[str, torch.Tensor]]) -> None:
        """Goes back to what `save` gave."""
        self._used, states = saved
        self._interpreter.states = dict(states)
