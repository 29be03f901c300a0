"""Where a run begins: from a student's directory, or from a run's latest checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from lynearm.student.alignment import check_alignment
from lynearm.student.checkpoint import Checkpoint, TrainState, latest_checkpoint, load_checkpoint
from lynearm.student.config import TrainConfig
from lynearm.student.freezing import freeze
from lynearm.student.layer_pairs import format_pairs
from lynearm.student.lineage import JsonObject, read_lineage
from lynearm.student.lora_settings import LoraSettings, parse_lora
from lynearm.student.mixing import StreamState
from lynearm.student.model import StudentModel, load_student
from lynearm.student.objective import Objective, make_objective
from lynearm.student.on_policy_plan import rollout_stream_name
from lynearm.student.optimization import Optimization
from lynearm.student.ranks import Ranks
from lynearm.student.sharding import check_several, shard_student
from lynearm.student.terms import check_terms
from lynearm.wire.errors import CheckpointError, ConfigError, MisalignmentError
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.traces import Trace

logger = logging.getLogger(__name__)

_FIXED_FIELDS = ("batch_sequences", "batch_tokens", "max_sequence_tokens", "held_out_fraction", "seed")
"""What decides which traces a step trains on: a resumed run must go on with it."""

_FORM_FIELDS = ("lora", "freeze", "freeze_embeddings")
"""What decides which parameters are trained: the optimizer's state is of those."""

