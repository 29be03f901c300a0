"""Scoring: the teacher's distributions over completions that a student wrote.

A scoring request is a prompt of vLLM's that ends before the completion's last token: every row that is wanted
follows from what is in it. It generates one token, which is thrown away. The rows come out of the worker
(`lynearm.teacher.scoring_rows`); where vLLM's worker does not look as expected, `prompt_logprobs` takes its
place, which knows neither chosen ids nor temperatures, and computes the prompt's rows too.

Shape legend: P = prompt tokens, T = completion positions, K = kept entries, S = chosen ids per position.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lynearm.teacher.prefix_reuse import PREFIX_LIMIT_KEY, limit_prefix_reuse
from lynearm.teacher.scoring_rows import ROWS_KEY, RowsWanted, ScoredRows, ScoringCounts
from lynearm.wire.errors import InvalidInputError, PreconditionError, PromptTooLongError, TeacherError
from lynearm.wire.traces import Float32Array, Int32Array, TopK

logger = logging.getLogger(__name__)

Untyped: TypeAlias = Any
"""An object of vLLM, which ships no types that a strict checker accepts."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoreTask:
    """A completion to be scored."""

    request_id: str
    prompt_token_ids: Int32Array
    """Shape [P], P at least 1."""
    completion_token_ids: Int32Array
    """Shape [T]; T may be 0."""
    top_k: int = 0
    """Entries kept per position."""
    chosen_ids: Int32Array | None = None
    """Ids whose logprobs are wanted at each position, shape [T, S]; None for none."""
    temperature: float = 1.0
    """Divides the logits before the distribution is taken, over the whole vocabulary."""
    tail_draws: int = 0
    """Tokens drawn from what is not kept of each position's distribution."""


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """What the teacher thinks of a completion."""

    request_id: str
    sampled_logprobs: Float32Array
    """Of the completion's own tokens, shape [T]."""
    top_k: TopK
    chosen_logprobs: Float32Array
    """At the chosen ids, shape [T, S]."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""


class EngineScoring:
    """Scoring requests of one vLLM engine, beside its other requests; on the engine's thread.

    Args:
        engine: vLLM's LLMEngine.
        vocab_size: Width of the logits.
        max_model_len: Longest prompt plus completion, tokens.
        gather: Take rows in the worker where it allows; False uses `prompt_logprobs`.
    """

    def __init__(self, engine: Untyped, *, vocab_size: int, max_model_len: int, gather: bool = True) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._gather = gather
        self._is_installed = False
        self._reuses_prefixes = False
        self._running: dict[str, ScoreTask] = {}
        self._finished: list[Score] = []

    @property
    def gathers(self) -> bool:
        """Whether chosen ids and temperatures can be scored, and tails be drawn from."""
        self._install()
        return self._gather

    @property
    def counts(self) -> ScoringCounts:
        """What scoring has cost so far."""
        if not self.gathers:
            return ScoringCounts()
        found: list[ScoringCounts] = self._engine.collective_rpc("lynearm_scoring_counts")
        return found[0]

    def add(self, task: ScoreTask) -> None:
        """Queue a task; its score comes out of `take_finished`.

        Raises:
            InvalidInputError: if ids are outside the vocabulary, or shapes do not fit together.
            PromptTooLongError: if prompt and completion exceed the context.
            PreconditionError: if this vLLM cannot score what is asked for.
            TeacherError: if vLLM refuses it.
        """
        check_task(task, vocab_size=self._vocab_size, max_model_len=self._max_model_len)
        if not task.completion_token_ids.size:
            self._finished.append(_join(task, ScoredRows.empty(_rows_wanted(task))))
            return
        self._install()
        token_ids, parameters = self._gathering(task) if self._gather else self._public(task)
        try:
            self._engine.add_request(task.request_id, {"prompt_token_ids": token_ids}, parameters)
        except ValueError as error:
            raise TeacherError(f"vLLM refuses request {task.request_id!r}: {error}") from error
        self._running[task.request_id] = task

    def take(self, outputs: Sequence[Untyped]) -> list[Untyped]:
        """Keep what a step has brought for scoring requests; what it has brought for others."""
        if not self._running:
            return list(outputs)
        others: list[Untyped] = []
        ended: list[tuple[ScoreTask, Untyped]] = []
        for output in outputs:
            task = self._running.get(str(output.request_id))
            if task is None:
                others.append(output)
            elif output.finished:
                del self._running[task.request_id]
                ended.append((task, output))
        if ended:
            self._finished += self._scores(ended)
        return others

    def take_finished(self) -> list[Score]:
        """The scores that are ready and were not taken yet."""
        finished, self._finished = self._finished, []
        return finished

    def drop(self, request_ids: Sequence[str]) -> None:
        """Forget requests that the engine was told to abort."""
        dropped = [request_id for request_id in request_ids if self._running.pop(request_id, None)]
        if dropped and self._gather:
            self._engine.collective_rpc("lynearm_drop_scores", args=(dropped,))

    def _install(self) -> None:
        if self._is_installed:
            return
        self._is_installed = True
        if self._gather:
            self._gather = all(self._engine.collective_rpc("lynearm_install_scoring"))
            if not self._gather:
                logger.warning(
                    "this vLLM's worker is not known: scoring takes its slower prompt logprobs, without "
                    "chosen ids, temperatures and draws from the tail"
                )
        self._reuses_prefixes = self._gather and limit_prefix_reuse()

    def _gathering(self, task: ScoreTask) -> tuple[list[int], Untyped]:
        wanted = _rows_wanted(task)
        extra: dict[str, object] = {ROWS_KEY: wanted}
        if self._reuses_prefixes:
            extra[PREFIX_LIMIT_KEY] = wanted.first
        parameters = _parameters(extra_args=extra, skip_reading_prefix_cache=not self._reuses_prefixes)
        return [*task.prompt_token_ids.tolist(), *task.completion_token_ids[:-1].tolist()], parameters

    def _public(self, task: ScoreTask) -> tuple[list[int], Untyped]:
        has_chosen = task.chosen_ids is not None and task.chosen_ids.size > 0
        if task.temperature != 1.0 or has_chosen or task.tail_draws:
            raise PreconditionError(
                "this teacher's vLLM scores neither chosen ids nor temperatures other than 1, and draws from "
                "no tail",
                "use the vLLM release that lynearm names, or ask for top_k alone",
            )
        parameters = _parameters(prompt_logprobs=task.top_k, flat_logprobs=True)
        return [*task.prompt_token_ids.tolist(), *task.completion_token_ids.tolist()], parameters

    def _scores(self, ended: Sequence[tuple[ScoreTask, Untyped]]) -> list[Score]:
        if not self._gather:
            return [_join(task, _public_rows(task, output)) for task, output in ended]
        keys = [task.request_id for task, _ in ended]
        by_worker: list[dict[str, ScoredRows]] = self._engine.collective_rpc(
            "lynearm_take_scores", args=(keys,)
        )
        found = {key: rows for of_worker in by_worker for key, rows in of_worker.items()}
        missing = [key for key in keys if key not in found or not all(found[key].is_filled)]
        if missing:
            raise TeacherError(f"vLLM ended request {missing[0]!r} without all of its rows")
        return [
            _join(task, found[task.request_id], int(output.num_cached_tokens or 0)) for task, output in ended
        ]


def check_task(task: ScoreTask, *, vocab_size: int, max_model_len: int) -> None:
    """Refuse a task that cannot be scored.

    Raises:
        InvalidInputError: if ids are outside the vocabulary, or shapes do not fit together.
        PromptTooLongError: if prompt and completion exceed the context.
    """
    positions, prompt = task.completion_token_ids.size, task.prompt_token_ids.size
    where = f"request {task.request_id!r}"
    if not prompt:
        raise InvalidInputError(
            f"{where} has an empty prompt", "the first token has no distribution: give at least one before it"
        )
    if prompt + positions > max_model_len:
        raise PromptTooLongError(
            f"{where} has {prompt} prompt tokens and {positions} of the completion, "
            f"the context {max_model_len}",
            "shorten it, or serve the teacher with a larger max_model_len",
        )
    if not 0 <= task.top_k <= vocab_size:
        raise InvalidInputError(f"{where}: top_k {task.top_k} is outside 0..{vocab_size}")
    if not 0 < task.temperature < float("inf"):
        raise InvalidInputError(
            f"{where}: temperature {task.temperature} is not above 0", "1 is the model itself"
        )
    chosen = task.chosen_ids
    if chosen is not None and (chosen.ndim != 2 or chosen.shape[0] != positions):
        raise InvalidInputError(
            f"{where}: chosen ids of shape {chosen.shape} for {positions} positions, expected [T, S]"
        )
    parts = {"prompt": task.prompt_token_ids, "completion": task.completion_token_ids, "chosen": chosen}
    for name, ids in parts.items():
        if ids is not None and ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
            worst = int(ids.max()) if ids.max() >= vocab_size else int(ids.min())
            raise InvalidInputError(
                f"{where}: {name} token id {worst} is outside the vocabulary of {vocab_size}",
                "use the teacher's own tokenizer",
            )


def _rows_wanted(task: ScoreTask) -> RowsWanted:
    positions = task.completion_token_ids.size
    chosen = np.zeros((positions, 0), np.int32) if task.chosen_ids is None else task.chosen_ids
    first = task.prompt_token_ids.size - 1
    return RowsWanted(
        task.request_id,
        first,
        task.completion_token_ids,
        task.top_k,
        task.temperature,
        chosen,
        task.tail_draws,
    )


def _parameters(**options: object) -> Untyped:
    from vllm import SamplingParams as EngineSampling
    from vllm.sampling_params import RequestOutputKind

    make: Untyped = EngineSampling
    return make(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        # Ours alone: vLLM need not copy the arrays.
        skip_clone=True,
        **options,
    )


def _public_rows(task: ScoreTask, output: Untyped) -> ScoredRows:
    """The completion's rows of vLLM's flat prompt logprobs: the token itself first, then the top K."""
    rows = ScoredRows.empty(_rows_wanted(task))
    flat: Untyped = output.prompt_logprobs
    for row in range(task.completion_token_ids.size):
        position = task.prompt_token_ids.size + row
        begin, end = int(flat.start_indices[position]), int(flat.end_indices[position])
        if end - begin != task.top_k + 1 or flat.token_ids[begin] != task.completion_token_ids[row]:
            raise TeacherError(f"vLLM returned other prompt logprobs than request {task.request_id!r} needs")
        rows.target_logprobs[row] = flat.logprobs[begin]
        rows.token_ids[row] = flat.token_ids[begin + 1 : end]
        rows.logprobs[row] = flat.logprobs[begin + 1 : end]
    return rows


def _join(task: ScoreTask, rows: ScoredRows, cached_tokens: int = 0) -> Score:
    if np.isnan(rows.logprobs).any() or np.isnan(rows.target_logprobs).any():
        raise TeacherError(f"vLLM returned logprobs that are NaN for request {task.request_id!r}")
    kept_mass = np.exp(rows.logprobs.astype(np.float64)).sum(axis=1)
    tail_mass = np.clip(1.0 - kept_mass, 0.0, 1.0).astype(np.float32)
    return Score(
        task.request_id,
        rows.target_logprobs,
        TopK(rows.token_ids, rows.logprobs, tail_mass, rows.tail_ids if task.tail_draws else None),
        rows.chosen_logprobs,
        cached_tokens,
    )
