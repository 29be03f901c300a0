"""The trace, and what it is made of, as every part of lynearm holds it in memory.

Shape legend: P = prompt tokens, T = completion positions, K = entries kept per position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import CodecError
from lynearm.wire.hidden import HiddenStates

Int32Array: TypeAlias = npt.NDArray[np.int32]
Float32Array: TypeAlias = npt.NDArray[np.float32]

FinishReason: TypeAlias = Literal["stop", "length", "abort"]
FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)

SpanKind: TypeAlias = Literal["reasoning", "answer", "truncated_reasoning"]
SPAN_KINDS: tuple[SpanKind, ...] = get_args(SpanKind)

MAX_STOPS = 64
MAX_STOP_BYTES = 1024
"""Of one stop string, in UTF-8."""
MAX_STOP_TOKENS = 256


@dataclass(frozen=True, slots=True)
class TopK:
    """The teacher's distribution at each completion position: the kept entries and the rest's mass.

    Row t is the distribution from which completion token t was, or would be, drawn. Entries are
    sorted by logprob, descending. An entry at -inf is padding: a position that keeps fewer than K.
    """

    token_ids: Int32Array
    """Shape [T, K]; 0 where padded."""
    logprobs: Float32Array
    """Natural log probabilities, shape [T, K]; -inf where padded."""
    tail_mass: Float32Array
    """Probability outside the kept entries, shape [T], in [0, 1]."""
    tail_draws: Int32Array | None = None
    """Tokens drawn from the tail, shape [T, D]; None: not drawn.

    D independent draws, with replacement, from the teacher's distribution over the tokens that the row does
    not keep: each stands for tail_mass / D. All D of a row are −1 where it has no tail to draw from, or where
    nothing was drawn from it. Their order says nothing, and is not kept by the codec.
    """

    @property
    def positions(self) -> int:
        """T."""
        return int(self.token_ids.shape[0])

    @property
    def k(self) -> int:
        """K."""
        return int(self.token_ids.shape[1])

    @property
    def tail_draw_count(self) -> int:
        """D; 0 where nothing was drawn from the tails."""
        return 0 if self.tail_draws is None else int(self.tail_draws.shape[1])


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A run of completion tokens of one kind."""

    kind: SpanKind
    start: int
    """First completion position of the span."""
    end: int
    """One past its last position."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the completion was drawn.

    Recorded distributions and logprobs are those of the model itself, before all of this.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    max_tokens: int = 0
    """Bound on the completion, tokens; 0 when unknown."""
    seed: int | None = None
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the completion has so far, once; -2 to 2."""
    frequency_penalty: float = 0.0
    """The same for each time that it has it; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that prompt or completion have so far;
    above 0."""
    min_tokens: int = 0
    """Tokens before which nothing of what follows ends the completion, nor an end token."""
    stop: tuple[str, ...] = ()
    """Texts of which the first one to appear ends the completion; at most MAX_STOPS."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end it as its end tokens do; at most MAX_STOP_TOKENS."""

    def is_plain(self, temperature: float) -> bool:
        """Whether each token was drawn from the model's whole distribution at a temperature, and no other."""
        plain = SamplingParams(
            self.temperature,
            max_tokens=self.max_tokens,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
        )
        return self == plain and math.isclose(self.temperature, temperature, rel_tol=1e-6)


