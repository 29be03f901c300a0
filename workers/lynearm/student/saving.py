"""Writes a run's checkpoints: what goes into one, who gathers it, and who waits for whom.

Invariants: rank 0 writes, the newest checkpoint is never the one that is being written, and a step is written
once. Parts of a sharded student are gathered by all ranks together, so that a failure of the one that writes
is known to all of them before they gather.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

from torch import Tensor

from lynearm.student.alignment import list_differences
from lynearm.student.beginning import Beginning
from lynearm.student.checkpoint import (
    Checkpoint,
    TrainState,
    refresh_checkpoint,
    save_checkpoint,
    step_name,
)
from lynearm.student.checkpoint_writer import CheckpointWriter, copy_tensors, copy_weights
from lynearm.student.config import TrainConfig
from lynearm.student.lineage import JsonObject, StreamUse, extend_lineage
from lynearm.student.model import StudentModel
from lynearm.student.on_policy_plan import account_for_rollouts
from lynearm.student.ranks import Ranks
from lynearm.student.reporting import Reporter
from lynearm.student.run_account import describe_run, list_earlier
from lynearm.wire.errors import CheckpointError
from lynearm.wire.specs import StreamSpec
from lynearm.wire.traces import Trace

_Tensors: TypeAlias = dict[str, Tensor]

logger = logging.getLogger(__name__)


class Saver:
    """Saves one run.

    Args:
        config: Of the run.
        specs: Of its streams.
        beginning: What the run began with.
        ranks: Of the run.
        reporter: Hears that a checkpoint is written.
    """

    def __init__(
        self,
        config: TrainConfig,
        specs: Sequence[StreamSpec],
        beginning: Beginning,
        *,
        ranks: Ranks,
        reporter: Reporter,
    ) -> None:
        self.saved_step: int | None = beginning.state.step if config.resume else None
        """Step of the newest checkpoint; None before the first."""
        self._config = config
        self._specs = specs
        self._optimization = beginning.optimization
        self._base_lineage = beginning.base_lineage
        self._run_before, self._began_at = beginning.run_before, beginning.state.step
        # Not empty only where that was allowed: what the manifest says was overridden.
        self._differences = list_differences(specs, beginning.student)
        self._ranks = ranks
        self._reporter = reporter
        self._writer = CheckpointWriter()

    def save(
        self,
        student: StudentModel,
        state: TrainState,
        held_out: Sequence[Sequence[Trace]],
        *,
        last: bool = False,
        alone: bool = False,
    ) -> Path:
        """Save on rank 0; beside the training, unless it is the last.

        Args:
            student: As it is after the state's step; its directory is still there.
            state: Of the run.
            held_out: Held-out traces of each stream.
            last: Return when it is on the disk.
            alone: Do not ask the other ranks whether they hold the same weights.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: if this one, or the one before, cannot be written.
        """
        directory = self._config.out / step_name(state.step)
        if not alone:
            self._ranks.check_equal(self._optimization.parameters())
        failure: CheckpointError | None = None
        if self._ranks.writes:
            self._reporter.stage("saving", f"step {state.step}")
            failure = self._finish_writing(last=last)
        if not alone:
            self._ranks.raise_together(failure)
        gathered = self._gather(student, state)
        if self._ranks.writes:
            traces = tuple(trace for of_stream in held_out for trace in of_stream)
            checkpoint = Checkpoint(directory, state, {}, traces, self._base_lineage)
            self._write(student, checkpoint, gathered, beside=self._config.async_checkpoints and not last)
        self.saved_step = state.step
        if last and not alone:
            self._ranks.all_hold(True)
        elif student.shards is not None and alone:
            self._ranks.meet()  # a launcher ends the rank that writes when it finds that another has ended
        return directory

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any; warn if it failed."""
        self._finish_writing(last=True)

    def _finish_writing(self, *, last: bool) -> CheckpointError | None:
        """Wait for the write before; what it failed with, unless this is the last."""
        try:
            self._writer.wait()
        except CheckpointError as error:
            if not last:
                return error
            # The last chance to save: it may be of the very step that failed.
            logger.warning("%s", error)
            self.saved_step = None
        return None

    def _gather(self, student: StudentModel, state: TrainState) -> tuple[_Tensors, _Tensors] | None:
        """Weights and optimizer state of a sharded student, which all ranks gather; None if of no use."""
        if student.shards is None or not self._ranks.most(int(self.saved_step != state.step)):
            return None
        return student.shards.gather_weights(keep=self._ranks.writes), self._optimization.state()

    def _write(
        self,
        student: StudentModel,
        checkpoint: Checkpoint,
        gathered: tuple[_Tensors, _Tensors] | None,
        *,
        beside: bool,
    ) -> None:
        config, lineage = self._config, self._lineage(checkpoint.state)
        if self.saved_step == checkpoint.state.step:
            refresh_checkpoint(checkpoint, config=config, lineage=lineage)
            return
        weights, optimizer = gathered or (None, self._optimization.state())
        if beside and gathered is None:
            weights, optimizer = copy_weights(student), copy_tensors(optimizer)
        checkpoint = replace(checkpoint, optimizer=optimizer)
        save = partial(save_checkpoint, student, checkpoint, config=config, lineage=lineage, weights=weights)
        if beside:
            self._writer.submit(save)
        else:
            save()

    def _lineage(self, state: TrainState) -> JsonObject:
        uses = [
            StreamUse(
                spec,
                stream.furthest,
                stream.epoch,
                stream.traces,
                stream.tokens,
                loss=tuple(map(str, objective.terms)),
                damaged=stream.damaged,
            )
            for spec, stream, objective in zip(
                self._specs, state.streams, self._optimization.objectives, strict=True
            )
        ]
        run = describe_run(
            self._config,
            self._specs,
            differences=self._differences,
            evaluations=state.evaluations,
            world_size=self._ranks.world_size,
        )
        if earlier := list_earlier(self._run_before, run, self._began_at):
            run["earlier"] = earlier
        if self._config.on_policy:
            run["on_policy"] = account_for_rollouts(state.streams, self._specs[-1])
        return extend_lineage(self._base_lineage, uses, run=run)


def resume_command(config: TrainConfig) -> str:
    """What to type for a run to go on with all of its settings."""
    words = ["lynearm", "train", "--resume", "--out", str(config.out)]
    for stream in config.streams:
        words += ["--stream", stream]
    words += ["--service", config.service]
    if config.on_policy:
        words += ["--on-policy", "--teacher", config.teacher]
    if config.lora:
        words += ["--lora", config.lora]
    for pattern in config.freeze:
        words += ["--freeze", pattern]
    for field in fields(config):
        value: object = getattr(config, field.name)
        if field.name not in _SAID and value != getattr(TrainConfig(), field.name):
            words += ["--set", f"{field.name}={_toml(value)}"]
    return shlex.join(words)


_SAID = frozenset(
    {"student", "streams", "service", "out", "resume"} | {"on_policy", "teacher", "lora", "freeze"}
)
"""Fields that the command says by flags of their own, or that a resumed run does not read."""


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, object]", value).items()
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in entries) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, cast("Sequence[object]", value))) + "]"
    # TOML writes numbers, infinity among them, as Python does; texts, true and false as JSON does.
    if isinstance(value, float):
        return repr(value)
    return json.dumps(str(value) if isinstance(value, Path) else value)
