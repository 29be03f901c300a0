"""What the student answers: the prompts of a source, or those of a stream, over and over.

Memory does not grow with their number: each pass reads them anew.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from lynearm.client import TraceClient
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.prompt_sources import UsablePrompts
from lynearm.teacher.tokenizer import PromptTokenizer
from lynearm.teacher.verifiers import VERDICT_TAGS
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.splits import SplitRule
from lynearm.wire.traces import Int32Array

logger = logging.getLogger(__name__)

_NEIGHBOURS = 256
"""Prompts back to which a stream's pass looks for one that came already: all answers to a prompt that one
teacher gave are in one block."""


@dataclass(frozen=True, slots=True, eq=False)
class RolloutPrompt:
    """A prompt as the student reads it."""

    prompt_id: str
    token_ids: Int32Array
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


PromptPass = Callable[[], Iterator[RolloutPrompt]]
"""Begins a pass over the prompts; each in the same order, and with those at its end that came since."""


class PromptCycle:
    """Prompts without end.

    Args:
        begin_pass: Gives the prompts.
        rule: Prompts that it holds out are left out.
        max_tokens: Longer prompts are left out.
        skip: Prompts of the first pass that were answered before.
    """

    def __init__(self, begin_pass: PromptPass, *, rule: SplitRule, max_tokens: int, skip: int = 0) -> None:
        self._begin_pass = begin_pass
        self._rule = rule
        self._max_tokens = max_tokens
        self._pass = islice(self._usable(), skip, None)
        self.position = skip
        """Prompts taken in the pass in progress."""

    def take(self, count: int) -> list[RolloutPrompt]:
        """The next prompts; none where there are none yet."""
        taken = list(islice(self._pass, count))
        self.position += len(taken)
        while len(taken) < count:
            self._pass, self.position = islice(self._usable(), 0, None), 0
            more = list(islice(self._pass, count - len(taken)))
            if not more:
                break
            taken += more
            self.position = len(more)
        return taken

    def _usable(self) -> Iterator[RolloutPrompt]:
        for prompt in self._begin_pass():
            fits = 0 < prompt.token_ids.size <= self._max_tokens
            if fits and not self._rule.holds_out_prompt(prompt.prompt_id, prompt.tags):
                yield prompt


def stream_prompts(client: TraceClient, stream: str) -> Iterator[RolloutPrompt]:
    """The prompts that a stream has answers to, as far as it goes now.

    Their tags are those of the answers, without verdicts, which are about the teacher's own.
    """
    dictionaries = client.dictionaries(stream, wait=True)
    start = client.get_stream(stream).first_offset
    recent: deque[str] = deque(maxlen=_NEIGHBOURS)
    with client.subscribe(stream, start=start, follow=False, on_corrupt="skip") as blocks:
        for received in blocks:
            for trace in decode_block(received.block, dictionaries=dictionaries):
                if trace.prompt_id not in recent:
                    recent.append(trace.prompt_id)
                    tags = {key: value for key, value in trace.tags.items() if key not in VERDICT_TAGS}
                    yield RolloutPrompt(trace.prompt_id, trace.prompt_token_ids, tags)


def source_prompts(config: TeachConfig, tokenizer: PromptTokenizer) -> Iterator[RolloutPrompt]:
    """The prompts of a file or a dataset.

    Args:
        config: Names the source.
        tokenizer: Of the student, with its chat template.

    Raises:
        PromptFileError: if the source cannot be read, or holds no prompt.
        MissingDependencyError: without the package that reads it.
    """
    prompts = UsablePrompts(config)
    for prompt in prompts:
        try:
            token_ids = tokenizer.encode(prompt)
        except InvalidInputError as error:
            logger.warning("%s:%d is left out: %s", prompt.file, prompt.line, error.message)
            continue
        yield RolloutPrompt(prompt.prompt_id, token_ids, prompt.tags)
    if prompts.bad_line_count:
        logger.warning("%d lines of %s are no prompts", prompts.bad_line_count, config.prompts)
