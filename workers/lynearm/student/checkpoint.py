"""Checkpoints: weights, optimizer and the place in each stream, saved as one.

    OUT/LATEST, OUT/BEST            see `run_directory`
    OUT/step-00000120/              model in Hugging Face layout, loadable by transformers, or its adapter in
                                    peft's, and
        optimizer.safetensors       AdamW's moments and the random generators
        trainer.json                step, cursors, curve, configuration
        held_out.block              held-out traces, if any; held_out.1.block and so on for many
        lynearm.json                lineage
        README.md                   model card, made from the lineage

Invariants: a directory named `step-*` is complete, since it is written under another name, synced and
renamed; LATEST is replaced only after that. Nothing is a pickle.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lynearm.student.card import write_card
from lynearm.student.config import TrainConfig
from lynearm.student.evaluation import load_held_out, save_held_out
from lynearm.student.lineage import JsonObject, read_lineage, write_lineage
from lynearm.student.mixing import StreamState
from lynearm.student.model import StudentModel
from lynearm.student.progress import EvaluationRecord, StepRecord
from lynearm.student.run_directory import (
    EARLIER_CHECKPOINT,
    UNFINISHED_PREFIX,
    latest_checkpoint,
    point_to_best,
    point_to_latest,
    remove_old,
    step_name,
    sync,
)
from lynearm.wire.errors import CheckpointError
from lynearm.wire.traces import Cursor, Trace

__all__ = [
    "Checkpoint",
    "TrainState",
    "latest_checkpoint",
    "load_checkpoint",
    "refresh_checkpoint",
    "save_checkpoint",
    "save_model",
    "step_name",
]

TRAINER_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINER_FORMAT = 2
"""1 knew one stream a run."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "generation_config.json",
)
"""Copied as they are: a tokenizer that is loaded and saved again comes out under another class name."""

_SAFETENSORS: Any = safetensors.torch  # half typed


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run is. With the weights and the optimizer, all that the rest of it depends on."""

    streams: tuple[StreamState, ...]
    """How far the run is in each, in the order of the configuration."""
    step: int = 0
    """Done so far."""
    held_out_traces: tuple[int, ...] = ()
    """How many of the held-out traces, which lie in the order of the streams, are of each; none until they
    are settled, before the first step."""
    curve: tuple[StepRecord, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()

    @property
    def epoch(self) -> int:
        """Complete passes over every stream."""
        return min(stream.epoch for stream in self.streams)

    @property
    def traces(self) -> int:
        """Trained on, repetitions included."""
        return sum(stream.traces for stream in self.streams)

    @property
    def tokens(self) -> int:
        """Completion tokens trained on, repetitions included."""
        return sum(stream.tokens for stream in self.streams)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a resumed run begins with, but for the weights, which `model.load_student` loads."""

    directory: Path
    state: TrainState
    optimizer: dict[str, Tensor]
    held_out: tuple[Trace, ...]
    base_lineage: JsonObject
    """Manifest of the model that the run began with."""
    written_by: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of the `TrainConfig` that wrote it, as JSON; empty before it is written."""


def save_checkpoint(
    student: StudentModel,
    checkpoint: Checkpoint,
    *,
    config: TrainConfig,
    lineage: JsonObject,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint, make it the latest, and remove those beyond `config.keep_checkpoints` and the best.

    Args:
        student: The model.
        checkpoint: Everything else, and the directory: named by `step_name`, in the run's own.
        config: What the run was told.
        lineage: The manifest.
        weights: From `copy_weights`, for a model that is trained meanwhile; its own if not given.

    Raises:
        CheckpointError: if it could not be written; earlier checkpoints are as they were.
    """
    final, out = checkpoint.directory, checkpoint.directory.parent
    try:
        out.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED_PREFIX, dir=out))
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written to: {error}", "name another directory with --out"
        ) from error
    try:
        unfinished.chmod(0o755)  # mkdtemp makes it private; a model is not
        if student.adapter is None:
            save_model(student.model, unfinished, tokenizer_from=student.directory, weights=weights)
        else:
            student.adapter.save(unfinished, weights)
            copy_tokenizer(student.directory, unfinished)
        _SAFETENSORS.save_file(checkpoint.optimizer, unfinished / OPTIMIZER_FILE)
        if checkpoint.held_out:
            save_held_out(unfinished, checkpoint.held_out, student.vocab_size)
        write_lineage(unfinished, lineage)
        write_card(unfinished, lineage)
        _write_trainer(unfinished / TRAINER_FILE, checkpoint, config)
        for path in sorted(unfinished.iterdir()):
            sync(path)
        sync(unfinished)
        _put_in_place(unfinished, final)
        point_to_latest(out, final.name)
        point_to_best(out, checkpoint.state.evaluations)
    except (OSError, SafetensorError) as error:  # a full disk is the latter to safetensors
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}",
            "make room, or name another directory with --out",
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    remove_old(out, config.keep_checkpoints)


