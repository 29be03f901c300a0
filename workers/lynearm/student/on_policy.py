"""The trainer's hold on its rollouts: hands weights over, says how far it is, and watches who writes.

Invariants: nothing here decides what a step trains on. That depends on what is in the streams alone, by the
filter of the rollouts' plan; what is done here changes how soon it is there, and how fresh. All of it happens
on the training thread, between steps or while it waits, but for the writing of weights, which have been
copied by then.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lynearm.rollouts import RolloutConfig, RolloutProcess, RolloutStatus
from lynearm.rollouts.handover import HandedWeights, handover_name, keep_only, write_handover
from lynearm.rollouts.messages import Taken, Weights
from lynearm.rollouts.probe import Probe, probe_token_ids
from lynearm.student.checkpoint import TOKENIZER_FILES, TrainState, save_model
from lynearm.student.checkpoint_writer import CheckpointWriter, copy_weights
from lynearm.student.config import TrainConfig
from lynearm.student.mixing import StreamPlan, parse_streams
from lynearm.student.model import StudentModel
from lynearm.student.on_policy_plan import (
    expected_per_step,
    is_fresh,
    rollout_stream_name,
    rollouts_ahead,
    rollouts_at_once,
)
from lynearm.wire.errors import CheckpointError
from lynearm.wire.traces import Trace

logger = logging.getLogger(__name__)

DIRECTORY = "rollouts"
"""In a run's directory: what is not in the stream yet, weights on their way, and the log."""


