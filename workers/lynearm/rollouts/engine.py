"""The student in a vLLM engine whose weights change in place, and are checked each time they do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from lynearm.rollouts.config import RolloutConfig
from lynearm.rollouts.handover import read_probe
from lynearm.rollouts.probe import FIRST_TOLERANCE, Probe, tolerance_after
from lynearm.teacher.config import TeachConfig
from lynearm.teacher.engine import Completion, TeacherEngine
from lynearm.teacher.engine_start import prefer_first_runner
from lynearm.wire.errors import TeacherError
from lynearm.wire.traces import Int32Array, SamplingParams

logger = logging.getLogger(__name__)

_PROBE_TOP_K = 16
"""Entries that are compared: the head's rows of the likeliest tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class RolloutRequest:
    """What the student is to write."""

    request_id: str
    prompt_token_ids: Int32Array
    sampling: SamplingParams
    top_k: int = 0
    """The student's own likeliest tokens that are wanted at each position."""


class StudentEngine:
    """A student that writes. Make at most one per process, as of `TeacherEngine`.

    Args:
        config: How it writes.
        directory: From `handover`: the weights that it begins with.
        make_engine: Makes the engine; tests share one.

    Raises:
        ConfigError, MissingDependencyError: as for `TeacherEngine`.
        TeacherError: if it does not compute what the trainer computes.
    """

    def __init__(
        self,
        config: RolloutConfig,
        directory: Path,
        make_engine: Callable[[TeachConfig], TeacherEngine] | None = None,
    ) -> None:
        if make_engine is None:
            prefer_first_runner()
        self._engine = (make_engine or TeacherEngine)(engine_config(config, directory))
        self.directory = directory
        """Of its present weights."""
        self.vocab_size = self._engine.vocab_size
        self._tolerance: float | None = None
        self.error = self._check(read_probe(directory))
        """Largest difference between its logprobs and the trainer's for the present weights, nats."""
        self._tolerance = tolerance_after(self.error)

    @property
    def base(self) -> TeacherEngine:
        """The engine itself: its tokenizer, its spans, its end tokens."""
        return self._engine

    def refresh(self, directory: Path) -> None:
        """Take newer weights, and check that they are the trainer's.

        Raises:
            TeacherError: if they cannot be loaded, or the engine does not compute with them what the trainer
                does. It is of no more use then.
        """
        self._engine.refresh(directory)
        self.directory = directory
        self.error = self._check(read_probe(directory))

    def generate(
        self, requests: Sequence[RolloutRequest], should_stop: Callable[[], bool]
    ) -> Iterator[Completion]:
        """Let the student write; its completions as they are finished, and fewer if it should stop.

        Raises:
            TeacherError: if vLLM refuses a request, or fails.
        """
        for request in requests:
            self._engine.add(
                request.request_id, request.prompt_token_ids.tolist(), request.sampling, top_k=request.top_k
            )
        while self._engine.unfinished:
            if should_stop():
                self._engine.abort([request.request_id for request in requests])
                return
            yield from self._step()

    def close(self) -> None:
        """Undo the changes to vLLM."""
        self._engine.close()

    def _step(self) -> list[Completion]:
        try:
            return self._engine.step()
        # Whatever vLLM raises: nothing that is in the engine can be trusted any more.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise TeacherError(f"the student's engine failed: {reason}") from error

    def _check(self, probe: Probe) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        for number, token_ids in enumerate(probe.token_ids):
            self._engine.add(f"probe-{number}", token_ids.tolist(), sampling)
        rows: dict[str, Completion] = {}
        while self._engine.unfinished:
            rows.update((completion.request_id, completion) for completion in self._step())
        kept = [rows[f"probe-{number}"].top_k for number in range(len(probe.token_ids))]
        error = probe.error_of(
            np.concatenate([one.token_ids for one in kept]), np.concatenate([one.logprobs for one in kept])
        )
        allowed = FIRST_TOLERANCE if self._tolerance is None else self._tolerance
        if not error <= allowed:
            raise TeacherError(
                f"the student's engine does not compute what the trainer does: logprobs differ by "
                f"{error:.3g} nats, {allowed:.3g} would be rounding",
                "please report it with the student's architecture; train without --on-policy meanwhile",
            )
        logger.debug("weights checked: logprobs differ by %.2g nats", error)
        return error


def engine_config(config: RolloutConfig, directory: Path) -> TeachConfig:
    """What the engine is made with.

    Raises:
        ConfigError: naming the field that is out of range.
    """
    return TeachConfig(
        model=str(directory),
        prompts=config.prompts or "none",
        stream="rollouts",
        license="unknown",
        model_name="student",
        top_k=max(config.top_k if config.support == "student" else 0, _PROBE_TOP_K),
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        max_model_len=config.max_model_len,
        max_batch=config.wave,
        seed=config.seed,
        dtype=cast("Literal['auto', 'float32', 'bfloat16', 'float16']", config.dtype),
        kv_cache_mib=config.kv_cache_mib,
        threads=config.threads,
    )
