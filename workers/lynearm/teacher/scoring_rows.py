"""Inside vLLM's worker: the teacher's distributions over tokens that somebody else wrote.

A scoring request carries what it wants (`RowsWanted`) in its sampling parameters. As its tokens pass through
the model, the hidden states of the wanted rows, and of no others, are turned into distributions. Requests of
one step share a multiplication by the output matrix, and no more than `MAX_CHUNK_BYTES` of logits exist at a
time, however long an input is.

It stands before one private method of vLLM's V1 model runner, and only in a known version, where that looks
as expected.

Shape legend: N = rows of a chunk, T = rows of a request, K = kept entries, S = chosen ids, V = vocabulary,
D = draws from a row's tail.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np

from lynearm.teacher.distributions import logprobs_at, temper, top_logprobs
from lynearm.teacher.vllm_internals import version_problem
from lynearm.wire.traces import Float32Array, Int32Array

Untyped: TypeAlias = Any
"""An object of vLLM or torch, which ship no types that a strict checker accepts."""

ROWS_KEY = "lynearm_rows_wanted"
"""Under which a request's extra arguments hold its `RowsWanted`."""

MAX_CHUNK_BYTES = 64 << 20
"""Of float32 logits at a time; their logarithms take as much again."""


@dataclass(frozen=True, slots=True)
class RowsWanted:
    """Which rows of a request are wanted, and what of each."""

    key: str
    """Names the request; unique in the engine."""
    first: int
    """Position of the first row; row t is the distribution after the token at position first + t."""
    target_ids: Int32Array
    """The token that follows each row, shape [T]."""
    top_k: int
    temperature: float
    chosen_ids: Int32Array
    """Ids whose logprobs are wanted at each row, shape [T, S]; S may be 0."""
    tail_draws: int = 0
    """Tokens to draw from what is not kept of each row, D."""


@dataclass(slots=True)
class ScoredRows:
    """What is known of a request's rows."""

    token_ids: Int32Array
    """Shape [T, K], descending by logprob."""
    logprobs: Float32Array
    """Shape [T, K]."""
    target_logprobs: Float32Array
    """Shape [T]."""
    chosen_logprobs: Float32Array
    """Shape [T, S]."""
    tail_ids: Int32Array
    """Shape [T, D]; -1 in rows that keep everything."""
    is_filled: list[bool] = field(default_factory=list[bool])
    """By row. A row is computed twice where vLLM let go of a request and began it anew."""

    @classmethod
    def empty(cls, wanted: RowsWanted) -> ScoredRows:
        """Rows of which nothing is known yet."""
        rows, chosen = wanted.chosen_ids.shape
        return cls(
            np.zeros((rows, wanted.top_k), np.int32),
            np.zeros((rows, wanted.top_k), np.float32),
            np.zeros((rows,), np.float32),
            np.zeros((rows, chosen), np.float32),
            np.full((rows, wanted.tail_draws), -1, np.int32),
            [False] * rows,
        )


@dataclass(frozen=True, slots=True)
class _Segment:
    """Consecutive rows of one request in one step."""

    wanted: RowsWanted
    first_row: int
    """In the request."""
    first_state: int
    """In the step's hidden states."""
    count: int


@dataclass(slots=True)
class ScoringCounts:
    """What scoring has cost in this worker."""

    rows: int = 0
    """Rows that were turned into distributions."""
    most_rows: int = 0
    """Rows that existed at the same time."""