class OnPolicy:
    """The rollouts of a run, on the rank that writes. Close it.

    Args:
        config: Of the run.
        plans: Of its streams.
    """

    def __init__(self, config: TrainConfig, plans: Sequence[StreamPlan]) -> None:
        self._config = config
        self._index = [plan.name for plan in plans].index(rollout_stream_name(config))
        self._plan = plans[self._index]
        self._directory = config.out / DIRECTORY
        # In a directory that several runs may be told, each has its own.
        own = rollout_stream_name(config)
        self._weights_dir = (config.rollout_weights or self._directory / "weights") / own
        self._tokenizer_dir = self._directory / "tokenizer"
        variables = {"CUDA_VISIBLE_DEVICES": config.rollout_gpus} if config.rollout_gpus else {}
        self._process = RolloutProcess(self._directory, variables)
        self._writer = CheckpointWriter()
        self._dtype = "auto"
        self._handed: Weights | None = None
        """The latest that lie ready; set by the thread that hands over."""
        self._is_writing = False
        self._looked_at = 0
        self._before = (0, 0)
        """Rollouts that were looked at, and that were too old, at the end of the last step."""
        self._start = (0, 0)
        """The same at the place from which the present process counts."""
        self._step = -1
        self._told: Taken | None = None
        self.stale_rollouts = 0
        """Rollouts that were too old when their turn came."""

    def read_status(self) -> RolloutStatus:
        """How it goes."""
        return replace(self._process.status, stale_rollouts=self.stale_rollouts)

    def watch(self, plans: Sequence[StreamPlan]) -> tuple[StreamPlan, ...]:
        """The plans, with a filter of the rollouts that says the same and counts what it was asked."""
        watched = replace(self._plan, accepts=self._accepts)
        return tuple(watched if index == self._index else plan for index, plan in enumerate(plans))

    def tend(self, student: StudentModel, state: TrainState) -> None:
        """Do what is to be done: called after each step, and again and again while the run waits.

        Args:
            student: As it is now.
            state: After the last step.

        Raises:
            TrainingError: if the process that writes keeps ending.
            CheckpointError: if weights cannot be handed over.
            LynearmError: what the process says, where another one would say the same.
        """
        if state.step != self._step:
            self._step, self._before = state.step, (self._looked_at, self.stale_rollouts)
        soon = state.step + self._config.max_staleness
        if max(self._plan.weights.at(state.step), self._plan.weights.at(soon)) <= 0:
            return  # None are wanted yet, or any more.
        handed = self._handed or self._begin(student, state.step)
        if self._process.keep_running(partial(self._process_config, state), handed):
            self._start, self._told = self._before, None
        looked_at, stale = self._start
        taken = Taken(state.step, self._looked_at - looked_at, self.stale_rollouts - stale)
        if taken != self._told:
            self._process.tell(taken)
            self._told = taken
        if self._is_due(state.step):
            self._hand_over(student, state.step)

    def close(self) -> None:
        """End the process; what it has in hand, the next run goes on with."""
        self._process.stop()
        try:
            self._writer.wait()
        except CheckpointError as error:
            # Nobody wants those weights any more, and what ends the run is said already.
            logger.warning("%s", error)
        keep_only(self._weights_dir)

    def _accepts(self, trace: Trace, step: int) -> bool:
        self._looked_at += 1
        fresh = is_fresh(trace, step, max_staleness=self._config.max_staleness)
        self.stale_rollouts += not fresh
        return fresh

    def _begin(self, student: StudentModel, step: int) -> Weights:
        """Hand over the first weights. Tokenizers are kept: the checkpoint that they are from may go."""
        self._dtype = "bfloat16" if student.compute_dtype == torch.bfloat16 else "auto"
        self._tokenizer_dir.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (student.directory / name).is_file():
                shutil.copyfile(student.directory / name, self._tokenizer_dir / name)
        keep_only(self._weights_dir)
        first = self._hand_over(student, step)
        self._writer.wait()
        return first

    def _is_due(self, step: int) -> bool:
        """Whether newer weights are to be handed over: not before the last ones are in use."""
        handed = self._handed
        if self._is_writing or handed is None or self._process.loaded_step != handed.step:
            return False
        return step - handed.step >= self._config.refresh_every_steps

    def _hand_over(self, student: StudentModel, step: int) -> Weights:
        weights = HandedWeights(
            step,
            partial(_save, student, tokenizer_from=self._tokenizer_dir, weights=copy_weights(student)),
            measure_probe(student),
        )
        offered = Weights(str((self._weights_dir / handover_name(step)).resolve()), step)
        self._is_writing = True
        self._writer.submit(partial(self._write, weights, offered))
        return offered

    def _write(self, weights: HandedWeights, offered: Weights) -> None:
        """On a thread of its own."""
        try:
            write_handover(self._weights_dir, weights)
            before, self._handed = self._handed, offered
            self._process.tell(offered)
            keep_only(self._weights_dir, offered.step, *([] if before is None else [before.step]))
        finally:
            self._is_writing = False

    def _process_config(self, state: TrainState) -> RolloutConfig:
        config = self._config
        return RolloutConfig(
            service=config.service,
            teacher=config.teacher,
            stream=self._plan.name,
            directory=self._directory.resolve(),
            prompts=config.rollout_prompts,
            prompt_stream=parse_streams(config.streams)[0].name,
            start=state.streams[self._index].cursor,
            step=state.step,
            temperature=config.rollout_temperature,
            max_tokens=config.rollout_tokens,
            max_model_len=config.max_sequence_tokens,
            seed=config.seed,
            top_k=config.rollout_top_k,
            support=config.rollout_support,
            score_temperature=config.temperature,
            tail_draws=config.rollout_tail_draws,
            max_staleness=config.max_staleness,
            per_step=expected_per_step(config),
            ahead=rollouts_ahead(config),
            wave=rollouts_at_once(config),
            held_out_fraction=config.held_out_fraction,
            split_seed=config.seed,
            threads=config.rollout_threads,
            dtype=self._dtype,
            kv_cache_mib=config.rollout_kv_cache_mib,
            service_timeout_seconds=config.service_timeout_seconds,
        )


def measure_probe(student: StudentModel) -> Probe:
    """What the student computes on the probe's prompts; its mode is as before afterwards."""
    token_ids = probe_token_ids(student.vocab_size)
    was_training = bool(student.model.training)
    student.train(False)
    try:
        with torch.no_grad():
            input_ids = torch.as_tensor(token_ids.astype(np.int64), device=student.device)
            last_NH = student.hidden_states(input_ids)[:, -1].float()
            logits_NV = last_NH @ student.head_weight.float().T
            if student.head_bias is not None:
                logits_NV = logits_NV + student.head_bias.float()
            logprobs_NV = torch.log_softmax(logits_NV, -1)
    finally:
        student.train(was_training)
    return Probe(token_ids, logprobs_NV.cpu().numpy())


def _save(
    student: StudentModel, directory: Path, *, tokenizer_from: Path, weights: dict[str, torch.Tensor]
) -> None:
    save_model(student.model, directory, tokenizer_from=tokenizer_from, weights=weights)
