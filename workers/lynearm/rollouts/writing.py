"""Lets the student answer prompts, and finds where an earlier process was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lynearm.client import TraceClient
from lynearm.rollouts.config import RolloutConfig
from lynearm.rollouts.engine import RolloutRequest, StudentEngine, engine_config
from lynearm.rollouts.prompts import PromptCycle, RolloutPrompt, source_prompts, stream_prompts
from lynearm.rollouts.spool import SpoolPosition
from lynearm.rollouts.waves import Wave, rollout_tags
from lynearm.teacher.engine import Completion, completion_seed
from lynearm.wire.codec import decode_block
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.splits import SplitRule
from lynearm.wire.traces import SamplingParams, Trace


@dataclass(frozen=True, slots=True)
class StreamContents:
    """What the stream of rollouts holds when a process begins."""

    waiting: int
    """Traces that the trainer has not looked at."""
    numbers: frozenset[int]
    """Of rollouts that are there, from the first offset on that a spooled wave may be at."""
    next_number: int


class RolloutWriter:
    """Writes rollouts; on the engine's thread.

    Args:
        config: What the process is told.
        engine: The student.
        client: Of the trace service.
        info: Of the stream of rollouts.
    """

    def __init__(
        self, config: RolloutConfig, engine: StudentEngine, client: TraceClient, info: StreamInfo
    ) -> None:
        self._config = config
        self.engine = engine
        self._client = client
        self.least_offset = info.next_offset
        """No block that is published from now on is before."""
        self._number = 0
        self._top_k = config.top_k if config.support == "student" else 0
        self._prompts = self._make_cycle(0)

    @property
    def position(self) -> SpoolPosition:
        """Where the writing goes on."""
        return SpoolPosition(self._number, self._prompts.position)

    def begin(self, position: SpoolPosition) -> None:
        """Go on there."""
        self._number = position.number
        self._prompts = self._make_cycle(position.prompt)

    def look_into_stream(self, *, from_offset: int | None) -> StreamContents:
        """What is in the stream from where the trainer is, and from an offset, where one is given."""
        config = self._config
        info = self._client.get_stream(config.stream)
        wanted = [config.start.offset, info.next_offset - 1, *([] if from_offset is None else [from_offset])]
        first = max(info.first_offset, min(wanted))
        waiting, numbers = 0, set[int]()
        dictionaries = self._client.dictionaries(config.stream, wait=True)
        with self._client.subscribe(config.stream, start=first, follow=False, on_corrupt="skip") as blocks:
            for received in blocks:
                traces = decode_block(received.block, dictionaries=dictionaries)
                numbers |= {trace.sample_index for trace in traces}
                if received.offset >= config.start.offset:
                    used = config.start.trace_index if received.offset == config.start.offset else 0
                    waiting += len(traces) - used
        self.least_offset = info.next_offset
        return StreamContents(waiting, frozenset(numbers), max(numbers, default=-1) + 1)

    def write(self, count: int, step: int, should_stop: Callable[[], bool]) -> Wave | None:
        """A wave of rollouts; None without prompts, or if it should stop."""
        prompts = self._prompts.take(count)
        asked = {str(self._number + index): prompt for index, prompt in enumerate(prompts)}
        sampling = {number: self._sampling(number, prompt) for number, prompt in asked.items()}
        requests = [
            RolloutRequest(number, prompt.token_ids, sampling[number], self._top_k)
            for number, prompt in asked.items()
        ]
        rollouts: dict[int, Trace] = {}
        for completion in self.engine.generate(requests, should_stop):
            number = completion.request_id
            trace = self._trace(completion, asked[number], sampling[number], step)
            rollouts[trace.sample_index] = trace
        if not prompts or len(rollouts) < len(prompts):
            return None
        self._number += len(prompts)
        return Wave(tuple(trace for _, trace in sorted(rollouts.items())))

    def _sampling(self, number: str, prompt: RolloutPrompt) -> SamplingParams:
        config = self._config
        room = min(config.max_model_len, self.engine.base.max_model_len) - prompt.token_ids.size
        return SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=min(config.max_tokens, room),
            seed=completion_seed(config.seed, prompt.prompt_id, int(number)),
        )

    def _trace(
        self, completion: Completion, prompt: RolloutPrompt, sampling: SamplingParams, step: int
    ) -> Trace:
        engine = self.engine.base
        token_ids = completion.token_ids.tolist()
        mean_logprob = float(completion.sampled_logprobs.mean()) if token_ids else 0.0
        return Trace(
            prompt_id=prompt.prompt_id,
            prompt_token_ids=prompt.token_ids,
            completion_token_ids=completion.token_ids,
            sampled_logprobs=completion.sampled_logprobs,
            top_k=completion.top_k,
            finish_reason=completion.finish_reason,
            sample_index=int(completion.request_id),
            spans=engine.tokenizer.spans.find(prompt.token_ids.tolist(), token_ids, completion.finish_reason),
            sampling=sampling,
            tags=rollout_tags(prompt.tags, step, mean_logprob),
            completion_text=engine.tokenizer.decode(token_ids, engine.eos_token_ids),
        )

    def _make_cycle(self, skip: int) -> PromptCycle:
        config = self._config
        longest = min(config.max_model_len, self.engine.base.max_model_len) - 1
        rule = SplitRule(config.held_out_fraction, config.split_seed)
        return PromptCycle(self._begin_pass, rule=rule, max_tokens=longest, skip=skip)

    def _begin_pass(self) -> Iterator[RolloutPrompt]:
        config = self._config
        if config.prompts:
            teach = engine_config(config, self.engine.directory)
            return source_prompts(teach, self.engine.base.tokenizer)
        return stream_prompts(self._client, config.prompt_stream)
