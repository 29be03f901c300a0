"""Where a run begins: from a student's directory, or from a run's latest checkpoint."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from lynearm.student.alignment import check_alignment
from lynearm.student.checkpoint import Checkpoint, TrainState, latest_checkpoint, load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.freezing import freeze
from lynearm.student.layer_pairs import format_pairs
from lynearm.student.lineage import JsonObject, read_lineage
from lynearm.student.lora_settings import LoraSettings, parse_lora
from lynearm.student.model import StudentModel, load_student
from lynearm.student.objective import Objective, make_objective
from lynearm.student.optimization import Optimization
from lynearm.student.ranks import Ranks
from lynearm.student.terms import check_terms
from lynearm.wire.errors import CheckpointError, ConfigError
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.traces import Trace

logger = logging.getLogger(__name__)

_FIXED_FIELDS = ("batch_sequences", "batch_tokens", "max_sequence_tokens", "held_out_fraction", "seed")
"""What decides which traces a step trains on: a resumed run must go on with it."""

_FORM_FIELDS = ("lora", "freeze", "freeze_embeddings")
"""What decides which parameters are trained: the optimizer's state is of those."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """All that a run needs before its next step."""

    student: StudentModel
    objective: Objective
    optimization: Optimization
    state: TrainState
    held_out: tuple[Trace, ...]
    base_lineage: JsonObject
    """Manifest of the model that the run began with, before any resumption."""


def begin(config: TrainConfig, stream: StreamInfo, ranks: Ranks) -> Beginning:
    """Load what `config` names, and check that it belongs to the stream.

    With several ranks every one loads it, and draws its own dropout.

    Raises:
        CheckpointError: if the student or the checkpoint cannot be loaded, or is of another stream.
        ConfigError: if `out` holds a run and `resume` is not set, or the configuration changes what a
            resumed run depends on.
        MisalignmentError: if student and stream are not aligned.
        DistillationForbiddenError: if the stream's terms forbid to learn from it, unless `allow_terms`.
    """
    check_terms(stream.spec, allow_terms=config.allow_terms, warn=ranks.writes)
    checkpoint_dir = latest_checkpoint(config.out)
    if config.resume:
        return _resume(config, stream, checkpoint_dir, ranks)
    if checkpoint_dir is not None:
        raise ConfigError(
            f"{config.out} already holds {checkpoint_dir.name}",
            "go on from it with --resume, or name another directory with --out",
        )
    torch.manual_seed(config.seed + ranks.rank)  # pyright: ignore[reportUnknownMemberType]  # torch leaves it half typed
    lora = parse_lora(config.lora) if config.lora else None
    student = _load_aligned(config, stream, config.student, lora)
    state = TrainState(stream.spec.name, stream.created_unix_nano)
    objective = _choose_objective(config, stream, student)
    optimization = Optimization(student, config, objective=objective, ranks=ranks)
    lineage = read_lineage(config.student)
    if lora and student.adapter:
        lineage["adapter"] = student.adapter.account()
    return Beginning(student, objective, optimization, state, (), lineage)


def _resume(config: TrainConfig, stream: StreamInfo, directory: Path | None, ranks: Ranks) -> Beginning:
    if directory is None:
        raise CheckpointError(
            f"{config.out} has no checkpoint to resume from",
            "begin without --resume, or name the run with --out",
        )
    checkpoint = load_checkpoint(directory)
    state = checkpoint.state
    if (state.stream, state.stream_created_unix_nano) != (stream.spec.name, stream.created_unix_nano):
        raise CheckpointError(
            f"{directory} was trained on stream {state.stream!r} made at {state.stream_created_unix_nano}, "
            f"not on {stream.spec.name!r} made at {stream.created_unix_nano}",
            "its cursor means nothing there: begin a new run with this checkpoint as its student",
        )
    if changed := _changed(config, checkpoint):
        raise ConfigError(
            f"the run in {config.out} cannot go on: {'; '.join(changed)}", "resume with the earlier values"
        )
    student = _load_aligned(config, stream, directory)
    objective = _choose_objective(config, stream, student)
    optimization = Optimization(student, config, objective=objective, ranks=ranks)
    optimization.restore(checkpoint.optimizer, state.step)
    if not ranks.writes:
        # The generator's state that was saved is rank 0's.
        torch.manual_seed(config.seed + ranks.rank + state.step)  # pyright: ignore[reportUnknownMemberType]
    logger.info("resumed from %s at %s of pass %d", directory, state.cursor, state.epoch + 1)
    return Beginning(student, objective, optimization, state, checkpoint.held_out, checkpoint.base_lineage)


def _changed(config: TrainConfig, checkpoint: Checkpoint) -> list[str]:
    """Fields that a resumed run must go on with, and does not."""
    changed: list[str] = []
    for name in (*_FIXED_FIELDS, *_FORM_FIELDS):
        # A checkpoint from before a field existed was written with what is now its default.
        before = checkpoint.written_by.get(name, getattr(TrainConfig(), name))
        now: object = getattr(config, name)
        # JSON makes lists of tuples.
        if json.dumps(before) != json.dumps(now):
            changed.append(f"{name} was {before} and is {now}")
    return changed


def _choose_objective(config: TrainConfig, stream: StreamInfo, student: StudentModel) -> Objective:
    objective = make_objective(
        stream.spec,
        config.loss,
        temperature=config.temperature,
        retemper=config.retemper,
        vocab_size=student.vocab_size,
        student_layers=len(student.decoder_layers),
    )
    for term in objective.hidden_terms:
        logger.info("%s compares (student=teacher) layers %s", term.name, format_pairs(term.pairs))
    return objective


def _load_aligned(
    config: TrainConfig, stream: StreamInfo, directory: Path, lora: LoraSettings | None = None
) -> StudentModel:
    student = load_student(directory, device=config.device, dtype=config.dtype, lora=lora, seed=config.seed)
    check_alignment(stream.spec, student, allow_misaligned=config.allow_misaligned)
    if config.freeze_embeddings:
        student.freeze_embeddings()
    freeze(student, config.freeze)
    if config.gradient_checkpointing:
        student.checkpoint_gradients()
    student.train(True)
    return student