class ScoringWorker:
    """Base class of `WorkerExtension`: scoring."""

    # vLLM's own, in the class that this one is mixed into.
    model_runner: Untyped

    def lynearm_install_scoring(self) -> bool:
        """Begin to serve scoring requests; False where this vLLM does not look as expected."""
        runner = self.model_runner
        if version_problem() or not _looks_as_expected(runner):
            return False
        if getattr(runner._get_prompt_logprobs_dict, "serves_scoring", False):
            return True
        self._lynearm_scores: dict[str, ScoredRows] = {}
        self._lynearm_counts = ScoringCounts()
        self._lynearm_chance: Untyped = None
        original: Callable[..., Untyped] = runner._get_prompt_logprobs_dict

        def get_prompt_logprobs_dict(
            hidden_states: Untyped, num_scheduled_tokens: Mapping[str, int]
        ) -> Untyped:
            self._lynearm_score(hidden_states, num_scheduled_tokens)
            return original(hidden_states, num_scheduled_tokens)

        replacement: Untyped = get_prompt_logprobs_dict
        replacement.serves_scoring = True
        runner._get_prompt_logprobs_dict = replacement
        return True

    def lynearm_take_scores(self, keys: Sequence[str]) -> dict[str, ScoredRows]:
        """The rows of requests that have finished; they are forgotten here."""
        found = {key: self._lynearm_scores.pop(key, None) for key in keys}
        return {key: rows for key, rows in found.items() if rows is not None}

    def lynearm_drop_scores(self, keys: Sequence[str]) -> None:
        """Forget requests that were aborted."""
        for key in keys:
            self._lynearm_scores.pop(key, None)

    def lynearm_scoring_counts(self) -> ScoringCounts:
        """What scoring has cost so far."""
        return self._lynearm_counts

    def _lynearm_score(self, hidden_states: Untyped, num_scheduled_tokens: Mapping[str, int]) -> None:
        segments = list(_segments(self.model_runner, num_scheduled_tokens))
        vocab_size = int(self.model_runner.model_config.get_vocab_size())
        for chunk in _chunks(segments, max(1, MAX_CHUNK_BYTES // (4 * vocab_size))):
            logits_NV = self.model_runner.model.compute_logits(_states_of(hidden_states, chunk))
            if logits_NV is None:  # another worker of a tensor-parallel group has them
                return
            rows = int(logits_NV.shape[0])
            self._lynearm_counts.rows += rows
            self._lynearm_counts.most_rows = max(self._lynearm_counts.most_rows, rows)
            logits_NV = temper(logits_NV, chunk[0].wanted.temperature)
            begin = 0
            for segment in chunk:
                end = begin + segment.count
                found = self._lynearm_scores.get(segment.wanted.key)
                if found is None:
                    found = self._lynearm_scores[segment.wanted.key] = ScoredRows.empty(segment.wanted)
                _fill(found, segment, logits_NV[begin:end], self._lynearm_chances(segment, logits_NV.device))
                begin = end

    def _lynearm_chances(self, segment: _Segment, device: Untyped) -> Untyped:
        """One for each draw from the tails of a segment's rows, [T, D]; None without any."""
        if not segment.wanted.tail_draws:
            return None
        import torch

        if self._lynearm_chance is None:
            self._lynearm_chance = torch.Generator(device)
            self._lynearm_chance.manual_seed(0)
        shape = (segment.count, segment.wanted.tail_draws)
        return torch.rand(shape, dtype=torch.float64, device=device, generator=self._lynearm_chance)


def _segments(runner: Untyped, num_scheduled_tokens: Mapping[str, int]) -> Iterator[_Segment]:
    """The wanted rows among the tokens of a step."""
    for request_id, scheduled in num_scheduled_tokens.items():
        request = runner.requests[request_id]
        wanted = _wanted_by(request)
        if wanted is None:
            continue
        start = int(request.num_computed_tokens)
        begin = max(start, wanted.first)
        end = min(start + int(scheduled), wanted.first + wanted.target_ids.size)
        if begin < end:
            index = runner.input_batch.req_id_to_index[request_id]
            offset = int(runner.query_start_loc.np[index]) + begin - start
            yield _Segment(wanted, begin - wanted.first, offset, end - begin)


def _wanted_by(request: Untyped) -> RowsWanted | None:
    extra = getattr(request.sampling_params, "extra_args", None)
    found = extra.get(ROWS_KEY) if extra else None
    return found if isinstance(found, RowsWanted) else None


def _chunks(segments: Sequence[_Segment], most_rows: int) -> Iterator[list[_Segment]]:
    """The segments in groups of one temperature and at most that many rows; longer ones are cut."""
    by_temperature = sorted(segments, key=lambda segment: segment.wanted.temperature)
    for _, alike in groupby(by_temperature, key=lambda segment: segment.wanted.temperature):
        chunk: list[_Segment] = []
        room = most_rows
        for segment in alike:
            done = 0
            while done < segment.count:
                count = min(room, segment.count - done)
                chunk.append(
                    _Segment(segment.wanted, segment.first_row + done, segment.first_state + done, count)
                )
                done, room = done + count, room - count
                if not room:
                    yield chunk
                    chunk, room = [], most_rows
        if chunk:
            yield chunk


def _states_of(hidden_states: Untyped, chunk: Sequence[_Segment]) -> Untyped:
    """The hidden states at the rows of a chunk, shape [N, width]."""
    import torch

    if len(chunk) == 1:
        only = chunk[0]
        return hidden_states[only.first_state : only.first_state + only.count]
    places = [np.arange(one.first_state, one.first_state + one.count) for one in chunk]
    return hidden_states[torch.as_tensor(np.concatenate(places), device=hidden_states.device)]


def _fill(found: ScoredRows, segment: _Segment, logits_TV: Untyped, chances_TD: Untyped) -> None:
    """Take what is wanted out of the distributions at a segment's rows."""
    import torch

    wanted = segment.wanted
    rows = slice(segment.first_row, segment.first_row + segment.count)
    logprobs_TK, token_ids_TK, normalisers_T1, drawn_TD = top_logprobs(
        logits_TV, wanted.top_k, chances_ND=chances_TD
    )

    def logprobs_of(ids: Int32Array) -> Untyped:
        index = torch.as_tensor(ids.astype(np.int64), device=logits_TV.device)
        return logprobs_at(logits_TV, index, normalisers_T1).cpu().numpy()

    found.target_logprobs[rows] = logprobs_of(wanted.target_ids[rows, None])[:, 0]
    if wanted.chosen_ids.shape[1]:
        found.chosen_logprobs[rows] = logprobs_of(wanted.chosen_ids[rows])
    if wanted.top_k:
        found.logprobs[rows] = logprobs_TK.cpu().numpy()
        found.token_ids[rows] = token_ids_TK.cpu().numpy()
    if wanted.tail_draws:
        found.tail_ids[rows] = drawn_TD.cpu().numpy()
    found.is_filled[rows] = [True] * segment.count


def _looks_as_expected(runner: Untyped) -> bool:
    method = getattr(runner, "_get_prompt_logprobs_dict", None)
    needed = ("requests", "input_batch", "query_start_loc", "model", "model_config")
    return (
        callable(method)
        and list(inspect.signature(method).parameters) == ["hidden_states", "num_scheduled_tokens"]
        and all(hasattr(runner, name) for name in needed)
        and hasattr(runner.input_batch, "req_id_to_index")
        and hasattr(runner.query_start_loc, "np")
        and hasattr(runner.model, "compute_logits")
    )