_COURSE_FIELDS = (
    "learning_rate", "schedule", "warmup_steps", "weight_decay", "beta1", "beta2", "grad_clip", "dtype",
    "loss", "temperature", "retemper", "span_weights", "tag_weights", "streams", "on_policy_share",
    "rollout_loss",
)  # fmt: skip
"""What decides what is learnt from these traces: a resumed run may change it, and says so."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """All that a run needs before its next step."""

    student: StudentModel
    objectives: tuple[Objective, ...]
    """Of each stream: the same terms, under its own teacher; rollouts may have others."""
    optimization: Optimization
    state: TrainState
    held_out: tuple[Trace, ...]
    """Of all streams, in their order."""
    base_lineage: JsonObject
    """Manifest of the model that the run began with, before any resumption."""
    run_before: JsonObject = field(default_factory=dict[str, Any])
    """Of a run that goes on, what its manifest has said of it so far."""


def begin(config: TrainConfig, streams: Sequence[StreamInfo], ranks: Ranks) -> Beginning:
    """Load what `config` names, and check that it belongs to the streams.

    With several ranks every one loads it, and draws its own dropout.

    Raises:
        CheckpointError: if the student or the checkpoint cannot be loaded, or is of other streams.
        ConfigError: if `out` holds a run and `resume` is not set, the configuration changes what a
            resumed run depends on, or the student cannot be sharded.
        MisalignmentError: if student and streams are not aligned, or a term of the loss cannot compare with
            all of the teachers.
        DistillationForbiddenError: if a stream's terms forbid to learn from it, unless `allow_terms`.
    """
    if config.sharding == "full":
        check_several(ranks)
    for stream in streams:
        check_terms(stream.spec, allow_terms=config.allow_terms, warn=ranks.writes)
    checkpoint_dir = latest_checkpoint(config.out)
    if config.resume:
        return _resume(config, streams, checkpoint_dir, ranks)
    if checkpoint_dir is not None:
        raise ConfigError(
            f"{config.out} already holds {checkpoint_dir.name}",
            "go on from it with --resume, or name another directory with --out",
        )
    torch.manual_seed(config.seed + ranks.rank)  # pyright: ignore[reportUnknownMemberType]  # torch leaves it half typed
    lora = parse_lora(config.lora) if config.lora else None
    student = _load_aligned(config, streams, config.student, ranks, lora=lora)
    state = TrainState(tuple(StreamState(one.spec.name, one.created_unix_nano) for one in streams))
    objectives = _choose_objectives(config, streams, student)
    optimization = Optimization(student, config, objectives=objectives, ranks=ranks)
    lineage = read_lineage(config.student)
    if lora and student.adapter:
        lineage["adapter"] = student.adapter.account()
    return Beginning(student, objectives, optimization, state, (), lineage)


def _resume(
    config: TrainConfig, streams: Sequence[StreamInfo], directory: Path | None, ranks: Ranks
) -> Beginning:
    if directory is None:
        raise CheckpointError(
            f"{config.out} has no checkpoint to resume from",
            "begin without --resume, or name the run with --out",
        )
    checkpoint = load_checkpoint(directory)
    state = checkpoint.state
    _check_streams(directory, state.streams, streams)
    if changed := _changed(config, checkpoint):
        raise ConfigError(
            f"the run in {config.out} cannot go on: {'; '.join(changed)}", "resume with the earlier values"
        )
    student = _load_aligned(config, streams, directory, ranks)
    objectives = _choose_objectives(config, streams, student)
    optimization = Optimization(student, config, objectives=objectives, ranks=ranks)
    optimization.restore(checkpoint.optimizer, state.step)
    if not ranks.writes:
        # The generator's state that was saved is rank 0's.
        torch.manual_seed(config.seed + ranks.rank + state.step)  # pyright: ignore[reportUnknownMemberType]
    for stream in state.streams:
        logger.info("resumed from %s at %s of pass %d over %s",
                    directory, stream.cursor, stream.epoch + 1, stream.name)  # fmt: skip
    if ranks.writes and state.step:
        for change in _changes_of_course(config, checkpoint):
            logger.warning("%s from step %d on", change, state.step + 1)
    runs = cast("Sequence[JsonObject]", read_lineage(directory).get("runs", []))
    is_told = len(runs) > len(cast("Sequence[JsonObject]", checkpoint.base_lineage.get("runs", [])))
    return Beginning(
        student,
        objectives,
        optimization,
        state,
        checkpoint.held_out,
        checkpoint.base_lineage,
        runs[-1] if is_told else {},
    )


def _changes_of_course(config: TrainConfig, checkpoint: Checkpoint) -> list[str]:
    """What a resumed run may do otherwise than before, and would not by mistake."""
    decides_on_rates = ("max_steps",) if config.schedule == "cosine" else ()
    return _changed(config, checkpoint, (*_COURSE_FIELDS, *decides_on_rates))


def _changed(
    config: TrainConfig, checkpoint: Checkpoint, names: Sequence[str] = (*_FIXED_FIELDS, *_FORM_FIELDS)
) -> list[str]:
    """Fields that have other values than when a checkpoint was written; if not given, those that must not."""
    changed: list[str] = []
    for name in names:
        # A checkpoint from before a field existed was written with what is now its default.
        before = checkpoint.written_by.get(name, getattr(TrainConfig(), name))
        now: object = getattr(config, name)
        # JSON makes lists of tuples.
        if json.dumps(before) != json.dumps(now):
            changed.append(f"{name} was {before or repr(before)} and is {now or repr(now)}")
    return changed


def _check_streams(directory: Path, before: Sequence[StreamState], streams: Sequence[StreamInfo]) -> None:
    """Refuse to go on with other streams, or others of the same names."""
    names = [stream.spec.name for stream in streams]
    trained_on = [stream.name for stream in before]
    if names != trained_on:
        raise CheckpointError(
            f"{directory} was trained on {', '.join(trained_on)}, not on {', '.join(names)}",
            "resume with the same streams in the same order (their weights may change), or begin a new run "
            "with this checkpoint as its student",
        )
    for old, stream in zip(before, streams, strict=True):
        if old.created_unix_nano != stream.created_unix_nano:
            raise CheckpointError(
                f"{directory} was trained on stream {old.name!r} made at {old.created_unix_nano}, not on the "
                f"one made at {stream.created_unix_nano}",
                "its cursor means nothing there: begin a new run with this checkpoint as its student",
            )


def _choose_objectives(
    config: TrainConfig, streams: Sequence[StreamInfo], student: StudentModel
) -> tuple[Objective, ...]:
    rollouts = rollout_stream_name(config) if config.on_policy else ""
    objectives = tuple(
        make_objective(
            stream.spec,
            config.rollout_loss if stream.spec.name == rollouts else config.loss,
            temperature=config.temperature,
            retemper=config.retemper,
            vocab_size=student.vocab_size,
            student_layers=len(student.decoder_layers),
        )
        for stream in streams
    )
    first = objectives[0]
    for stream, objective in zip(streams, objectives, strict=True):
        logger.info("loss on stream %s: %s", stream.spec.name, " + ".join(map(str, objective.terms)))
        # Their projections are shared: they lead from the student's states to those of one width.
        if first.hidden_terms and _compared(objective) != _compared(first):
            raise MisalignmentError(
                f"hidden states do not fit together: {_compared(first)} in stream {streams[0].spec.name!r}, "
                f"{_compared(objective)} in stream {stream.spec.name!r}",
                "name layers that all streams have (hidden-cosine@4=9), or train without hidden terms: "
                "teachers of different widths cannot share them",
            )
    for term in first.hidden_terms:
        logger.info("%s compares (student=teacher) layers %s", term.name, format_pairs(term.pairs))
    return objectives


def _compared(objective: Objective) -> str:
    terms = (f"{term.name} of layers {format_pairs(term.pairs)}" for term in objective.hidden_terms)
    return f"{', '.join(terms)}, {objective.teacher_hidden_size} wide"


def _load_aligned(
    config: TrainConfig,
    streams: Sequence[StreamInfo],
    directory: Path,
    ranks: Ranks,
    *,
    lora: LoraSettings | None = None,
) -> StudentModel:
    sharded = config.sharding == "full"
    student = load_student(
        directory,
        device=config.device,
        dtype=config.dtype,
        on_host=sharded,
        lora=lora,
        seed=config.seed,
    )
    for stream in streams:
        check_alignment(stream.spec, student, allow_misaligned=config.allow_misaligned)
    if student.adapter is not None and (sharded or config.on_policy):
        raise ConfigError(
            f"{directory} is an adapter, which is neither sharded nor asked for rollouts",
            "merge it with lynearm student merge, or train it without sharding and on_policy",
        )
    if config.freeze_embeddings:
        student.freeze_embeddings()
    freeze(student, config.freeze)
    if config.gradient_checkpointing:
        student.checkpoint_gradients()
    if sharded:
        student = shard_student(student, ranks)
    student.train(True)
    return student
