"""A run's figures as a file of JSON lines: `metrics.jsonl` in the run's directory. Loads no torch.

Each line is one object: {"kind": "step", …} with the fields of `StepRecord`, or {"kind": "evaluation", …}
with those of `EvaluationRecord` and the perplexity, in the order in which they happened. What is not finite
is null.

Invariant: whoever resumes begins with the lines of the checkpoint that it resumes from, so that no step is
there twice, whatever a killed run had written after that checkpoint. Lines are appended and flushed, one
write each: a kill can cut the last one short, and readers pass over it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, cast

from lynearm.student.progress import EvaluationRecord, StepRecord, StreamEvaluation
from lynearm.wire.errors import CheckpointError

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a metrics file holds."""

    steps: tuple[StepRecord, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()


class MetricsLog:
    """Appends a run's records to its file; use it as a context manager, or `close` it.

    Args:
        out: Directory of the run; made if absent.
        steps: Records of the run so far, like the next: what the file holds is replaced by them.
        evaluations: By step, an evaluation after the step with its number.

    Raises:
        CheckpointError: if the file cannot be written.
    """

    def __init__(
        self, out: Path, steps: Sequence[StepRecord] = (), evaluations: Sequence[EvaluationRecord] = ()
    ) -> None:
        self._path = out / METRICS_FILE
        unfinished = out / f".unfinished-{METRICS_FILE}"
        records: list[StepRecord | EvaluationRecord] = [*steps, *evaluations]
        lines = [_line(record) for record in sorted(records, key=_order)]
        try:
            out.mkdir(parents=True, exist_ok=True)
            unfinished.write_text("".join(lines), encoding="utf-8")
            os.replace(unfinished, self._path)
            self._file: IO[str] = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"{self._path} cannot be written: {error}", "name another directory with --out"
            ) from error

    def add(self, record: StepRecord | EvaluationRecord) -> None:
        """Append a record.

        Raises:
            CheckpointError: if it cannot be written.
        """
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._path} cannot be written: {error}", "make room, and resume"
            ) from error

    def close(self) -> None:
        """Write no more."""
        self._file.close()


def read_metrics(out: Path) -> Metrics:
    """The records of a run's file.

    Raises:
        CheckpointError: if there is no such file, or a line before the last is no record.
    """
    path = out / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(
            f"{out} has no readable {METRICS_FILE}: {error.strerror}", "name the --out of lynearm train"
        ) from error
    records: list[StepRecord | EvaluationRecord] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_parse(line))
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise CheckpointError(f"line {number} of {path} is no record: {error}") from error
    return Metrics(
        tuple(record for record in records if isinstance(record, StepRecord)),
        tuple(record for record in records if isinstance(record, EvaluationRecord)),
    )


def metric_values(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """The figures of a record by name, for a tracker: "train/loss", "held_out/kl" and so on."""
    if isinstance(record, StepRecord):
        busy = {"train/seconds": record.seconds, "train/waiting_seconds": record.waiting_seconds}
        learnt = ("loss", "kl", "cross_entropy", "learning_rate", "gradient_norm", "tokens")
        values = {f"train/{name}": float(getattr(record, name)) for name in learnt} | busy
        values |= {f"train/tokens/{name}": float(tokens) for name, tokens in record.stream_tokens.items()}
        if record.hidden is not None:
            values["train/hidden"] = record.hidden
        if record.staleness is not None:
            values["train/staleness"] = record.staleness
    else:
        measured = ("kl", "cross_entropy", "perplexity", "agreement", "calibration_error", "exact_match")
        found = {name: cast("float | None", getattr(record, name)) for name in measured}
        values = {f"held_out/{name}": value for name, value in found.items() if value is not None}
        for stream, part in record.streams.items():
            values |= {
                f"held_out/kl/{stream}": part.kl,
                f"held_out/cross_entropy/{stream}": part.cross_entropy,
            }
            if part.agreement is not None:
                values[f"held_out/agreement/{stream}"] = part.agreement
        values |= {f"tasks/{name}": value for name, value in record.tasks.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _order(record: StepRecord | EvaluationRecord) -> tuple[int, bool]:
    return record.step, isinstance(record, EvaluationRecord)


def _line(record: StepRecord | EvaluationRecord) -> str:
    kind = "step" if isinstance(record, StepRecord) else "evaluation"
    values: dict[str, object] = {"kind": kind, **asdict(record)}
    if isinstance(record, EvaluationRecord):
        values["perplexity"] = record.perplexity
    return json.dumps(_finite(values), allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in cast("Mapping[str, object]", value).items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


_CAN_BE_NONE = frozenset({"agreement", "calibration_error", "exact_match", "hidden", "staleness"})


def _parse(line: str) -> StepRecord | EvaluationRecord:
    values = cast("dict[str, Any]", json.loads(line))
    if values.pop("kind") == "step":
        return StepRecord(**_restore(values, StepRecord))
    streams = cast("dict[str, dict[str, Any]]", values.get("streams", {}))
    measured = {name: _restore(one, StreamEvaluation) for name, one in streams.items()}
    return EvaluationRecord.from_values(_restore({**values, "streams": measured}, EvaluationRecord))


def _restore(values: Mapping[str, Any], record_class: type[Any]) -> dict[str, Any]:
    """The known fields, with what was not finite as NaN."""
    known = {field.name for field in fields(record_class)}
    return {
        name: math.nan if value is None and name not in _CAN_BE_NONE else value
        for name, value in values.items()
        if name in known
    }