def refresh_checkpoint(checkpoint: Checkpoint, *, config: TrainConfig, lineage: JsonObject) -> None:
    """Bring the records of a saved checkpoint up to date; weights, optimizer and held-out traces stay.

    For a run that measures, or ends, without a step since it last saved.

    Raises:
        CheckpointError: if they could not be written; each file is as it was, or new.
    """
    directory = checkpoint.directory
    try:
        with tempfile.TemporaryDirectory(prefix=UNFINISHED_PREFIX, dir=directory.parent) as unfinished:
            write_lineage(Path(unfinished), lineage)
            write_card(Path(unfinished), lineage)
            _write_trainer(Path(unfinished, TRAINER_FILE), checkpoint, config)
            for path in sorted(Path(unfinished).iterdir()):
                sync(path)
                path.replace(directory / path.name)
        sync(directory)
        point_to_best(directory.parent, checkpoint.state.evaluations)
    except OSError as error:
        raise CheckpointError(f"{directory} could not be brought up to date: {error}") from error


def save_model(
    model: Any, directory: Path, *, tokenizer_from: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a transformers model and a tokenizer as one directory that any reader understands.

    Args:
        model: A transformers model; untyped as in `StudentModel`.
        directory: An existing one.
        tokenizer_from: Directory whose tokenizer files are copied as they are.
        weights: What to write instead of the model's own state.
    """
    model.save_pretrained(str(directory), state_dict=weights, max_shard_size="1TB")
    copy_tokenizer(tokenizer_from, directory)
    path = directory / "config.json"
    config = cast(JsonObject, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(_with_older_names(config), indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer files of a model's directory, as they are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def load_checkpoint(directory: Path) -> Checkpoint:
    """Everything of a checkpoint but the model's weights.

    Raises:
        CheckpointError: if a part is missing or cannot be read.
    """
    for name in (TRAINER_FILE, OPTIMIZER_FILE):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} is not a training checkpoint: it has no {name}",
                "resume from a step-* directory that lynearm train wrote",
            )
    trainer = _read_trainer(directory / TRAINER_FILE)
    try:
        state = _parse_state(cast(JsonObject, trainer["state"]))
        base_lineage, config = cast(JsonObject, trainer["base_lineage"]), cast(JsonObject, trainer["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / TRAINER_FILE} lacks or misstates {error}", EARLIER_CHECKPOINT
        ) from error
    try:
        optimizer = cast("dict[str, Tensor]", _SAFETENSORS.load_file(directory / OPTIMIZER_FILE))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory / OPTIMIZER_FILE} cannot be read: {error}", EARLIER_CHECKPOINT
        ) from error
    read_lineage(directory)
    return Checkpoint(directory, state, optimizer, load_held_out(directory), base_lineage, config)


def _with_older_names(config: JsonObject) -> JsonObject:
    # transformers 5 nests rope_theta and says dtype; mlx-lm and older readers look for the flat names only,
    # and fall back to a wrong base frequency without a word.
    rope = cast(JsonObject, config.get("rope_parameters") or {})
    older = dict(config)
    if "rope_theta" in rope:
        older.setdefault("rope_theta", rope["rope_theta"])
        older.setdefault("rope_scaling", None if rope.get("rope_type", "default") == "default" else rope)
    if "dtype" in config:
        older.setdefault("torch_dtype", config["dtype"])
    return older


def _write_trainer(path: Path, checkpoint: Checkpoint, config: TrainConfig) -> None:
    settings = {name: _json_value(value) for name, value in asdict(config).items()}
    state = asdict(checkpoint.state)
    trainer = {
        "format": TRAINER_FORMAT,
        "state": state,
        "config": settings,
        "base_lineage": checkpoint.base_lineage,
    }
    path.write_text(json.dumps(trainer, indent=1) + "\n", encoding="utf-8")


def _json_value(value: object) -> object:
    unwritable = isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value))
    return str(value) if unwritable else value


def _read_trainer(path: Path) -> JsonObject:
    try:
        parsed: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}", EARLIER_CHECKPOINT) from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds no JSON object", EARLIER_CHECKPOINT)
    trainer = cast(JsonObject, parsed)
    if trainer.get("format") != TRAINER_FORMAT:
        raise CheckpointError(
            f"{path} has format {trainer.get('format')!r}, this lynearm resumes from {TRAINER_FORMAT}",
            "resume with the lynearm that wrote it, or begin a new run with this checkpoint as its student",
        )
    return trainer


def _parse_state(state: JsonObject) -> TrainState:
    curve, evaluations = (cast("Sequence[JsonObject]", state[name]) for name in ("curve", "evaluations"))
    return TrainState(
        tuple(_parse_stream(stream) for stream in cast("Sequence[JsonObject]", state["streams"])),
        step=int(state["step"]),
        held_out_traces=tuple(cast("Sequence[int]", state["held_out_traces"])),
        curve=tuple(StepRecord(**record) for record in curve),
        evaluations=tuple(EvaluationRecord.from_values(record) for record in evaluations),
    )


def _parse_stream(stream: JsonObject) -> StreamState:
    cursors = {name: Cursor(**cast("dict[str, int]", stream[name])) for name in ("cursor", "furthest")}
    damaged = tuple(cast("Sequence[int]", stream.get("damaged", ())))
    fields: JsonObject = {**stream, **cursors, "damaged": damaged}
    return StreamState(**fields)


def _put_in_place(unfinished: Path, final: Path) -> None:
    if final.exists():
        # Renamed into place by a run that died before it wrote LATEST, so that nobody refers to it.
        shutil.rmtree(final)
    unfinished.rename(final)
    sync(final.parent)
