"""The text that a cut is measured on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lynearm.student.model import load_tokenizer
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.traces import Trace

logger = logging.getLogger(__name__)

CALIBRATION = (
    (
        "Mia has 14 marbles and buys 9 more. Why does she have 23 now?",
        "Mia starts with 14 marbles. She buys 9 more, so she has 14 + 9 = 23 marbles.",
    ),
    (
        "Write a Python function that doubles a number.",
        "```python\ndef double(x):\n    return 2 * x\n```\nCall it with any number to get twice its value.",
    ),
)
"""Questions and answers that candidates are measured on when no sequences are given. About 60 positions: each
costs half a forward pass for every candidate."""


@dataclass(frozen=True, slots=True)
class CalibrationSequence:
    """Token ids that layers are measured on."""

    token_ids: tuple[int, ...]
    completion_start: int
    """Index of the first token whose prediction counts; at least 1."""

    @property
    def counted(self) -> slice:
        """Positions from which completion tokens are predicted."""
        return slice(max(0, self.completion_start - 1), len(self.token_ids) - 1)


def default_sequences(teacher_dir: Path) -> list[CalibrationSequence]:
    """`CALIBRATION` in the teacher's tokens, through its chat template where it has one that takes it.

    Raises:
        CheckpointError: if the teacher has no tokenizer that can be loaded.
    """
    tokenizer = load_tokenizer(teacher_dir)
    sequences: list[CalibrationSequence] = []
    for question, answer in CALIBRATION:
        prompt = _ask(tokenizer, question)
        prompt_ids = cast("list[int]", tokenizer.encode(prompt, add_special_tokens=False))
        answer_ids = cast("list[int]", tokenizer.encode(answer, add_special_tokens=False))
        sequences.append(CalibrationSequence((*prompt_ids, *answer_ids), len(prompt_ids)))
    return sequences


def _ask(tokenizer: Any, question: str) -> str:
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": question}]
        try:
            return cast(
                str, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            )
        except Exception as error:
            # Templates raise what they like, for example where they ask for a system prompt.
            logger.warning("the chat template refuses a lone question (%s): measuring without it", error)
    return f"{question}\n"


def sequences_from_traces(traces: Iterable[Trace], *, max_tokens: int) -> list[CalibrationSequence]:
    """Prompts and completions of the first traces.

    Args:
        traces: In the order to take them; no more are taken than are needed.
        max_tokens: Completion tokens after which no further trace is taken.

    Raises:
        InvalidInputError: if no trace has both a prompt and a completion.
    """
    sequences: list[CalibrationSequence] = []
    tokens = 0
    for trace in traces:
        prompt, completion = trace.prompt_token_ids.tolist(), trace.completion_token_ids.tolist()
        if prompt and completion:
            sequences.append(CalibrationSequence((*prompt, *completion), len(prompt)))
            tokens += len(completion)
        if tokens >= max_tokens:
            break
    if not sequences:
        raise InvalidInputError("no trace to measure on", "name a stream that has some")
    return sequences
