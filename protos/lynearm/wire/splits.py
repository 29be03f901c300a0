"""Which prompts are for measuring: the same answer wherever it is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from lynearm.wire.traces import Trace

SPLIT_TAG = "split"
"""Tag by which a trace or prompt says whether it is trained on: "train" or "held_out"."""


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Which prompts are never trained on."""

    fraction: float
    """Of the prompts, for those without a tag."""
    seed: int = 0

    def holds_out(self, trace: Trace) -> bool:
        """Whether the trace is for measuring. All traces of one prompt get the same answer."""
        return self.holds_out_prompt(trace.prompt_id, trace.tags)

    def holds_out_prompt(self, prompt_id: str, tags: Mapping[str, str]) -> bool:
        """Whether traces of the prompt are for measuring."""
        tag = tags.get(SPLIT_TAG, "")
        if tag in ("train", "held_out"):
            return tag == "held_out"
        digest = hashlib.blake2b(f"{self.seed}/{prompt_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.fraction * 2**64
