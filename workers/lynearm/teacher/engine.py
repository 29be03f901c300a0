"""A vLLM engine in this process: token ids in, completions with their distributions out.

Everything here runs on one thread. Completions come out whole, in the order in which they finish.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lynearm.teacher.capture import CaptureReport, CaptureWish
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.draws import draw_rows, keep_and_draw
from lynearm.teacher.engine_sampling import engine_sampling, leave_candidates_as_ids
from lynearm.teacher.engine_start import (
    engine_arguments,
    import_vllm,
    set_engine_environment,
    shield_llvmlite,
)
from lynearm.teacher.inside import LookInside, check_block_room
from lynearm.teacher.inside_options import HiddenCapture, LayerStats, parse_capture, parse_stats
from lynearm.teacher.logprob_arrays import (
    LogprobRows,
    RowArrays,
    collect_as_arrays,
    rows_of,
    top_k_from_rows,
)
from lynearm.teacher.model_source import prepare_model
from lynearm.teacher.scoring import EngineScoring
from lynearm.teacher.tokenizer import PromptTokenizer, describe_tokenizer, end_tokens
from lynearm.teacher.vllm_internals import say_slower
from lynearm.teacher.weight_refresh import refresh_weights
from lynearm.wire.errors import ConfigError, LynearmError, TeacherError
from lynearm.wire.hidden import HiddenStates, HiddenStatesSpec
from lynearm.wire.profiles import LayerStatistics
from lynearm.wire.specs import TeacherSpec, TokenizerSpec
from lynearm.wire.traces import (
    FINISH_REASONS,
    FinishReason,
    Float32Array,
    Int32Array,
    SamplingParams,
    TopK,
)
from lynearm.wire.weight_files import weights_revision

logger = logging.getLogger(__name__)

Untyped: TypeAlias = Any
"""An object of vLLM or transformers, which ship no types that a strict checker accepts."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request."""

    request_id: str
    token_ids: Int32Array
    """Shape [T]; includes the end token where the model wrote one."""
    sampled_logprobs: Float32Array
    """Shape [T]."""
    top_k: TopK
    finish_reason: FinishReason
    stop_string: str = ""
    """Which of the sampling's stop strings ended it; the last token completed it. Empty: none did."""
    hidden: HiddenStates | None = None
    """At the T positions; None unless they are captured."""


