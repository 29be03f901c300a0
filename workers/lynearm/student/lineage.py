"""The manifest of a checkpoint: what went into it, and under which terms.

`lynearm.json` lies beside the weights and travels with them. It names no path of the machine that wrote it.

    format    1
    name      of the model that all began with
    cut_from  teacher, its revision and what was kept of it, for a student that was cut: layers; query heads
              of each kept layer; neurons of each, and channels, as hexadecimal masks whose bit i, from the
              lowest, is unit i
    adapter   its kind, rank and targets, and name and revision of its base, for a student that is an adapter;
              merged: true where it has been added to the base
    streams   one entry for each run and stream: offsets, tokens, loss, teacher, terms, codec, labels;
              damaged_blocks, offsets within these that were passed over, if any were
    runs      one entry for each run: settings, versions, what was overridden, what was measured; earlier,
              where it was resumed with other settings, versions or ranks: what held until which step
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from lynearm.student.terms import read_terms
from lynearm.wire.errors import CheckpointError
from lynearm.wire.specs import StreamSpec
from lynearm.wire.traces import Cursor

LINEAGE_FILE = "lynearm.json"
LINEAGE_FORMAT = 1

PROMPT_LABELS = ("prompts", "job", "dataset")
"""Labels by which a stream tells where its prompts came from; the first that is there counts."""

JsonObject: TypeAlias = dict[str, Any]
"""A parsed JSON object: its values are checked where they are used."""


@dataclass(frozen=True, slots=True)
class StreamUse:
    """What a run has taken from one stream."""

    spec: StreamSpec
    end: Cursor
    """Within the pass in progress, the first trace that was not used yet."""
    passes: int
    """Complete ones."""
    traces: int
    """Trained on, repetitions included."""
    tokens: int
    """Completion tokens trained on, repetitions included."""
    loss: tuple[str, ...] = ()
    """Terms of what was brought down on it."""
    damaged: tuple[int, ...] = ()
    """Offsets of the blocks that were passed over, being damaged."""


def read_lineage(directory: Path) -> JsonObject:
    """The manifest of a model; an empty one if it has none.

    Raises:
        CheckpointError: if the file is not a manifest.
    """
    path = directory / LINEAGE_FILE
    if not path.is_file():
        return {"format": LINEAGE_FORMAT, "name": directory.resolve().name, "streams": []}
    try:
        parsed: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(parsed, dict) or not isinstance(cast(JsonObject, parsed).get("streams"), list):
        raise CheckpointError(f"{path} is not a lineage manifest", "remove it, or restore it")
    return cast(JsonObject, parsed)


def extend_lineage(
    before: Mapping[str, Any], uses: Sequence[StreamUse], *, run: Mapping[str, Any] | None = None
) -> JsonObject:
    """The manifest of a model that began with one manifest and was trained on streams.

    Args:
        before: Of the model that training began with.
        uses: All that the run has taken so far, so that each checkpoint extends the same `before`.
        run: What `run_account.describe_run` says of the run.
    """
    streams = [*cast("Sequence[JsonObject]", before.get("streams", [])), *map(_stream_entry, uses)]
    runs = [*cast("Sequence[JsonObject]", before.get("runs", [])), *([dict(run)] if run else [])]
    return {**before, "format": LINEAGE_FORMAT, "streams": streams, "runs": runs}


def cut_widths(cut: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Of what a cut left out a part in each layer: its name, how many are kept, and of how many.

    Args:
        cut: The manifest's `cut_from`.
    """
    widths: list[tuple[str, int, int]] = []
    for unit in ("heads", "neurons", "channels"):
        if isinstance(found := cut.get(unit), dict):
            part = cast(JsonObject, found)
            kept = part.get("kept", 0)
            number = len(cast("Sequence[Sequence[int]]", kept)[0]) if isinstance(kept, list) else int(kept)
            widths.append((unit, number, int(part.get("of", 0))))
    return widths


def list_changes(run: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Of a run that was resumed with other settings, the steps until which others held, and those in words.

    Args:
        run: An entry of the manifest's `runs`.
    """
    changes: list[tuple[int, str]] = []
    for earlier in cast("Sequence[JsonObject]", run.get("earlier", [])):
        values = {**earlier.get("settings", {}), **earlier.get("code", {})}
        values |= {"ranks": earlier["ranks"]} if "ranks" in earlier else {}
        said = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
        changes.append((int(earlier["until_step"]), ", ".join(said)))
    return changes


def write_lineage(directory: Path, lineage: Mapping[str, Any]) -> None:
    """Write the manifest into a model's directory."""
    text = json.dumps(lineage, indent=2, ensure_ascii=False)
    (directory / LINEAGE_FILE).write_text(text + "\n", encoding="utf-8")


def _stream_entry(use: StreamUse) -> JsonObject:
    teacher, tokenizer, codec = use.spec.teacher, use.spec.tokenizer, use.spec.codec
    terms = read_terms(use.spec)
    source = next((use.spec.labels[key] for key in PROMPT_LABELS if key in use.spec.labels), "unknown")
    entry: JsonObject = {
        "stream": use.spec.name,
        "license": use.spec.license,
        "distillation": {"verdict": terms.verdict, "reason": terms.reason},
        "prompts": source,
        "first": {"offset": 0, "trace_index": 0},
        "end": {"offset": use.end.offset, "trace_index": use.end.trace_index},
        "complete_passes": use.passes,
        "traces": use.traces,
        "completion_tokens": use.tokens,
        "loss": list(use.loss),
        "teacher": {
            "model": teacher.model,
            "revision": teacher.revision,
            "engine": teacher.engine,
            "dtype": teacher.dtype,
            "vocab_size": teacher.vocab_size,
            "logprobs_mode": teacher.logprobs_mode,
            "logprobs_temperature": teacher.logprobs_temperature,
        },
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_sha256": tokenizer.vocab_sha256.hex(),
            "chat_template_sha256": tokenizer.chat_template_sha256.hex(),
        },
        "codec": {
            "mode": codec.mode,
            "top_k": codec.top_k,
            "min_probability": codec.min_probability,
            "draws": codec.draws,
            "tail_draws": codec.tail_draws,
        },
        "labels": dict(use.spec.labels),
    }
    # Only where there are some: a manifest that says nothing of them was written without any.
    return {**entry, "damaged_blocks": list(use.damaged)} if use.damaged else entry
