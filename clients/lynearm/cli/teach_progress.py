"""What a moment of a teaching job means to a person: the whole job in a line, and a row for each worker."""

from __future__ import annotations

from collections.abc import Mapping

from lynearm.cli.progress import Row, Status, count
from lynearm.teacher.progress import TeacherStatus, TeachProgress, WorkerStatus

_STAGES = {"starting": "Ray", "loading": "the model into vLLM", "sealing": "the stream"}
"""What a stage without a message of its own is about."""

_WITH_WORKERS = ("loading", "generating")


def describe(event: TeachProgress) -> Status | None:
    """The job as it is; None once it is done."""
    if event.stage == "done":
        return None
    text = event.message or _STAGES.get(event.stage, "")
    return Status(
        event.stage,
        ", ".join(_facts(event)) if event.stage == "generating" else text,
        event.done_prompts,
        event.prompts or None,
        left_seconds=event.eta_seconds if event.stage == "generating" else None,
        rows=_rows(event) if event.stage in _WITH_WORKERS else (),
    )


def batch_share(workers: tuple[WorkerStatus, ...]) -> float | None:
    """How full the batches of all generating workers are together; None while none generates."""
    room = sum(worker.max_batch for worker in workers if worker.state == "generating")
    running = sum(worker.running for worker in workers if worker.state == "generating")
    return min(running / room, 1.0) if room else None


def verdict_counts(verdicts: Mapping[str, int]) -> str:
    """How many answers were judged how: "12 correct, 3 incorrect"."""
    return ", ".join(f"{verdicts[outcome]} {outcome}" for outcome in sorted(verdicts))


def _facts(event: TeachProgress) -> list[str]:
    share = batch_share(event.workers)
    counted = {
        "skipped": event.skipped_prompts,
        "failed": event.failed_prompts,
        "restarts": event.restarts,
    }
    return [
        *([event.message] if event.message else []),
        f"{event.done_prompts}/{event.prompts} prompts",
        f"{count(event.tokens_per_second)} tokens/s",
        *([] if share is None else [f"batch {share:.0%} full"]),
        f"{count(event.generated_tokens)} tokens",
        f"{event.acked_blocks} blocks durable",
        *([verdict_counts(event.verdicts)] if event.verdicts else []),
        *(f"{number} {what}" for what, number in counted.items() if number),
    ]


def _rows(event: TeachProgress) -> tuple[Row, ...]:
    return (*map(_teacher_row, event.teachers), *map(_row, event.workers))


def _teacher_row(teacher: TeacherStatus) -> Row:
    return Row(
        teacher.name,
        teacher.done_prompts / teacher.prompts if teacher.prompts else 0.0,
        (
            teacher.stage,
            f"{teacher.workers} workers" if teacher.workers != 1 else "1 worker",
            f"{count(teacher.tokens_per_second)} tokens/s",
            f"{teacher.done_prompts}/{teacher.prompts} prompts",
        ),
        teacher.message,
    )


def _row(worker: WorkerStatus) -> Row:
    where = f"at {worker.node}" if worker.node else ""
    restarts = f"restarted {worker.restarts}×" if worker.restarts else ""
    return Row(
        worker.name,
        worker.occupancy,
        (
            worker.state,
            f"{worker.running}/{worker.max_batch}" if worker.max_batch else "",
            f"{count(worker.tokens_per_second)} tokens/s" if worker.max_batch else "",
            f"{worker.done_prompts} prompts" if worker.max_batch else "",
        ),
        ", ".join(filter(None, (worker.waiting_reason, restarts, where))),
    )