class TeacherEngine:
    """One loaded model. Make at most one per process: vLLM gives memory back only at exit.

    Args:
        config: What to load and how to sample.
        arrays: Take logprobs out of vLLM as arrays where it allows; False reads its flat lists.

    Raises:
        MissingDependencyError: without vLLM.
        ConfigError: if the model cannot be loaded with this config.
    """

    def __init__(self, config: TeachConfig, *, arrays: bool = True) -> None:
        set_engine_environment(config)
        prepared = prepare_model(config)
        name = config.model_name or Path(config.model).name
        config = replace(config, model=str(prepared.directory), model_name=name)
        self._revision = prepared.revision
        engine_args, llm_engine, self._vllm_version = import_vllm()
        self._config = config
        self._generator = np.random.default_rng(config.seed)
        self._restore: Callable[[], None] | None = None
        shield_llvmlite()
        try:
            arguments = engine_arguments(config)
            self._engine: Untyped = llm_engine.from_engine_args(engine_args(**arguments))
        except LynearmError:
            raise  # Among them are ValueErrors.
        except (ValueError, OSError, RuntimeError) as error:
            raise ConfigError(f"cannot load teacher {config.model!r}: {_first_line(error)}") from error
        draws_inside = self._start_capture(fast=arrays)
        draws_outside = not draws_inside and max(config.draws, config.tail_draws) > 0
        self._reduce = self._draw if draws_outside else None
        if arrays:
            self._restore = collect_as_arrays(self._reduce)
        model_config: Untyped = self._engine.model_config
        self.vocab_size = int(model_config.get_vocab_size())
        self.max_model_len = int(model_config.max_model_len)
        self.top_k = min(config.draws or config.top_k, self.vocab_size)
        """Entries of a row at most."""
        self._logprob_count = self.vocab_size if draws_outside else self.top_k + config.tail_draws
        self._dtype = str(model_config.dtype).removeprefix("torch.")
        self._raw_tokenizer: Untyped = self._engine.get_tokenizer()
        self.tokenizer = PromptTokenizer(
            self._raw_tokenizer, config, max_model_len=self.max_model_len, vocab_size=self.vocab_size
        )
        self.eos_token_ids = end_tokens(prepared.directory, self._raw_tokenizer)
        self.scoring = EngineScoring(
            self._engine, vocab_size=self.vocab_size, max_model_len=self.max_model_len
        )
        """Scores completions of others in the same batches."""
        self.streamed_token_ids: dict[str, list[int]] = {}
        """All tokens so far of the streamed requests that the last step went on with, and did not finish."""
        self._own_top_k: dict[str, int] = {}
        """Entries of a row of requests that do not want the engine's `top_k`."""
        self._finished_tokens = 0
        self._rows_before = LogprobRows.rows_seen
        self._inside: LookInside | None = None
        self.look_inside(parse_capture(config.capture), parse_stats(config.stats))

    @property
    def unfinished(self) -> int:
        """Requests that are queued or running."""
        return int(self._engine.get_num_unfinished_requests())

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far; without arrays, those of finished requests."""
        return max(self._finished_tokens, LogprobRows.rows_seen - self._rows_before)

    @property
    def hidden(self) -> HiddenStatesSpec | None:
        """The hidden states that completions come with; None: none."""
        return None if self._inside is None else self._inside.spec

    def look_inside(self, capture: HiddenCapture | None, stats: LayerStats | None) -> None:
        """Capture and measure this from now on, in place of what was asked for before; only between requests.

        Raises:
            ConfigError: if this vLLM or this model cannot be looked into, or completions with their hidden
                states may not fit into a block.
        """
        if self._inside is not None:
            self._inside.close()
            self._inside = None
        if capture is not None or stats is not None:
            self._inside = LookInside(self._engine, capture, stats)
        if self.hidden is not None:
            check_block_room(self._config, self.hidden)

    def take_statistics(self) -> Mapping[int, LayerStatistics]:
        """What was measured of each layer since the last call."""
        return {} if self._inside is None else self._inside.take_statistics()

    def describe(self) -> tuple[TeacherSpec, TokenizerSpec]:
        """Who the teacher is, and whose tokenizer it uses. Reads the weight files once, for their digest."""
        name = self._config.model_name
        teacher = TeacherSpec(
            model=name,
            revision=self._revision or weights_revision(Path(self._config.model)),
            engine=f"vllm {self._vllm_version}",
            dtype=self._dtype,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            logprobs_temperature=self._config.logprobs_temperature,
        )
        return teacher, describe_tokenizer(self._raw_tokenizer, name, self.eos_token_ids)

    def sampling(self, prompt_id: str, sample_index: int, prompt_tokens: int) -> SamplingParams:
        """How one completion is to be drawn."""
        config = self._config
        max_tokens = min(config.max_tokens, self.max_model_len - prompt_tokens)
        return replace(
            config.sampling(),
            max_tokens=max_tokens,
            min_tokens=min(config.min_tokens, max_tokens),
            seed=None if config.seed is None else completion_seed(config.seed, prompt_id, sample_index),
        )

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        streamed: bool = False,
        top_k: int | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request_id: Unique among the requests that are not finished.
            prompt_token_ids: At least one.
            sampling: How to draw.
            streamed: Show its tokens in `streamed_token_ids` as they come.
            top_k: Entries of its rows, at most the engine's `top_k`; None: as many.

        Raises:
            TeacherError: if vLLM refuses it.
        """
        logprobs = self._logprob_count if top_k is None else top_k
        parameters = engine_sampling(sampling, logprobs, streamed=streamed)
        prompt = {"prompt_token_ids": [int(token_id) for token_id in prompt_token_ids]}
        try:
            internal_id = self._engine.add_request(request_id, prompt, parameters)
        except ValueError as error:
            raise TeacherError(f"vLLM refuses request {request_id!r}: {_first_line(error)}") from error
        if sampling.stop:
            leave_candidates_as_ids(self._engine, str(internal_id))
        if top_k is not None:
            self._own_top_k[request_id] = top_k
        if self._inside is not None:
            self._inside.begin(request_id, str(internal_id))

    def step(self) -> list[Completion]:
        """Generate one token for each running request, and return those that finished."""
        outputs = self.scoring.take(self._engine.step())
        if self._inside is not None:
            self._inside.collect()
        self.streamed_token_ids = {
            str(output.request_id): list(output.outputs[0].token_ids)
            for output in outputs
            if not output.finished
        }
        return [self._completion(output) for output in outputs if output.finished]

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; nothing of them comes out of `step`."""
        self._engine.abort_request(list(request_ids))
        self.scoring.drop(request_ids)
        for request_id in request_ids:
            self._own_top_k.pop(request_id, None)
            if self._inside is not None:
                self._inside.drop(request_id)

    def refresh(self, directory: Path) -> None:
        """Take the weights of another checkpoint of the same model; only between requests.

        Raises:
            PreconditionError, TeacherError: as for `refresh_weights`.
        """
        refresh_weights(self._engine, directory)

    def close(self) -> None:
        """Undo the changes to vLLM's logprob collection."""
        if self._restore is not None:
            self._restore()
            self._restore = None
        self._engine.collective_rpc("lynearm_capture_as_vllm")

    def _start_capture(self, *, fast: bool) -> bool:
        """Have vLLM record distributions at the stream's temperature, cheaply where it allows.

        Returns:
            Whether it records draws; else they are taken from whole distributions.

        Raises:
            ConfigError: if this vLLM cannot record at that temperature.
        """
        temperature = self._config.logprobs_temperature
        if not fast and temperature == 1:
            return False
        wish = CaptureWish(
            temperature,
            self._config.draws if fast else 0,
            self._config.tail_draws if fast else 0,
            self._config.seed or 0,
        )
        reports: list[CaptureReport] = self._engine.collective_rpc("lynearm_capture", args=(wish,))
        problem = next((report.problem for report in reports if report.problem), "")
        if not all(report.has_temperature for report in reports):
            raise ConfigError(
                f"vllm {self._vllm_version} cannot record logprobs at temperature {temperature:g}: {problem}",
                "record at temperature 1, or install the version of vLLM that this package asks for",
            )
        if problem:
            say_slower(problem)
        return all(report.has_draws for report in reports)

    def _completion(self, output: Untyped) -> Completion:
        made: Untyped = output.outputs[0]
        token_ids = [int(token_id) for token_id in made.token_ids]
        self._finished_tokens += len(token_ids)
        own_top_k = self._own_top_k.pop(str(output.request_id), None)
        if own_top_k is None:
            sampled_logprobs, top_k = self._rows_of(made.logprobs, token_ids)
        else:
            sampled_logprobs, top_k = top_k_from_rows(made.logprobs, token_ids, own_top_k)
        reason = made.finish_reason
        request_id = str(output.request_id)
        stopped_by: str | int | None = made.stop_reason
        by_text = isinstance(stopped_by, str) and token_ids[-1] not in self.eos_token_ids
        return Completion(
            request_id=request_id,
            token_ids=np.asarray(token_ids, np.int32),
            sampled_logprobs=sampled_logprobs,
            top_k=top_k,
            finish_reason=reason if reason in FINISH_REASONS else "abort",
            stop_string=str(stopped_by) if by_text else "",
            hidden=None if self._inside is None else self._inside.finish(request_id, len(token_ids)),
        )

    def _rows_of(self, container: Untyped, token_ids: Sequence[int]) -> tuple[Float32Array, TopK]:
        if self._reduce is not None and not isinstance(container, LogprobRows):
            ids, logprobs = rows_of(container, len(token_ids), self._logprob_count)
            container = LogprobRows()
            container.append(*self._reduce(ids, logprobs))
        if not self._config.draws:
            tail_draws = self._config.tail_draws
            return top_k_from_rows(container, token_ids, self.top_k, tail_draws=tail_draws)
        sampled_logprobs, top_k = top_k_from_rows(container, token_ids, self._config.draws)
        # Draws stand for the whole distribution: there is nothing outside them.
        return sampled_logprobs, replace(top_k, tail_mass=np.zeros_like(top_k.tail_mass))

    def _draw(self, token_ids: npt.NDArray[np.generic], logprobs: npt.NDArray[np.generic]) -> RowArrays:
        """What is kept of whole distributions: draws, or entries and draws; the sampled token stays first."""
        whole = token_ids[:, 1:], logprobs[:, 1:]
        if self._config.draws:
            kept_ids, kept_logprobs = draw_rows(*whole, self._config.draws, self._generator)
        else:
            chances = self._generator.random((token_ids.shape[0], self._config.tail_draws))
            kept_ids, kept_logprobs = keep_and_draw(*whole, self.top_k, chances)
        return np.c_[token_ids[:, :1], kept_ids], np.c_[logprobs[:, :1], kept_logprobs]


def completion_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """The seed of one completion: a digest of the run's seed, the prompt and the sample, below 2^31."""
    digest = hashlib.sha256(f"{seed}\0{sample_index}\0{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__