@dataclass(frozen=True, slots=True)
class Trace:
    """One prompt, one completion, and the teacher's distribution at each completion position."""

    prompt_id: str
    """Names the prompt in its job; at most 256 bytes of UTF-8."""
    prompt_token_ids: Int32Array
    """Shape [P]."""
    completion_token_ids: Int32Array
    """Shape [T]; includes the end token where the model wrote one."""
    sampled_logprobs: Float32Array
    """Logprob of each completion token under the same distribution as `top_k`, shape [T]."""
    top_k: TopK
    """T positions; K may be 0."""
    finish_reason: FinishReason
    sample_index: int = 0
    """Which of the completions asked for one prompt."""
    spans: tuple[TokenSpan, ...] = ()
    """Ascending, without overlap; empty where the model marks nothing."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    completion_text: str = ""
    """The completion as text, for readers without the tokenizer; empty when not recorded. It holds the stop
    string that ended it, as the tokens do."""
    stop_string: str = ""
    """Which of `sampling.stop` ended the completion. Empty: none did; an end or stop token that did is the
    last of `completion_token_ids`."""
    prompt_top_k: TopK | None = None
    """The teacher's distributions over the prompt, where they were scored: P − 1 positions; row i is the
    distribution of prompt token i + 1."""
    prompt_logprobs: Float32Array | None = None
    """Logprob of prompt tokens 1 to P − 1 under those, shape [P − 1]; present with `prompt_top_k`."""
    hidden: HiddenStates | None = None
    """The teacher's hidden states at the T completion positions, where they were captured."""

    def __post_init__(self) -> None:
        """Refuse shapes that contradict each other, NaN, and spans out of place.

        Raises:
            CodecError: naming the prompt and the field.
        """
        positions = self.completion_token_ids.shape[0]
        shapes = {
            "prompt_token_ids": (self.prompt_token_ids, (self.prompt_token_ids.size,)),
            "completion_token_ids": (self.completion_token_ids, (positions,)),
            "sampled_logprobs": (self.sampled_logprobs, (positions,)),
            "top_k.token_ids": (self.top_k.token_ids, (positions, self.top_k.k)),
            "top_k.logprobs": (self.top_k.logprobs, (positions, self.top_k.k)),
            "top_k.tail_mass": (self.top_k.tail_mass, (positions,)),
        }
        drawn = self.top_k.tail_draws
        draws = drawn.shape[1] if drawn is not None and drawn.ndim == 2 else 1
        if drawn is not None:
            shapes["top_k.tail_draws"] = (drawn, (positions, max(draws, 1)))
        if (self.prompt_top_k is None) != (self.prompt_logprobs is None):
            raise self._error("prompt_top_k and prompt_logprobs come together, or not at all")
        if self.prompt_top_k is not None and self.prompt_logprobs is not None:
            rows = max(self.prompt_token_ids.size - 1, 0)
            shapes |= {
                "prompt_logprobs": (self.prompt_logprobs, (rows,)),
                "prompt_top_k.token_ids": (self.prompt_top_k.token_ids, (rows, self.prompt_top_k.k)),
                "prompt_top_k.logprobs": (self.prompt_top_k.logprobs, (rows, self.prompt_top_k.k)),
                "prompt_top_k.tail_mass": (self.prompt_top_k.tail_mass, (rows,)),
            }
            if (self.prompt_top_k.tail_draws is None) != (self.top_k.tail_draws is None):
                raise self._error("rows of prompt and completion have tail draws, or neither has")
            if self.prompt_top_k.tail_draws is not None:
                shapes["prompt_top_k.tail_draws"] = (self.prompt_top_k.tail_draws, (rows, draws))
        for name, (array, expected) in shapes.items():
            if array.shape != expected:
                raise self._error(f"{name} has shape {array.shape}, expected {expected}")
            if array.dtype != (np.int32 if name.endswith(("ids", "draws")) else np.float32):
                raise self._error(f"{name} has dtype {array.dtype}")
            if array.dtype == np.float32 and np.isnan(array).any():
                raise self._error(f"{name} holds NaN")
        if self.hidden is not None and self.hidden.positions != positions:
            raise self._error(f"hidden has {self.hidden.positions} positions, expected {positions}")
        if self.finish_reason not in FINISH_REASONS:
            raise self._error(f"finish_reason {self.finish_reason!r} is none of {FINISH_REASONS}")
        if self.stop_string and (self.finish_reason != "stop" or self.stop_string not in self.sampling.stop):
            raise self._error(f"stop_string {self.stop_string!r} is none that could have ended it")
        last = 0
        for span in self.spans:
            if not last <= span.start < span.end <= positions or span.kind not in SPAN_KINDS:
                raise self._error(f"span {span} overlaps its neighbour or leaves 0..{positions}")
            last = span.end

    def _error(self, what: str) -> CodecError:
        return CodecError(f"trace of prompt {self.prompt_id!r}: {what}")


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """Position in a stream: the next trace to use is number `trace_index` of block `offset`."""

    offset: int = 0
    trace_index: int = 0
